"""Temporary files and folders that are locked while they are in use, and swept away if not.

A process that is killed leaves its temporary. The next one that makes a temporary in the same
folder removes it: the lock, which ends with its process, says that it is not in use.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

# A name that no other program gives: what has it and is not locked is swept away.
_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.engraphy-part", re.DOTALL)


def is_temporary(name: str) -> bool:
    """Whether a file or folder has the name of a temporary."""
    return _NAME.fullmatch(name) is not None


@contextmanager
def temporary(parent: Path, name: str, folder: bool) -> Generator[tuple[int, Path]]:
    """A new file or folder in `parent`, open and locked, with `name` in its own name.

    It is removed at the end of the block if it still has its name. What processes that died have
    left in `parent` is removed first.
    """
    _sweep(parent)
    path = parent
    fd = None
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
        remove(path)
        os.close(fd)


def still_named(path: Path, fd: int) -> bool:
    """Whether a path still leads to an open file. If not, a lock on the file protects nothing."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Removes a file, link or folder if it is there and the system lets it go."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _lock(path: Path, flags: int) -> int | None:
    """Opens and locks; returns None if another process has removed the path, or is about to."""
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
        return fd  # a file system without locks: no process sweeps there
    if still_named(path, fd):
        return fd
    os.close(fd)
    return None


def _sweep(parent: Path) -> None:
    """Removes what dead processes have left in a folder, as far as the system lets it."""
    names: list[str] = []
    with suppress(OSError):
        names = os.listdir(parent)
    for name in names:
        path = parent / name
        if not is_temporary(name) or path.is_symlink():
            continue
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(fd)
