"""Files and folders that appear complete or not at all.

    make a temporary beside the target  ->  write  ->  sync  ->  rename to the target
    ->  sync the parent

After an error nothing has changed: neither the temporary nor folders that were made for it stay. A
kill may leave the temporary, which the next writer removes (temporaries.py). Links are followed. A
mount point cannot be renamed over, so an empty one is filled from within. Files get mode 0666 and
folders 0777, minus the umask, no matter which library made them.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError, EngraphyError, WriteFailed
from .temporaries import is_temporary, remove, temporary
from .write_errors import free_disk as free_disk
from .write_errors import write_errors as write_errors

_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_AT_FDCWD = -100

Kind = type[EngraphyError]


@contextmanager
def publish_file(path: str | os.PathLike[str]) -> Generator[BinaryIO]:
    """Gives a file to write, which appears at `path` when the block ends.

    An existing file is replaced in one step. After an error nothing has changed.

    Raises:
        WriteFailed: The system refuses, or `path` is not a regular file.
        ConfigError: `path` is no path.
    """
    target = resolved(path)
    with write_errors(target):
        _refuse_special(target)
        with (
            _new_parents(target.parent),
            temporary(target.parent, target.name, folder=False) as (fd, part),
        ):
            with os.fdopen(os.dup(fd), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
    _sync_parent(target)


def write_file(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a whole file as `publish_file` does, text as UTF-8.

    Raises:
        WriteFailed: The system refuses, or `path` is not a regular file.
        ConfigError: `path` is no path.
    """
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
) -> Generator[Path]:
    """Gives an empty folder to write into, which appears at `path` when the block ends.

    After an error nothing has changed.

    Args:
        path: The place of the folder.
        replace: True: an existing folder is replaced. False: `path` has to be new or empty.
        needed: Bytes of free disk that are needed.
        last: Name of the file by which a reader knows that the folder is complete. It is moved last
            if a mount point has to be filled.
        taken: Class of the error if the place is taken.

    Raises:
        EngraphyError: The place is taken; an error of class `taken`.
        WriteFailed: The system refuses.
    """
    target = resolved(path)
    check_folder(target, needed, replace=replace, taken=taken)
    with write_errors(target):
        with (
            _new_parents(target.parent),
            temporary(_place(target), target.name, folder=True) as (_, part),
        ):
            yield part
            settle_modes(part)
            sync_tree(part)
            _put(part, target, replace, last, taken)
    _sync_parent(target)


def put_folder(source: Path, target: Path) -> None:
    """Moves a finished folder to its place, where it replaces an existing folder.

    Both must be on one file system.

    Raises:
        WriteFailed: The system refuses. `source` stays as it is.
    """
    with write_errors(target, f"it is whole in {source}"):
        if target.exists():
            _exchange(source, target)
            remove(source)
        else:
            os.rename(source, target)
        sync_directory(source.parent)
        sync_directory(target.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents unless they exist.

    Raises:
        WriteFailed: The system refuses.
    """
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)


def check_folder(
    path: str | os.PathLike[str],
    needed: int = 0,
    *,
    replace: bool = False,
    taken: Kind = ConfigError,
) -> None:
    """Checks a place for a new folder before anything is computed for it. Changes nothing.

    Args:
        path: The place of the folder.
        needed: Bytes that are going to be written.
        replace: Whether an existing folder may be replaced.
        taken: Class of the error if the place is taken.

    Raises:
        EngraphyError: The place is neither new nor an empty directory; with `replace`, it is
            neither new nor a directory. The error is of class `taken`.
        WriteFailed: Nothing can be made there, or `needed` bytes are not free.
    """
    target = resolved(path)
    with write_errors(target, "nothing has been written"):
        _refuse_taken(target, replace, taken)
        existing = next(place for place in (_place(target), *target.parents) if place.exists())
        if not existing.is_dir():
            raise taken(f"{target}: expected a directory at {existing}, found a file")
        with temporary(existing, target.name, folder=True):
            pass  # only trying finds permissions, read-only mounts and quotas
        free = free_disk(existing)
    if free < needed:
        raise WriteFailed(f"{target}: expected {needed} bytes of free disk, found {free}")


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path, with links followed.

    A broken link is not followed: the functions that write refuse it.

    Raises:
        ConfigError: `path` is no path: it has a NUL.
    """
    try:
        if os.path.islink(path) and not os.path.exists(path):
            return Path(os.path.abspath(path))
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise ConfigError(f"{os.fspath(path)!r}: expected a path, found {error}") from None


def settle_modes(folder: Path, others: Collection[int] = ()) -> None:
    """Gives the files below a folder the mode that a new file in it gets.

    Some libraries make their files private. Files that their owner cannot write were made so on
    purpose, and are left alone.

    Args:
        folder: The folder.
        others: Inodes to leave alone, because they are hard links to files elsewhere.
    """
    with temporary(folder, "mode", folder=False) as (fd, _):
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
    for place, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(place, name)
            status = os.lstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_ino in others:
                continue
            if status.st_mode & stat.S_IWUSR and stat.S_IMODE(status.st_mode) != mode:
                os.chmod(file, mode)


def sync_tree(directory: Path) -> None:
    """Brings all files and names below a directory to disk, before it is renamed into its place."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(os.path.join(folder, name), os.O_RDONLY)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Brings names that were made or changed in a directory to disk."""
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: str | Path, flags: int) -> None:
    fd = os.open(path, flags)
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
    expected = f"{target}: expected a new or empty directory, found it taken"
    if target.is_symlink():
        raise taken(f"{expected} by a link that leads nowhere")
    if target.exists() and not target.is_dir():
        raise taken(f"{expected} by a file")
    if not target.exists() or (replace and not _is_mount(target)):
        return
    unused = ("lost+found",) if _is_mount(target) else ()
    names = [name for name in os.listdir(target) if name not in unused and not is_temporary(name)]
    if names:
        raise taken(f"{expected}: it holds {min(names)}")


def _place(target: Path) -> Path:
    """The folder in which the temporary is made: beside the target, or the target itself.

    It is the target if that cannot be renamed over. It is also the target if that is itself a
    temporary, which would lose its lock if it were replaced.
    """
    if not target.is_dir():
        return target.parent
    if _is_mount(target) or is_temporary(target.name):
        return target
    return target.parent if os.access(target.parent, os.W_OK | os.X_OK) else target


def _is_mount(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # a bind mount within one file system
        text = Path("/proc/self/mountinfo").read_bytes()
    except OSError:
        return False
    name = re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))
    return any(line.split(b" ")[4:5] == [name] for line in text.split(b"\n"))


def _put(part: Path, target: Path, replace: bool, last: str, taken: Kind) -> None:
    """Moves the finished temporary to its place."""
    if part.parent == target:
        _move_up(part, target, last)
    elif replace and target.exists():
        _exchange(part, target)
    else:
        try:
            os.rename(part, target)
        except OSError:
            _refuse_taken(target, False, taken)  # it may have been taken since it was checked
            raise


def _move_up(part: Path, target: Path, last: str) -> None:
    moved: list[Path] = []
    try:
        for name in sorted(os.listdir(part), key=lambda name: name == last):
            os.rename(part / name, target / name)
            moved.append(target / name)
    except BaseException:
        for path in moved:
            remove(path)
        raise


def _exchange(part: Path, target: Path) -> None:
    """Exchanges two folders in one step; if the file system cannot, removes the target first."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    old = os.fsencode(part)
    new = os.fsencode(target)
    if renameat2 is not None and renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _EXCHANGE) == 0:
        return  # the temporary is now the old folder
    shutil.rmtree(target)
    os.rename(part, target)


@contextmanager
def _new_parents(parent: Path) -> Generator[None]:
    """Makes a folder and its parents. After an error, removes those that are new and empty."""
    missing = [place for place in (parent, *parent.parents) if not place.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise
