"""The open shards that a `PreadStore` reads and writes with calls of the system."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Iterable
from typing import Any

from ..errors import EngraphyError, StoreError
from ..table.shards import HEADER_BYTES
from ..table.table import Table
from .mapping import check_size


class OpenFiles:
    """The shards of a layer, open until the last reader lets go of this object.

    Not earlier: once a descriptor is closed, the system may give its number to another file.

    Attributes:
        direct: whether reads go past the page cache (O_DIRECT).
        reader: the reader of the native part, once it is used.
    """

    def __init__(self, table: Table, layer: int, direct: bool) -> None:
        self.direct = direct
        self.reader: Any = None
        self._paths: list[str] = []
        self._sizes: list[int] = []
        self._fds: list[int] = []
        weakref.finalize(self, _close_all, self._fds).atexit = False
        for shard in table.shards(layer):
            self._paths.append(str(shard.path))
            self._sizes.append(shard.size)
            self._fds.append(table.open_shard(shard))
            self._advise(len(self._fds) - 1)

    def native_reader(self, core: Any, shard_rows: int, row_bytes: int, threads: int) -> Any:
        """A reader of the native part over these files, valid while they are open."""
        return core.RowReader(
            self._fds, self._sizes, shard_rows, row_bytes, HEADER_BYTES, threads, self.direct
        )

    def read(self, number: int, begin: int, length: int, into: memoryview) -> None:
        """Reads bytes of a file. With whole pages the file may end before `length`."""
        wanted = min(length, self._sizes[number] - begin)
        done = 0
        while done < wanted:
            try:
                count = os.preadv(self._fds[number], [into[done:length]], begin + done)
            except OSError as error:
                raise self.failed(number, error.errno) from error
            if not count:
                raise self.failed(number, 0)
            done += count

    def write(self, number: int, begin: int, data: memoryview) -> None:
        """Writes bytes to a file. Raises StoreError if the system refuses."""
        while data:
            try:
                written = os.pwrite(self._fds[number], data, begin)
            except OSError as error:
                raise StoreError(
                    f"{self._paths[number]}: rows cannot be written ({error})"
                ) from error
            data = data[written:]
            begin += written

    def check_sizes(self, numbers: Iterable[int]) -> None:
        """Raises ShardTruncated unless these files still have their sizes."""
        for number in numbers:
            size = os.fstat(self._fds[number]).st_size
            check_size(self._paths[number], self._sizes[number], size)

    def failed(self, number: int, code: int | None) -> EngraphyError:
        """The error to raise for a read of a file that failed.

        Args:
            number: which file, from 0.
            code: the errno, or 0 if the read gave nothing.
        """
        path = self._paths[number]
        try:
            self.check_sizes([number])
        except EngraphyError as truncated:
            return truncated
        if code == errno.EINVAL and self.direct:
            return StoreError(
                f"{path}: the file system refuses direct reads; open it with direct=0"
            )
        reason = os.strerror(code) if code else "the file ends before its size"
        return StoreError(f"{path}: rows cannot be read ({reason})")

    def _advise(self, number: int) -> None:
        fd = self._fds[number]
        if not self.direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
            return
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        except OSError as error:
            raise self.failed(number, error.errno) from error


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
