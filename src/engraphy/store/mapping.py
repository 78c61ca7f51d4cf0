"""Files as memory, and whether the memory still is what the files held.

Touching a page that a truncated file no longer has, or that the disk cannot read, is a SIGBUS,
which ends the process; the rest of the page in which a shortened file now ends reads as zeros. With
the native part such a fault is caught: it is noted, and the memory reads as zeros from then on
(`_native/guard.cpp`). A `Watch` asks for that after each read, when it has looked at the last byte
of each file: wherever a file was cut, that byte is gone or zero, and where it is zero the size
tells. Every 50 ms it asks for the sizes of all files. Without the native part it looks at the sizes
before and after each read; a file that is truncated between the first look and the read still ends
the process. A file that another is renamed over is not damaged: the old one stays mapped until the
store is closed.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import _native
from ..errors import ShardTruncated, StoreError
from ..system.environment import RESIDENCY, switch

PAGE = mmap.PAGESIZE
_POPULATE_READ = getattr(mmap, "MADV_POPULATE_READ", 22)
_POPULATE_STEP = 1 << 26  # the GIL is held during one step
_LOOK_EVERY = 0.05  # seconds


class MappedFile:
    """The first `size` bytes of an open file, shared with all who map it and without read-ahead.

    fd: is duplicated; the caller may close it. The memory is given back when the last array over it
    dies. tells_residency: whether mincore tells which pages are in memory. Linux tells it to those
    who own a file or may write to it; to others it says that all are. ENGRAPHY_RESIDENCY=off: it is
    not asked. Raises StoreError where the system refuses.
    """

    def __init__(self, fd: int, path: str, size: int, writable: bool = False) -> None:
        self.path, self.size, self._writable = path, size, writable
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._memory = mmap.mmap(
                fd, size, flags=mmap.MAP_SHARED, prot=access
            )  # keeps a duplicate of its own
            self.fd = os.dup(fd) if writable else -1
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: the system refuses to map {size} bytes ({error})") from error
        if writable:
            weakref.finalize(self, os.close, self.fd).atexit = False
        self._memory.madvise(mmap.MADV_RANDOM)
        told = os.fstat(fd).st_uid == os.geteuid() or os.access(path, os.W_OK)
        self.tells_residency = told and switch(RESIDENCY) == "auto"
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._core = _native.core
        if self._core is not None:
            try:
                self._guard = self._core.guard(self._address, size, writable)
            except RuntimeError as error:
                raise StoreError(f"{path}: {error}") from error
            # Runs before the memory is unmapped, which happens when `_memory` goes.
            weakref.finalize(self, self._core.unguard, self._guard).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """uint8 [size]; what numpy needs to keep this object alive as long as an array over it."""
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self._address, not self._writable),
            "version": 3,
        }

    def records(self, offset: int, rows: int, row_bytes: int) -> np.ndarray:
        """uint8 [rows, row_bytes] from byte `offset` on."""
        return np.asarray(self)[offset : offset + rows * row_bytes].reshape(rows, row_bytes)

    def check_size(self) -> None:
        """Raise ShardTruncated unless the file still has the size that was mapped."""
        check_size(self.path, self.size, self._memory.size())

    def check_end(self) -> None:
        """Raise ShardTruncated if its last byte is one of the zeros that a file which is cut in a
        page ends with.

        Where that page is gone, looking is a fault, which `check_memory` tells of.
        """
        if not self._memory[-1]:
            self.check_size()

    def check_memory(self) -> None:
        """Raise ShardTruncated or StoreError if a page of it could not be had."""
        if self._core is not None and self._core.damaged(self._guard):
            self.check_size()
            raise StoreError(
                f"{self.path}: the system could not read a page of it, or had no space for one; what was "
                "read or written since is lost"
            )

    def populate(self) -> str:
        """Bring all of it into memory and the page table. Returns how, in words.

        Raises ShardTruncated or StoreError where the system cannot read the file.
        """
        self._memory.madvise(mmap.MADV_NORMAL)  # with read-ahead
        try:
            for first in range(0, self.size, _POPULATE_STEP):
                self._memory.madvise(_POPULATE_READ, first, min(_POPULATE_STEP, self.size - first))
            return "populated"
        except OSError as error:
            self.check_size()
            if error.errno != errno.EINVAL:
                raise StoreError(
                    f"{self.path}: it cannot be brought into memory ({error})"
                ) from error
            np.asarray(self)[::PAGE].max()
            return "populated by touching each page, since this kernel has no MADV_POPULATE_READ"
        finally:
            self._memory.madvise(mmap.MADV_RANDOM)


class Watch:
    """Asks mapped files whether they are still whole, without keeping them mapped."""

    def __init__(self, files: Sequence[MappedFile]) -> None:
        self._files = [weakref.ref(file) for file in files]
        self._core = _native.core
        self._seen = (
            0 if self._core is None else -1
        )  # faults in this process that were none of these files'
        self._next_look = 0.0

    def before(self) -> None:
        """To be called before memory is read or written. Raises ShardTruncated."""
        if self._core is not None:
            if time.monotonic() < self._next_look:
                return
            self._core.arm_guard()
        for file in self._alive():
            file.check_size()
        self._next_look = time.monotonic() + _LOOK_EVERY

    def after(self) -> None:
        """To be called after memory was read or written. Raises ShardTruncated or StoreError if
        that went wrong."""
        if self._core is None:
            for file in self._alive():
                file.check_size()
            return
        for file in self._alive():
            file.check_end()
        if (faults := self._core.damage_count()) != self._seen:
            for file in self._alive():
                file.check_memory()
            self._seen = faults

    def _alive(self) -> Iterator[MappedFile]:
        return filter(None, (reference() for reference in self._files))


def check_size(path: str, expected: int, found: int) -> None:
    """Raise ShardTruncated unless a file that is being served has its size."""
    if found != expected:
        raise ShardTruncated(
            f"{path}: expected {expected} bytes, found {found}: it was changed while it was served"
        )


class Reserved:
    """Disk space of the pages that are about to be written: a full disk is an error, not a SIGBUS.

    Mapped memory of a sparse file takes space page by page as it is written. Each page is reserved
    once, before its first write. File systems that write to new places (btrfs, ZFS) promise nothing
    by that.
    """

    def __init__(self, files: Sequence[MappedFile]) -> None:
        self._files = files
        self._known = [np.zeros(-(-file.size // PAGE), bool) for file in files]
        for file, known in zip(files, self._known, strict=True):
            known[:] = (
                os.lseek(file.fd, 0, os.SEEK_HOLE) == file.size
            )  # no hole: all of it has its space

    def take(self, number: int, begins_N: np.ndarray, length: int) -> None:
        """Reserve bytes [begin, begin + length) of file `number` for each of `begins_N` (int64 [N],
        not empty).

        Raises StoreError on a full disk, before anything is written.
        """
        file, known = self._files[number], self._known[number]
        first_N, last_N = begins_N // PAGE, (begins_N + length - 1) // PAGE
        steps = np.arange(int((last_N - first_N).max()) + 1)
        pages = np.minimum(first_N[:, None] + steps, last_N[:, None]).reshape(-1)
        new = np.unique(pages[~known[pages]])
        breaks = np.flatnonzero(np.diff(new) > 1)
        firsts, lasts = (
            new[np.r_[0, breaks + 1]] if len(new) else new,
            new[np.r_[breaks, -1]] if len(new) else new,
        )
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            begin, end = first * PAGE, min((last + 1) * PAGE, file.size)
            try:
                os.posix_fallocate(file.fd, begin, end - begin)
            except OSError as error:
                raise StoreError(
                    f"{file.path}: no space for bytes {begin} to {end} ({error})"
                ) from error
            known[first : last + 1] = True
