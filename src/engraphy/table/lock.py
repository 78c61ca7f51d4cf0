"""The lock of a table's one writer: the file `writer.lock` in the table's folder.

The file exists while a process writes, and remains if that process is killed. The holder removes
the file before it releases the lock, so a lock counts only if the locked file still has its name.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

from ..errors import TableError
from ..system.temporaries import still_named
from ..system.write_errors import write_errors

LOCK_NAME = "writer.lock"


class WriterLock:
    """A lock that is held; made by `take`.

    A forked child has a copy, which removes and unlocks nothing: the lock belongs to the parent.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._owner = os.getpid()
        # A forked child that drops its copy must not unlock, so the finalizer only closes.
        self._close = weakref.finalize(self, os.close, fd)

    @classmethod
    def take(cls, directory: Path) -> WriterLock:
        """Takes the lock of the table in a folder.

        Raises:
            TableError: Another writer holds it.
            WriteFailed: The system refuses the file.
        """
        path = directory / LOCK_NAME
        while True:
            with write_errors(path, "the table is as it was"):
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise TableError(
                    f"{directory}: expected no other writer, found the table open for writing "
                    "elsewhere"
                ) from None
            if still_named(path, fd):
                return cls(fd)
            os.close(fd)  # its last holder removed it between the two calls

    def release(self, directory: Path) -> None:
        """Releases the lock. `directory` is where the table is now: it may have been renamed."""
        if os.getpid() == self._owner:
            path = directory / LOCK_NAME
            with suppress(OSError):
                if still_named(path, self._fd):
                    path.unlink()
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._close()

    def drop(self) -> None:
        """Closes the file as a kill would: the file stays, but locks nothing."""
        self._close()
