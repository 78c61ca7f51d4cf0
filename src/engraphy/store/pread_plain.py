"""Reading and writing rows of files in plain Python: the specification of `_native/pread.cpp`."""

from __future__ import annotations

import itertools
import mmap
from dataclasses import dataclass

import numpy as np

from ..errors import StoreError
from ..table.shards import HEADER_BYTES
from .pread_files import OpenFiles
from .threads import Threads

DISK_PAGE = 4096  # bytes: what direct reads consist of, and the least that a disk gives
_LONGEST_READ = 1 << 17  # bytes, give or take a row: longer runs are work for several threads
_CHUNK = 1 << 24  # bytes of reads that are in memory at a time


@dataclass(frozen=True)
class Reads:
    """M reads to ask the system for. They bring U distinct rows, in the order of their ids.

    Attributes:
        shard: int64 [M], the file of each read.
        begin: int64 [M], where it begins in the file.
        length: int64 [M], its bytes.
        place: int64 [M], where its bytes begin if those of all reads lie one after the other.
        first: int64 [M + 1], the first row that each read brings; the last entry is U.
        at: int64 [U], where each row begins if the bytes of all reads lie one after the other.
    """

    shard: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    place: np.ndarray
    first: np.ndarray
    at: np.ndarray


def plan(distinct_U: np.ndarray, shard_rows: int, row_bytes: int, whole_pages: bool) -> Reads:
    """Plans the reads for some rows.

    A read ends if the next row begins neither in its last page nor in the page after that, and at
    the end of a window of 128 KiB of the file.

    Args:
        distinct_U: int64 [U], U > 0, ascending row ids.
        shard_rows: rows of every file but the last.
        row_bytes: bytes of a row.
        whole_pages: read whole pages, as direct reads need them.
    """
    shard_U, local_U = np.divmod(distinct_U, shard_rows)
    begin_U = HEADER_BYTES + local_U * row_bytes
    end_U = begin_U + row_bytes
    apart = begin_U[1:] // DISK_PAGE > (end_U[:-1] - 1) // DISK_PAGE + 1
    apart |= np.diff(shard_U) != 0
    apart |= np.diff(begin_U // _LONGEST_READ) != 0
    first = np.r_[0, np.flatnonzero(apart) + 1, len(distinct_U)]
    begin_M = begin_U[first[:-1]]
    end_M = end_U[first[1:] - 1]
    if whole_pages:
        begin_M = begin_M // DISK_PAGE * DISK_PAGE
        end_M = -(-end_M // DISK_PAGE) * DISK_PAGE
    length_M = end_M - begin_M
    place_M = np.cumsum(length_M) - length_M
    at_U = begin_U + np.repeat(place_M - begin_M, np.diff(first))
    return Reads(shard_U[first[:-1]], begin_M, length_M, place_M, first, at_U)


def read_plain(
    files: OpenFiles, threads: Threads, ids_N: np.ndarray, out_NR: np.ndarray, shard_rows: int
) -> tuple[int, int]:
    """Reads rows `ids_N` (N > 0) into out_NR. Returns the number of reads, and their bytes."""
    row_bytes = out_NR.shape[1]
    order_N = np.argsort(ids_N, kind="stable")
    sorted_N = ids_N[order_N]
    is_new_N = np.r_[True, np.diff(sorted_N) != 0]
    which_N = np.cumsum(is_new_N) - 1  # in the distinct rows
    reads = plan(sorted_N[is_new_N], shard_rows, row_bytes, files.direct)
    count = len(reads.place)
    total = int(reads.place[-1] + reads.length[-1])
    places = [*reads.place.tolist(), total]
    chunks = np.flatnonzero(np.diff(reads.place // _CHUNK)) + 1
    for first, last in itertools.pairwise([0, *chunks.tolist(), count]):
        base = places[first]
        scratch = _scratch(places[last] - base)
        _read_all(files, threads, reads, first, last, scratch)
        begin, end = np.searchsorted(which_N, [reads.first[first], reads.first[last]])
        row_at = np.lib.stride_tricks.as_strided(
            scratch, (len(scratch) - row_bytes + 1, row_bytes), (1, 1)
        )
        out_NR[order_N[begin:end]] = row_at[reads.at[which_N[begin:end]] - base]
    return count, total


def write_rows(
    files: OpenFiles, threads: Threads, ids_N: np.ndarray, rows_NR: np.ndarray, shard_rows: int
) -> None:
    """Writes rows; if an id occurs twice, its last row. One write for each run of rows."""
    if not len(ids_N):
        return
    order_N = np.argsort(ids_N, kind="stable")
    is_last = np.flatnonzero(np.diff(ids_N[order_N], append=-1))
    order_U = order_N[is_last]
    ids_U = ids_N[order_U]
    rows_UR = rows_NR[order_U]
    number_U, local_U = np.divmod(ids_U, shard_rows)
    is_break = (np.diff(ids_U) != 1) | (np.diff(number_U) != 0)
    bounds = [0, *(np.flatnonzero(is_break) + 1).tolist(), len(ids_U)]
    row_bytes = rows_NR.shape[1]

    def write(run: tuple[int, int]) -> None:
        first, end = run
        begin = HEADER_BYTES + int(local_U[first]) * row_bytes
        files.write(int(number_U[first]), begin, rows_UR[first:end].reshape(-1).data)

    threads.each(write, list(itertools.pairwise(bounds)))


def _read_all(
    files: OpenFiles, threads: Threads, reads: Reads, first: int, last: int, scratch: np.ndarray
) -> None:
    """Does the reads first..last-1; their bytes lie one after the other in `scratch`."""
    view = scratch.data
    places = (reads.place[first:last] - reads.place[first]).tolist()
    numbers = reads.shard[first:last].tolist()
    begins = reads.begin[first:last].tolist()
    lengths = reads.length[first:last].tolist()

    def read(i: int) -> None:
        files.read(numbers[i], begins[i], lengths[i], view[places[i] :])

    threads.each(read, range(last - first))


def _scratch(size: int) -> np.ndarray:
    """uint8 [size] in whole pages of its own, for direct reads."""
    try:
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)
    except OSError as error:
        raise StoreError(
            f"rows cannot be read: the system has no {size} bytes of memory to read into ({error})"
        ) from error
