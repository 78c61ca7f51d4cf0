"""Mapped files, and checks that their memory still holds what the files held.

Touching a page that a truncated file no longer has, or that the disk cannot read, raises SIGBUS,
which ends the process. The rest of the page in which a shortened file now ends reads as zeros.

The native core catches and notes such a fault, and the memory reads as zeros from then on
(`_native/guard.cpp`). After each read a `Watch` reads the last byte of each file, by one native
call, and then asks for faults. No matter where a file was cut, that byte is gone (a fault) or zero;
if it is zero, the `Watch` checks the file's size. Every 50 ms it also checks the sizes of all
files. The native call that reads the rows of a token looks by itself, at the last bytes of just the
files that it has read from.

Without the native core it compares the sizes before and after each read. A file that is truncated
between the first comparison and the read still ends the process.

Renaming another file over a mapped one does no damage: the old file stays mapped until the store
is closed.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import _native  # pyright: ignore[reportPrivateUsage]
from ..errors import ShardTruncated, StoreError
from ..system.environment import RESIDENCY, switch

PAGE = mmap.PAGESIZE
_POPULATE_READ = getattr(mmap, "MADV_POPULATE_READ", 22)
_POPULATE_STEP = 1 << 26  # bytes; the GIL is held during one step
_LOOK_EVERY = 0.05  # seconds


class MappedFile:
    """The first bytes of an open file as memory, shared with other processes, without read-ahead.

    The memory is unmapped when the last array over it dies.

    Args:
        fd: the open file. It is duplicated; the caller may close it.
        path: the file's path, for messages.
        size: how many bytes to map.
        writable: whether the memory can be written.

    Attributes:
        tells_residency: whether mincore() reports which pages are in memory. Linux reports that
            only to processes that own the file or may write to it; to others it reports that all
            pages are. Always False with ENGRAPHY_RESIDENCY=off.

    Raises:
        StoreError: if the system refuses.
    """

    def __init__(self, fd: int, path: str, size: int, writable: bool = False) -> None:
        self.path = path
        self.size = size
        self._writable = writable
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            # mmap keeps its own duplicate of the descriptor.
            self._memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=access)
            self.fd = os.dup(fd) if writable else -1
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: the system refuses to map {size} bytes ({error})") from error
        if writable:
            weakref.finalize(self, os.close, self.fd).atexit = False
        self._memory.madvise(mmap.MADV_RANDOM)
        is_ours = os.fstat(fd).st_uid == os.geteuid() or os.access(path, os.W_OK)
        self.tells_residency = is_ours and switch(RESIDENCY) == "auto"
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._core = _native.core
        if self._core is not None:
            try:
                self._guard = self._core.guard(self._address, size, writable)
            except RuntimeError as error:
                raise StoreError(f"{path}: {error}") from error
            # Runs before the memory is unmapped, which happens when `_memory` is dropped.
            weakref.finalize(self, self._core.unguard, self._guard).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """uint8 [size]. numpy keeps this object alive as long as an array over it."""
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self._address, not self._writable),
            "version": 3,
        }

    def records(self, offset: int, rows: int, row_bytes: int) -> np.ndarray:
        """uint8 [rows, row_bytes] from byte `offset` on."""
        return np.asarray(self)[offset : offset + rows * row_bytes].reshape(rows, row_bytes)

    @property
    def slot(self) -> int:
        """The slot of the native guard."""
        return self._guard

    @property
    def last_byte(self) -> int:
        """The address of the last byte."""
        return self._address + self.size - 1

    def check_size(self) -> None:
        """Raises ShardTruncated unless the file still has the size that was mapped."""
        check_size(self.path, self.size, self._memory.size())

    def check_end(self) -> None:
        """Raises ShardTruncated if the file was cut within its last page.

        The memory of such a file ends with zeros, so the file's size is checked only if the last
        byte is zero. If the page of the last byte is gone, reading it is a fault, which
        `check_memory` reports.
        """
        if not self._memory[-1]:
            self.check_size()

    def check_memory(self) -> None:
        """Raises ShardTruncated or StoreError if the system could not provide one of its pages."""
        if self._core is not None and self._core.damaged(self._guard):
            self.check_size()
            raise StoreError(
                f"{self.path}: the system could not read a page of it, or had no space for one; "
                "reads and writes since then are lost"
            )

    def populate(self, begin: int = 0, end: int | None = None) -> str:
        """Brings the file, or its bytes from `begin` to `end`, into memory and the page table.

        Args:
            begin: a multiple of a page.
            end: None for the end of the file.

        Returns:
            How it was done, in words.

        Raises:
            ShardTruncated: if the file was truncated.
            StoreError: if the system cannot read the file.
        """
        end = self.size if end is None else end
        self._memory.madvise(mmap.MADV_NORMAL)  # with read-ahead
        try:
            for first in range(begin, end, _POPULATE_STEP):
                step = min(_POPULATE_STEP, end - first)
                self._memory.madvise(_POPULATE_READ, first, step)
            return "populated"
        except OSError as error:
            self.check_size()
            if error.errno != errno.EINVAL:
                raise StoreError(
                    f"{self.path}: it cannot be brought into memory ({error})"
                ) from error
            np.asarray(self)[begin:end:PAGE].max()
            return "populated by touching each page, since this kernel has no MADV_POPULATE_READ"
        finally:
            self._memory.madvise(mmap.MADV_RANDOM)


class Watch:
    """Checks that mapped files are still whole, without keeping them mapped.

    Args:
        files: the files.
        look: what else is checked whenever their sizes are; None for nothing.
    """

    def __init__(self, files: Sequence[MappedFile], look: Callable[[], None] | None = None) -> None:
        self._look = look
        self._files = [weakref.ref(file) for file in files]
        self._core = _native.core
        self._next_look = 0.0
        # Number of faults in this process that were found to be in other files; -1 = not asked yet.
        self._seen = -1
        if self._core is not None:
            slots = [file.slot for file in files]
            self._ends = self._core.FileEnds(slots, [file.last_byte for file in files])

    def before(self) -> None:
        """Call this before memory is read or written. Raises ShardTruncated."""
        if self._core is not None:
            if time.monotonic() < self._next_look:
                return
            self._core.arm_guard()
        for file in self._alive():
            file.check_size()
        if self._look is not None:
            self._look()
        self._next_look = time.monotonic() + _LOOK_EVERY

    def after(self) -> None:
        """Call this after memory was read or written.

        Raises:
            ShardTruncated: if a file was truncated meanwhile.
            StoreError: if the system could not provide a page.
        """
        if self._core is None:
            for file in self._alive():
                file.check_size()
            return
        if self._ends.whole(self._seen):
            return
        for file in self._alive():
            file.check_end()
        faults = self._core.damage_count()
        for file in self._alive():
            file.check_memory()
        self._seen = faults

    def _alive(self) -> Iterator[MappedFile]:
        return filter(None, (reference() for reference in self._files))


def ends_of(shards: Sequence[np.ndarray]) -> list[int]:
    """The addresses of the last bytes of the files behind mapped shards.

    Empty unless each shard is memory of a MappedFile.
    """
    ends: list[int] = []
    for shard in shards:
        base: Any = shard
        while isinstance(base, np.ndarray):
            base = base.base
        if not isinstance(base, MappedFile):
            return []
        ends.append(base.last_byte)
    return ends


def check_size(path: str, expected: int, found: int) -> None:
    """Raises ShardTruncated unless a file that is being served still has its size."""
    if found != expected:
        raise ShardTruncated(
            f"{path}: expected {expected} bytes, found {found}: it was changed while it was served"
        )


class Reserved:
    """Disk space of pages that are about to be written: a full disk is an error, not a SIGBUS.

    A mapped sparse file takes disk space page by page as it is written. Each page is reserved once,
    before its first write. On copy-on-write file systems (btrfs, ZFS) this is no guarantee.

    Args:
        files: the mapped files.
        written: how many bytes at the beginning of each file already have disk space.
    """

    def __init__(self, files: Sequence[MappedFile], written: int) -> None:
        self._files = files
        # bool [pages] for each file: whether the page has disk space. Without holes all pages do.
        self._known = [np.full(-(-file.size // PAGE), not _has_holes(file)) for file in files]
        for known in self._known:
            known[: written // PAGE] = True
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether all pages of all files have disk space."""
        if not self._is_complete:
            self._is_complete = all(bool(known.all()) for known in self._known)
        return self._is_complete

    def take(self, number: int, begins_N: np.ndarray, length: int) -> None:
        """Reserves bytes [begin, begin + length) of a file for each of `begins_N`.

        Args:
            number: which file, from 0.
            begins_N: int64 [N], N > 0, positions in the file.
            length: bytes from each position on.

        Raises:
            StoreError: if the disk is full; nothing has been written then.
        """
        file = self._files[number]
        known = self._known[number]
        for first, last in _runs(_missing_pages(known, begins_N, length)):
            begin = first * PAGE
            end = min((last + 1) * PAGE, file.size)
            try:
                os.posix_fallocate(file.fd, begin, end - begin)
            except OSError as error:
                raise StoreError(
                    f"{file.path}: no space for bytes {begin} to {end} ({error})"
                ) from error
            known[first : last + 1] = True


def _has_holes(file: MappedFile) -> bool:
    return os.lseek(file.fd, 0, os.SEEK_HOLE) != file.size


def _missing_pages(known: np.ndarray, begins_N: np.ndarray, length: int) -> np.ndarray:
    """int64 [pages]: distinct pages of these bytes that have no disk space yet, ascending."""
    first_N = begins_N // PAGE
    last_N = (begins_N + length - 1) // PAGE
    steps_S = np.arange(int((last_N - first_N).max()) + 1)
    pages_NS = np.minimum(first_N[:, None] + steps_S, last_N[:, None])
    pages = pages_NS.reshape(-1)
    return np.unique(pages[~known[pages]])


def _runs(pages: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last page of each run of consecutive pages."""
    if not len(pages):
        return
    breaks = np.flatnonzero(np.diff(pages) > 1)
    firsts = pages[np.r_[0, breaks + 1]].tolist()
    lasts = pages[np.r_[breaks, -1]].tolist()
    yield from zip(firsts, lasts, strict=True)
