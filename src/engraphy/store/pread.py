"""One layer of a table on disk, read with pread by blocking threads: for tables larger than memory.

A batch is sorted, so that each row is read once however often its id comes, and rows of the same or
of neighbouring pages come with one read. Reads go to several threads, since a disk gives its best
only with many of them under way. A shard that was truncated is an error at the read that meets it,
never a signal. The plain version here is the specification of the native one (`_native/pread.cpp`):
the same reads, the same rows.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _native
from ..errors import ConfigError, EngraphyError, StoreError
from ..table.shards import HEADER_BYTES
from ..table.table import Table
from .base import RowStore, StoreInfo
from .mapping import check_size

DISK_PAGE = 4096  # bytes: what direct reads are made of, and what a disk gives at the least
_LONGEST_READ = 1 << 17  # bytes, give or take a row: what is longer is work for several threads
_CHUNK = 1 << 24  # bytes of reads that are in memory at a time
_THREAD_ROOM = 160 << 20  # addresses: its stack, what malloc reserves for it, and 32 MiB for others


class PreadStore(RowStore):
    """Rows of `layer` of an open table, read when they are asked for; writable like a `FileStore`.

    threads: reads that are under way at a time, at most. direct: past the page cache, for reading
    alone. close_table: close the table with the store. `stats` counts what the system was asked
    for. Raises ConfigError for a layer that the table does not have, StoreError where the file
    system refuses direct reads, and what `Table.open` raises for damaged shards; reading a shard
    that was truncated since is ShardTruncated.
    """

    def __init__(
        self,
        table: Table,
        layer: int,
        threads: int,
        direct: bool = False,
        close_table: bool = False,
    ) -> None:
        if direct and table.mode == "w":
            raise ConfigError(
                f"{table.path}: expected a table open for reading with direct=1, found it open for "
                "writing"
            )
        super().__init__()
        self.table, self._layer, self._close_table = table, layer, close_table
        self._files: _Files | None = _Files(table, layer, direct)
        self._limit, self._threads = threads, _Threads(threads)
        how = f"pread, {threads} thread{'s' if threads > 1 else ''}{', direct' if direct else ''}"
        self._info = StoreInfo.of_layer("file", table, layer, how)

    @property
    def info(self) -> StoreInfo:
        self._info = self._info.as_of_now(self.table)
        return self._info

    def close(self) -> None:
        super().close()
        self._files = None  # closed when the last reader in another thread is done
        if self._close_table:
            self.table.close()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._threads = _Threads(self._limit)  # the others' threads are not in the child

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        if (files := self._files) is None:
            return self._check_open()
        if len(ids_N):
            if (core := _native.core) is None:
                reads, read_bytes = _read_plain(
                    files, self._threads, ids_N, out_NR, self.table.shard_rows
                )
            else:
                reads, read_bytes = self._read_native(core, files, ids_N, out_NR)
            self._counters.add_reads(reads, read_bytes)

    def _read_native(
        self, core: Any, files: _Files, ids_N: np.ndarray, out_NR: np.ndarray
    ) -> tuple[int, int]:
        if files.reader is None:
            files.reader = files.native_reader(
                core, self.table.shard_rows, out_NR.shape[1], self._limit
            )
        flat_N = np.ascontiguousarray(ids_N)
        reads, read_bytes, number, code = files.reader.read(
            core.address(flat_N), len(flat_N), core.address(out_NR)
        )
        if number >= 0:
            raise files.failed(number, code)
        return reads, read_bytes

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        if (files := self._files) is None:
            return self._check_open()
        touched = np.unique(ids_N // self.table.shard_rows)
        with self.table.writing(self._layer, touched):
            files.check_sizes(touched)  # a write beyond the end would hide that the rest is missing
            _write(files, self._threads, ids_N, rows_NR, self.table.shard_rows)


@dataclass(frozen=True)
class Reads:
    """What to ask the system for: M reads, for U distinct rows, in the order of their ids.

    shard, begin, length: int64 [M], bytes of a file. place: int64 [M], where the bytes of a read
    begin if all lie one after the other. first: int64 [M + 1], the rows that each read brings. at:
    int64 [U], where rows begin likewise.
    """

    shard: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    place: np.ndarray
    first: np.ndarray
    at: np.ndarray


def plan(distinct_U: np.ndarray, shard_rows: int, row_bytes: int, whole_pages: bool) -> Reads:
    """The reads for ascending row ids (U > 0). One ends where the next row begins neither in its
    last page nor in the page after it, and where a window of 128 KiB of the file ends. whole_pages:
    as direct reads need them."""
    shard_U, local_U = np.divmod(distinct_U, shard_rows)
    begin_U = HEADER_BYTES + local_U * row_bytes
    end_U = begin_U + row_bytes
    apart = begin_U[1:] // DISK_PAGE > (end_U[:-1] - 1) // DISK_PAGE + 1
    apart |= (np.diff(shard_U) != 0) | (np.diff(begin_U // _LONGEST_READ) != 0)
    first = np.r_[0, np.flatnonzero(apart) + 1, len(distinct_U)]
    begin_M, end_M = begin_U[first[:-1]], end_U[first[1:] - 1]
    if whole_pages:
        begin_M, end_M = begin_M // DISK_PAGE * DISK_PAGE, -(-end_M // DISK_PAGE) * DISK_PAGE
    length_M = end_M - begin_M
    place_M = np.cumsum(length_M) - length_M
    at_U = begin_U + np.repeat(place_M - begin_M, np.diff(first))
    return Reads(shard_U[first[:-1]], begin_M, length_M, place_M, first, at_U)


def _read_plain(
    files: _Files, threads: _Threads, ids_N: np.ndarray, out_NR: np.ndarray, shard_rows: int
) -> tuple[int, int]:
    """Rows `ids_N` (N > 0) into out_NR. Returns how many reads that took, and their bytes."""
    row_bytes = out_NR.shape[1]
    order_N = np.argsort(ids_N, kind="stable")
    sorted_N = ids_N[order_N]
    new_N = np.r_[True, np.diff(sorted_N) != 0]
    which_N = np.cumsum(new_N) - 1
    reads = plan(sorted_N[new_N], shard_rows, row_bytes, files.direct)
    count, total = len(reads.place), int(reads.place[-1] + reads.length[-1])
    chunks = np.flatnonzero(np.diff(reads.place // _CHUNK)) + 1
    for first, last in itertools.pairwise([0, *chunks.tolist(), count]):
        base, end = int(reads.place[first]), total if last == count else int(reads.place[last])
        scratch = _scratch(end - base)
        _read_all(files, threads, reads, first, last, scratch)
        begin, end = np.searchsorted(which_N, [reads.first[first], reads.first[last]])
        every_row = np.lib.stride_tricks.as_strided(
            scratch, (len(scratch) - row_bytes + 1, row_bytes), (1, 1)
        )
        out_NR[order_N[begin:end]] = every_row[reads.at[which_N[begin:end]] - base]
    return count, total


def _scratch(size: int) -> np.ndarray:
    """uint8 [size] in whole pages of its own, for direct reads."""
    try:
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)
    except OSError as error:
        raise StoreError(
            f"rows cannot be read: the system has no {size} bytes of memory to read into ({error})"
        ) from error


def _read_all(
    files: _Files, threads: _Threads, reads: Reads, first: int, last: int, scratch: np.ndarray
) -> None:
    """Reads first..last-1, one after the other in `scratch`."""
    view, places = scratch.data, (reads.place[first:last] - reads.place[first]).tolist()
    numbers, begins, lengths = (
        values[first:last].tolist() for values in (reads.shard, reads.begin, reads.length)
    )
    threads.each(
        lambda i: files.read(numbers[i], begins[i], lengths[i], view[places[i] :]),
        range(last - first),
    )


def _write(
    files: _Files, threads: _Threads, ids_N: np.ndarray, rows_NR: np.ndarray, shard_rows: int
) -> None:
    """Write rows, of an id given twice the last one: runs of following rows with one write."""
    order_N = np.argsort(ids_N, kind="stable")
    last = np.flatnonzero(np.diff(ids_N[order_N], append=-1))
    order_U = order_N[last]
    ids_U, rows_UR = ids_N[order_U], rows_NR[order_U]
    number_U, local_U = np.divmod(ids_U, shard_rows)
    bounds = [
        0,
        *(np.flatnonzero((np.diff(ids_U) != 1) | (np.diff(number_U) != 0)) + 1).tolist(),
        len(ids_U),
    ]
    row_bytes = rows_NR.shape[1]

    def write(run: tuple[int, int]) -> None:
        first, end = run
        files.write(
            int(number_U[first]),
            HEADER_BYTES + int(local_U[first]) * row_bytes,
            rows_UR[first:end].reshape(-1).data,
        )

    if len(ids_U):
        threads.each(write, list(itertools.pairwise(bounds)))


class _Threads:
    """At most `limit` threads for blocking calls, that of the caller and others, which are started
    when they are needed, and fewer if the system starts no more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool: ThreadPoolExecutor | None = None

    def each(self, call: Callable[[Any], None], items: Sequence[Any]) -> None:
        """call(item) for each item; raises an error of theirs when all have ended."""
        size = -(-len(items) // (4 * self._limit))
        batches = deque(items[first : first + size] for first in range(0, len(items), size))

        def work() -> None:
            while True:
                try:
                    batch = batches.popleft()
                except IndexError:  # all are taken
                    return
                for item in batch:
                    call(item)

        others = self._start(work, min(self._limit, len(batches)) - 1)
        try:
            work()
        finally:
            running = [other for other in others if not other.cancel()]
            wait(running)
            batches.clear()  # after an error
        for other in running:
            other.result()

    def _start(self, work: Callable[[], None], count: int) -> list[Future[None]]:
        """work() in up to `count` other threads."""
        if count > 0 and self._pool is None:
            self._pool = ThreadPoolExecutor(self._limit, "engraphy-pread")
        started: list[Future[None]] = []
        while len(started) < count and _has_room():
            assert self._pool is not None  # for pyright
            try:
                started.append(self._pool.submit(work))
            except (
                RuntimeError
            ):  # no more threads; what was queued with it finds nothing left to do
                break
        return started


def _has_room() -> bool:
    """Whether there are addresses for one more thread, and for what else the process does."""
    try:
        mmap.mmap(
            -1, _THREAD_ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ
        ).close()
        return True
    except OSError:
        return False


class _Files:
    """Open shards, closed when the last reader lets go of them: a number that is free may come to
    name another file."""

    def __init__(self, table: Table, layer: int, direct: bool) -> None:
        self.direct = direct
        self.reader: Any = None  # of the native part, once it is used
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
        """Reads these files, while they are open."""
        return core.RowReader(
            self._fds, self._sizes, shard_rows, row_bytes, HEADER_BYTES, threads, self.direct
        )

    def read(self, number: int, begin: int, length: int, into: memoryview) -> None:
        """Bytes of file `number`; the file may end before `length` where whole pages are read."""
        wanted, done = min(length, self._sizes[number] - begin), 0
        while done < wanted:
            try:
                found = os.preadv(self._fds[number], [into[done:length]], begin + done)
            except OSError as error:
                raise self.failed(number, error.errno) from error
            if not found:
                raise self.failed(number, 0)
            done += found

    def write(self, number: int, begin: int, data: memoryview) -> None:
        """Write bytes to file `number`."""
        while data:
            try:
                written = os.pwrite(self._fds[number], data, begin)
            except OSError as error:
                raise StoreError(
                    f"{self._paths[number]}: rows cannot be written ({error})"
                ) from error
            data, begin = data[written:], begin + written

    def check_sizes(self, numbers: Iterable[int]) -> None:
        """Raise ShardTruncated unless these files still have their sizes."""
        for number in numbers:
            check_size(
                self._paths[number], self._sizes[number], os.fstat(self._fds[number]).st_size
            )

    def failed(self, number: int, code: int | None) -> EngraphyError:
        """What to raise for a read of file `number` that gave an errno, or nothing (0)."""
        try:
            self.check_sizes([number])
        except EngraphyError as truncated:
            return truncated
        if code == errno.EINVAL and self.direct:
            return StoreError(
                f"{self._paths[number]}: the file system refuses direct reads; open it with direct=0"
            )
        return StoreError(
            f"{self._paths[number]}: rows cannot be read "
            f"({os.strerror(code) if code else 'the file ends before its size'})"
        )

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
