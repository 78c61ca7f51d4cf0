"""Files and folders that appear whole or not at all, and what stands in their way by name.

    beside its place, under a temporary name  ->  written  ->  synced  ->  renamed  ->  the parent
    synced

An error leaves neither a part of what was written nor a folder that was made for it, and what stood
there before stays. A kill may leave the temporary; whoever writes beside it next removes it, which
a lock tells from one in use. A link is followed: what it points to is written. A mount point cannot
be renamed over, so an empty one is filled from within. Files have mode 0666 and folders 0777 less
the umask, whoever made them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError, EngraphyError, WriteFailed

# A name that nobody else gives: what has it and is not locked is swept away.
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.engraphy-part", re.DOTALL)
_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers say it
_TORCH = re.compile("PytorchStreamWriter failed|unexpected pos")  # torch.save on a full disk
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_AT_FDCWD = -100

Kind = type[EngraphyError]


@contextmanager
def publish_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` when the block ends; one that was there is replaced in
    one step.

    Raises WriteFailed for whatever the system refuses and where `path` is no regular file; nothing
    has changed then.
    """
    target = resolved(path)
    with write_errors(target):
        _refuse_special(target)
        with (
            _new_parents(target.parent),
            _temporary(target.parent, target.name, folder=False) as (fd, temporary),
        ):
            with os.fdopen(os.dup(fd), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    _sync_parent(target)


def write_file(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a whole file (text as UTF-8) as `publish_file` does, and raise as it does."""
    with publish_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def publish_folder(
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    needed: int = 0,
    last: str = "",
    taken: Kind = ConfigError,
) -> Iterator[Path]:
    """An empty folder to write into, which is at `path` when the block ends.

    replace: a folder that was there makes way; else it has to be new or empty. needed: bytes of
    free disk. last: the file that tells a reader that all is there; it is moved last where a mount
    point has to be filled. Raises `taken` for a path that is taken, WriteFailed for what the system
    refuses; nothing has changed then.
    """
    target = resolved(path)
    check_folder(target, needed, replace=replace, taken=taken)
    with write_errors(target):
        with (
            _new_parents(target.parent),
            _temporary(_place(target), target.name, folder=True) as (_, temporary),
        ):
            yield temporary
            settle_modes(temporary)
            sync_tree(temporary)
            _put(temporary, target, replace, last, taken)
    _sync_parent(target)


def put_folder(source: Path, target: Path) -> None:
    """Give a finished folder its name; one that was there makes way. Both lie on one file system.
    Raises WriteFailed, and `source` stays then."""
    with write_errors(target, f"it is whole in {source}"):
        if target.exists():
            _exchange(source, target)
            _remove(source)
        else:
            os.rename(source, target)
        sync_directory(source.parent)
        sync_directory(target.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents unless they are there. Raises WriteFailed."""
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def check_folder(
    path: str | os.PathLike[str],
    needed: int = 0,
    *,
    replace: bool = False,
    taken: Kind = ConfigError,
) -> None:
    """Judge a place for a new folder before anything is computed for it. Changes nothing.

    needed: bytes that are going to be written. Raises `taken` for what is neither new nor an empty
    directory (or with `replace` no directory at all), and WriteFailed where nothing can be made
    there, or `needed` bytes are not free.
    """
    target = resolved(path)
    with write_errors(target, "nothing has been written"):
        _refuse_taken(target, replace, taken)
        existing = next(place for place in (_place(target), *target.parents) if place.exists())
        if not existing.is_dir():
            raise taken(f"{target}: expected a directory at {existing}, found a file")
        with _temporary(existing, target.name, folder=True):
            pass  # the one way to know: permissions, read-only mounts, quotas
        free = free_disk(existing)
    if free < needed:
        raise WriteFailed(f"{target}: expected {needed} bytes of free disk, found {free}")


def free_disk(path: Path) -> int:
    """Bytes that this user can still write to the file system of `path`, or of its nearest parent
    that exists."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path, links followed; a link that leads nowhere stays, and is refused by whoever
    writes.

    Raises ConfigError for what no path can be.
    """
    try:
        lost = os.path.islink(path) and not os.path.exists(path)
        return Path(os.path.abspath(path) if lost else os.path.realpath(path))
    except ValueError as error:  # a NUL
        raise ConfigError(f"{os.fspath(path)!r}: expected a path, found {error}") from None


@contextmanager
def write_errors(path: Path, left: str = "nothing is left of it") -> Iterator[None]:
    """What goes wrong with writing below `path` becomes a WriteFailed that names it. left: what is
    there now.

    Within another such block the outer path is named: the inner one may be a temporary.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        number = _number(reason)
        failed = WriteFailed(
            f"{path}: it cannot be written ({reason}); {left}{_space_left(path, number)}"
        )
        failed.errno = number
        raise failed from reason


def still_named(path: Path, fd: int) -> bool:
    """Whether the open file is what has that name: a lock on one that was removed or replaced
    protects nothing."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def settle_modes(folder: Path, others: Collection[int] = ()) -> None:
    """Give files below a folder the mode of a file that is made in it (some libraries make them
    private).

    Files that their owner cannot write were made so on purpose, and stay so. others: inodes that
    are none of ours.
    """
    with _temporary(folder, "mode", folder=False) as (fd, _):
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
    for place, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(place, name)
            found = os.lstat(file)
            changes = stat.S_IMODE(found.st_mode) != mode and found.st_mode & stat.S_IWUSR
            if stat.S_ISREG(found.st_mode) and changes and found.st_ino not in others:
                os.chmod(file, mode)


def sync_tree(directory: Path) -> None:
    """Bring all files and names below a directory to disk, before it is renamed into its place."""
    for folder, _, names in os.walk(directory):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Bring names made or changed in a directory to disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_parent(target: Path) -> None:
    with write_errors(target, "it is in its place, but a power cut may undo that"):
        sync_directory(target.parent)


def _refuse_special(target: Path) -> None:
    if target.is_symlink():
        raise WriteFailed(f"{target}: expected a file's name, found a link that leads nowhere")
    if target.exists() and not target.is_file():
        kind = "a directory" if target.is_dir() else "a device, pipe or socket"
        raise WriteFailed(f"{target}: expected a file's name, found {kind}")


def _refuse_taken(target: Path, replace: bool, taken: Kind) -> None:
    if target.is_symlink():
        raise taken(
            f"{target}: expected a new or empty directory, found it taken by a link that "
            "leads nowhere"
        )
    if target.exists() and not target.is_dir():
        raise taken(f"{target}: expected a new or empty directory, found it taken by a file")
    if not target.exists() or (replace and not _is_mount(target)):
        return
    unused = ("lost+found",) if _is_mount(target) else ()
    held = [
        name for name in os.listdir(target) if name not in unused and not _TEMPORARY.fullmatch(name)
    ]
    if held:
        raise taken(
            f"{target}: expected a new or empty directory, found it taken: it holds {min(held)}"
        )


def _place(target: Path) -> Path:
    """Where the temporary is made: beside the target, or in it where it cannot be renamed over, or
    is a temporary that appears whole later (replaced, it would lose its lock)."""
    if not target.is_dir():
        return target.parent
    fixed = _is_mount(target) or _TEMPORARY.fullmatch(target.name) is not None
    return target if fixed or not os.access(target.parent, os.W_OK | os.X_OK) else target.parent


def _is_mount(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # a bind mount within one file system
        text = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    name = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path))
    return any(line.split(b" ")[4:5] == [name] for line in text.split(b"\n"))


def _put(temporary: Path, target: Path, replace: bool, last: str, taken: Kind) -> None:
    """Move what has been written into its place."""
    if temporary.parent == target:
        _move_up(temporary, target, last)
    elif replace and target.exists():
        _exchange(temporary, target)
    else:
        try:
            os.rename(temporary, target)
        except OSError:
            _refuse_taken(target, False, taken)  # since it was judged
            raise


def _move_up(temporary: Path, target: Path, last: str) -> None:
    moved = []
    try:
        for name in sorted(os.listdir(temporary), key=lambda name: name == last):
            os.rename(temporary / name, target / name)
            moved.append(target / name)
    except BaseException:
        for path in moved:
            _remove(path)
        raise


def _exchange(temporary: Path, target: Path) -> None:
    """In one step where the file system can; else what was there is removed first."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (os.fsencode(temporary), os.fsencode(target))
    if (
        renameat2 is not None
        and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0
    ):
        return  # the temporary is now what was there
    shutil.rmtree(target)
    os.rename(temporary, target)


@contextmanager
def _new_parents(parent: Path) -> Iterator[None]:
    """Make a folder and its parents; those that were made go again on an error, where nothing else
    came into them."""
    missing = [place for place in (parent, *parent.parents) if not place.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


@contextmanager
def _temporary(parent: Path, name: str, folder: bool) -> Iterator[tuple[int, Path]]:
    """A new file or folder in `parent`, open and locked; afterwards it is gone if it still has that
    name."""
    _sweep(parent)
    fd, path = None, parent
    while fd is None:
        path = parent / f".{name[:40]}.{secrets.token_hex(4)}.engraphy-part"
        if folder:
            path.mkdir()
            fd = _lock(path, os.O_RDONLY | os.O_DIRECTORY)
        else:
            fd = _lock(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        yield fd, path
    finally:
        _remove(path)
        os.close(fd)


def _lock(path: Path, flags: int) -> int | None:
    """Open and lock; None if somebody else has swept the path away meanwhile, or is about to."""
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        return fd  # a file system without locks: nobody sweeps there
    if still_named(path, fd):
        return fd
    os.close(fd)
    return None


def _sweep(parent: Path) -> None:
    """Remove what writers that died have left in a folder. Nothing is said where that cannot be: it
    is their litter."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(parent)
    for name in names:
        path = parent / name
        if not _TEMPORARY.fullmatch(name) or path.is_symlink():
            continue
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _reason(error: BaseException) -> BaseException | None:
    """What could not be written, as the system or a library says it; None if an error is about
    something else."""
    if isinstance(error, WriteFailed):
        return error.__cause__
    if isinstance(error, EngraphyError):
        return None  # it says by itself what was expected
    if isinstance(error, OSError) or _RUST.search(str(error)):
        return error
    if _TORCH.search(str(error)):
        return error.__context__ if isinstance(error.__context__, OSError) else error
    return None


def _number(reason: BaseException) -> int | None:
    """The system's number of an error."""
    found = _RUST.search(str(reason))
    if found is not None:
        return int(found[1])
    return reason.errno if isinstance(reason, OSError) else None


def _space_left(path: Path, number: int | None) -> str:
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f", {free_disk(path)} bytes are free"
