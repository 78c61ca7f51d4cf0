"""Random reads of pages of one file, as a store with `direct=1` reads rows: by many threads.

The page cache answers no read: O_DIRECT bypasses it where the file system has that, elsewhere the
file is dropped from it before each batch.
"""

# _native is private to engraphy.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import mmap
import os
import time
import weakref
from typing import Any

import numpy as np

from .. import _native
from ..errors import ConfigError, StoreError
from ..store.threads import Threads

PAGE = 4096
DIRECT = "O_DIRECT, past the page cache"
DROPPED = "no O_DIRECT here: dropped from the page cache by posix_fadvise before each batch"
_APART = 4  # pages: a reader joins pages that are next to each other, or nearly


class PageReader:
    """Reads random pages of a file.

    Attributes:
        pages: Whole pages of the file.
        direct: Whether reads bypass the page cache.

    Raises:
        ConfigError: The file cannot be read, or has too few pages.
    """

    def __init__(self, path: str, threads: int, least: int) -> None:
        """Opens a file.

        Args:
            path: The file; it is only read.
            threads: At most so many reads are under way at a time.
            least: Pages that it must have.
        """
        try:
            self._fd, self.direct = _open(path)
        except OSError as error:
            raise ConfigError(f"{path}: expected a file to read, found {error}") from None
        weakref.finalize(self, os.close, self._fd)
        self._path = path
        self.pages = os.lseek(self._fd, 0, os.SEEK_END) // PAGE
        if self.pages < least:
            raise ConfigError(
                f"{path}: expected at least {least * PAGE} bytes to read from, "
                f"found {self.pages * PAGE}"
            )
        self._threads = Threads(threads)
        self._native: Any = None
        core = _native.core
        if core is not None:
            size = self.pages * PAGE
            self._native = core.RowReader(
                [self._fd], [size], self.pages, PAGE, 0, threads, self.direct
            )

    @property
    def most(self) -> int:
        """How many distinct pages `draw` gives at most."""
        return self.pages // _APART

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Pages to read, int64 [count], distinct, and none beside another."""
        slot_N = rng.choice(self.most, count, replace=False)
        return slot_N * _APART + rng.integers(0, _APART - 2, count)

    def seconds(self, page_N: np.ndarray) -> float:
        """Reads pages as one batch. Returns how long that took.

        Raises:
            StoreError: The system refuses to read.
        """
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = mmap.mmap(-1, len(page_N) * PAGE)  # whole pages, as O_DIRECT needs them
        out_NP = np.frombuffer(buffer, np.uint8)
        out_NP[::PAGE] = 1  # the system provides its pages now
        begun = time.perf_counter()
        if self._native is None:
            self._read_plain(page_N, out_NP.data)
        else:
            self._read_native(page_N, out_NP)
        return time.perf_counter() - begun

    def _read_native(self, page_N: np.ndarray, out_NP: np.ndarray) -> None:
        core: Any = _native.core
        *_, number, code = self._native.read(
            core.address(page_N), len(page_N), core.address(out_NP)
        )
        if number >= 0:
            raise self._failed(os.strerror(code) if code else "it ended")

    def _read_plain(self, page_N: np.ndarray, view: memoryview) -> None:
        pages = page_N.tolist()

        def read(i: int) -> None:
            try:
                count = os.preadv(self._fd, [view[i * PAGE : (i + 1) * PAGE]], pages[i] * PAGE)
            except OSError as error:
                raise self._failed(str(error)) from error
            if count != PAGE:
                raise self._failed("it ended")

        self._threads.each(read, range(len(pages)))

    def _failed(self, reason: str) -> StoreError:
        return StoreError(f"{self._path}: pages cannot be read ({reason})")


def _open(path: str) -> tuple[int, bool]:
    """A file descriptor, and whether its reads bypass the page cache."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    else:
        try:
            os.preadv(fd, [mmap.mmap(-1, PAGE)], 0)
            return fd, True
        except OSError:  # refused only now
            os.close(fd)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    except OSError:
        os.close(fd)
        raise
    return fd, False
