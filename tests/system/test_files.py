"""Files and folders appear whole or not at all, whatever stands in their way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from engraphy.errors import ConfigError, EngraphyError, TableError, WriteFailed
from engraphy.system import files
from engraphy.system.files import check_folder, publish_file, publish_folder, write_file


def fill(folder: Path, text: str = "new") -> None:
    (folder / "inside").mkdir()
    (folder / "inside" / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text)


def refusing(number: int):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


# What is written appears at once.


def test_a_file_and_a_folder_are_there_when_the_block_ends_and_not_before(tmp_path):
    with publish_file(tmp_path / "f") as file:
        file.write(b"whole")
        assert not (tmp_path / "f").exists()
    with publish_folder(tmp_path / "deep" / "er" / "d") as folder:
        fill(folder)
        assert not (tmp_path / "deep" / "er" / "d").exists()
    assert tree(tmp_path) == {
        "deep": None,
        "deep/er": None,
        "deep/er/d": None,
        "deep/er/d/b.txt": b"new",
        "deep/er/d/inside": None,
        "deep/er/d/inside/a.txt": b"new",
        "f": b"whole",
    }


def test_what_was_there_is_replaced_whole(tmp_path):
    write_file(tmp_path / "f", "old")
    write_file(tmp_path / "f", "new")
    for text in ("old", "new"):
        with publish_folder(tmp_path / "d", replace=True) as folder:
            fill(folder, text)
            (folder / text).touch()
    assert tree(tmp_path) == {
        "d": None,
        "d/b.txt": b"new",
        "d/inside": None,
        "d/inside/a.txt": b"new",
        "d/new": b"",
        "f": b"new",
    }


def test_a_file_system_that_cannot_exchange_two_folders_still_replaces_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_EXCHANGE", 1 << 20)  # a flag that no kernel knows
    test_what_was_there_is_replaced_whole(tmp_path)


def test_everything_is_synced_before_it_has_its_name_and_the_parent_after(tmp_path, monkeypatch):
    done = []
    rename, replace = os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), done.append("named")))
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), done.append("named")))
    with publish_folder(tmp_path / "d") as folder:
        fill(folder)
        own = folder.name
    assert set(done[:4]) == {"a.txt", "b.txt", "inside", own} and done[4:] == [
        "named",
        tmp_path.name,
    ]
    done.clear()
    write_file(tmp_path / "f", "text")
    assert done[0].startswith(".f.") and done[1:] == ["named", tmp_path.name]


# An error leaves what was there.


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EXDEV, errno.EDQUOT, errno.EIO]
)
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_what_the_system_refuses_is_named_and_leaves_everything_as_it_was(
    tmp_path, monkeypatch, number, call
):
    write_file(tmp_path / "f", "old")
    before = tree(tmp_path)
    for name in ("rename", "replace") if call == "rename" else ("fsync",):
        monkeypatch.setattr(os, name, refusing(number))
    for path in (tmp_path / "f", tmp_path / "new" / "f"):
        with pytest.raises(
            WriteFailed, match=f"{path}: it cannot be written .*{os.strerror(number)}"
        ) as caught:
            write_file(path, "new")
        assert caught.value.errno == number and isinstance(caught.value, OSError)
    with pytest.raises(
        WriteFailed, match=f"d: it cannot be written .*{os.strerror(number)}.*nothing is left"
    ):
        with publish_folder(tmp_path / "other" / "d") as folder:
            fill(folder)
    monkeypatch.undo()
    assert tree(tmp_path) == before


def test_a_full_disk_says_how_much_is_free(tmp_path):
    with pytest.raises(WriteFailed, match=r"No space left.*, \d+ bytes are free"):
        with publish_folder(tmp_path / "d"):
            refusing(errno.ENOSPC)()


@pytest.mark.parametrize(
    "error",
    [
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=["safetensors", "torch", "torch, other"],
)
def test_what_other_libraries_say_of_a_full_disk_is_a_write_that_failed(tmp_path, error):
    with pytest.raises(WriteFailed, match="it cannot be written"):
        with publish_folder(tmp_path / "d"):
            raise error
    assert not tree(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, TableError])
def test_any_other_exception_passes_and_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with publish_folder(tmp_path / "deep" / "d") as folder:
            fill(folder)
            raise error
    with pytest.raises(error):
        with publish_file(tmp_path / "deep" / "f") as file:
            file.write(b"half")
            raise error
    assert not tree(tmp_path)


def test_a_limit_on_the_size_of_files_is_an_error_with_a_name(tmp_path):
    """A real refusal of the kernel, which needs neither root nor a small disk."""
    code = """
        import resource, signal, sys
        from engraphy.system import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            files.write_file(sys.argv[1] + "/f", b"x" * 200_000)
        except files.WriteFailed as error:
            print(error)
    """
    done = run(code, tmp_path)
    assert (
        "f: it cannot be written ([Errno 27] File too large); nothing is left of it" in done.stdout
    ), done.stderr
    assert not tree(tmp_path)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="mounting takes root; the tests above refuse by other means"
)
def test_a_small_disk_that_fills_up_is_as_it_was_before(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "small", str(tmp_path)], check=False
    ).returncode:
        pytest.skip("this root may not mount")
    try:
        write_file(tmp_path / "kept", "old")
        with pytest.raises(WriteFailed, match="No space left"):
            write_file(tmp_path / "kept", b"x" * 3_000_000)
        with pytest.raises(WriteFailed, match="No space left"):
            with publish_folder(tmp_path / "d") as folder:
                (folder / "a").write_bytes(b"x" * 3_000_000)
        assert tree(tmp_path) == {"kept": b"old"}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Kills.


KILLED = """
import os, signal, sys
from pathlib import Path
from engraphy.system import files

def armed(call):
    def step(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return step

def write(place, text):
    with files.publish_folder(place / "d", replace=True) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text)
    files.write_file(place / "f", text)

for step in range(200):
    place = Path(sys.argv[1]) / f"{step:03d}"
    write(place, "old")
    child = os.fork()
    if not child:
        left = [step]
        for name in ("fsync", "replace", "rename", "mkdir", "open", "rmdir", "unlink"):
            setattr(os, name, armed(getattr(os, name)))
        write(place, "new")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_kill_at_any_step_leaves_old_or_new_and_the_next_writer_removes_the_rest(tmp_path):
    done = run(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    places = sorted(tmp_path.iterdir())
    assert 15 < len(places) < 200
    for place in places:
        texts = {(place / "d" / name).read_text() for name in ("inside/a.txt", "b.txt")}
        assert (
            len(texts) == 1
            and texts <= {"old", "new"}
            and (place / "f").read_text() in ("old", "new")
        )
        write_file(place / "g", "next")
        assert sorted(os.listdir(place)) == ["d", "f", "g"]


def test_what_another_writer_is_writing_is_not_taken_for_litter(tmp_path):
    with publish_folder(tmp_path / "d") as folder, publish_file(tmp_path / "f") as file:
        run(
            "import sys; from engraphy.system import files; files.write_file(sys.argv[1], 'x')",
            tmp_path / "g",
        )
        assert (tmp_path / "g").exists()
        fill(folder)
        file.write(b"mine")
    assert (tmp_path / "d" / "b.txt").exists() and (tmp_path / "f").read_bytes() == b"mine"


# Links, mount points, things that are no files.


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "there" / "d").mkdir(parents=True)
    (tmp_path / "there" / "f").write_text("old")
    for name in ("f", "d"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    write_file(tmp_path / "f", "new")
    with publish_folder(tmp_path / "d") as folder:
        fill(folder)
    with publish_folder(tmp_path / "d", replace=True) as folder:
        fill(folder, "newer")
    assert (tmp_path / "f").is_symlink() and (tmp_path / "d").is_symlink()
    assert (tmp_path / "there" / "f").read_text() == "new"
    assert (tmp_path / "there" / "d" / "b.txt").read_text() == "newer"
    assert sorted(os.listdir(tmp_path)) == ["d", "f", "there"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("lost", "circle"):
        with pytest.raises(WriteFailed, match="a link that leads nowhere"):
            write_file(tmp_path / name, "x")
        with pytest.raises(ConfigError, match="found it taken by a link that leads nowhere"):
            check_folder(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["circle", "lost"]


@pytest.mark.parametrize("path", ["/dev/null", "/tmp"])
def test_what_is_no_file_is_not_replaced_by_one(path):
    with pytest.raises(WriteFailed, match="expected a file's name, found"):
        write_file(path, "x")


def test_a_path_with_a_nul_is_an_error_with_a_name(tmp_path):
    for judge in (check_folder, lambda path: write_file(path, "x")):
        with pytest.raises(ConfigError, match="expected a path"):
            judge(f"{tmp_path}/a\0b")


def test_names_as_long_as_the_system_allows_can_be_written(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        write_file(tmp_path / name, "x")
        (tmp_path / name).unlink()
    with pytest.raises(WriteFailed, match="File name too long"):
        write_file(tmp_path / ("n" * 256), "x")


def as_mount(monkeypatch, path: Path) -> None:
    """What a mount point is to a rename, without one: `path` cannot be replaced."""
    rename = os.rename

    def busy(a, b):
        if Path(b) == path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(a, b)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(files, "_is_mount", lambda found: found == path)


def test_an_empty_mount_point_is_filled_from_within_and_its_telling_file_comes_last(
    tmp_path, monkeypatch
):
    mount = tmp_path / "mount"
    (mount / "lost+found").mkdir(parents=True)
    as_mount(monkeypatch, mount)
    named, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (rename(a, b), named.append(Path(b).name)))
    with publish_folder(mount, last="b.txt") as folder:
        assert folder.parent == mount
        fill(folder)
        (folder / "c.txt").touch()
    assert (
        sorted(os.listdir(mount)) == ["b.txt", "c.txt", "inside", "lost+found"]
        and named[-1] == "b.txt"
    )
    with pytest.raises(ConfigError, match="found it taken"):
        check_folder(mount, replace=True)


def test_a_mount_point_that_cannot_be_filled_is_empty_again(tmp_path, monkeypatch):
    mount = tmp_path / "mount"
    mount.mkdir()
    as_mount(monkeypatch, mount)
    rename = os.rename
    monkeypatch.setattr(
        os, "rename", lambda a, b: refusing(errno.EIO)() if b.name == "inside" else rename(a, b)
    )
    with pytest.raises(WriteFailed, match="Input/output error"):
        with publish_folder(mount) as folder:
            fill(folder)
    assert not os.listdir(mount)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="mounting takes root; the tests above stand in for it"
)
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_real_mount_points_are_filled(tmp_path, kind):
    mount, source = tmp_path / "a mount", tmp_path / "source"
    mount.mkdir()
    source.mkdir()
    how = ["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", str(source)]
    if subprocess.run(["mount", *how, str(mount)], check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        with publish_folder(mount, last="b.txt") as folder:
            fill(folder)
        assert sorted(os.listdir(mount)) == ["b.txt", "inside"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# A place is judged before anything is computed.


def test_places_that_cannot_be_are_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = tree(tmp_path)
    for name, said in (
        ("file", "taken by a file"),
        ("full", "it holds x"),
        ("file/below", "expected a directory"),
    ):
        for kind in (ConfigError, TableError):
            with pytest.raises(kind, match=said):
                check_folder(tmp_path / name, taken=kind)
            with pytest.raises(kind, match=said), publish_folder(tmp_path / name, taken=kind):
                raise AssertionError
    with pytest.raises(WriteFailed, match="expected 1000000000000000000 bytes of free disk, found"):
        check_folder(tmp_path / "new" / "d", 10**18)
    check_folder(tmp_path / "new" / "d", 1)
    assert tree(tmp_path) == before


def test_a_place_without_permission_is_refused_and_an_own_folder_in_it_is_filled():
    code = """
        import os, pathlib, sys
        from engraphy.system import files
        if os.getuid() == 0:  # permissions do not bind root
            os.setgroups([]), os.setgid(65534), os.setuid(65534)
        place = pathlib.Path(sys.argv[1])
        for name in ("d", "new/d"):
            try:
                files.check_folder(place / name)
            except files.WriteFailed as error:
                print(error.errno)
        with files.publish_folder(place / "own", last="b") as folder:
            for name in "ab":
                (folder / name).write_text(name)
        print(sorted(os.listdir(place / "own")))
    """
    with tempfile.TemporaryDirectory() as name:  # whose parents anybody may pass
        place = Path(name)
        (place / "own").mkdir()
        (place / "own").chmod(0o777)
        place.chmod(0o555)
        done = run(code, place)
        place.chmod(0o755)
    assert done.stdout.splitlines() == ["13", "13", "['a', 'b']"], done.stderr


# Modes.


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_those_of_the_umask_whoever_made_the_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "f", "x")
        with publish_folder(tmp_path / "new" / "d") as folder:
            fill(folder)
            (folder / "private").touch(0o600)
            (folder / "inside" / "kept").touch()
            (folder / "inside" / "kept").chmod(0o444)
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")
    }
    assert modes.pop("new/d/inside/kept") == 0o444
    assert modes == {
        name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask for name in modes
    }


def test_every_error_is_of_the_one_family():
    assert issubclass(WriteFailed, EngraphyError) and issubclass(WriteFailed, OSError)
