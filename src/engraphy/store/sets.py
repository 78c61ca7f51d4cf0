"""The rows that a cache keeps, in sets of 16 with an eviction policy for each set.

This file has the plain version and the native calls. A row's set follows from its id. Each set
evicts by S3-FIFO (Yang et al., SOSP 2023) on its own:

- A new row waits in a small queue, which has at least 4 places.
- A row that was read while it waited there moves on to the main queue.
- 12 ghosts are fingerprints of rows that left the small queue unread. A row that comes back and
  has a ghost joins the main queue at once.

bench/cache_policy.py compares this policy with others.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from .ram import zeros

WAYS = 16  # rows of a set
SMALL = 4
GHOSTS = 12
_MOST_READS = 3  # the count of a row's reads stops here
_EMPTY = 0
_MAIN = 16  # added to the order of rows in the main queue

# The record of a set, two cache lines:
#   version     changes whenever rows of the set change, and is odd meanwhile
#   ghost_next  the ghost that is replaced next
#   taken       rows that the running `keep` puts into the set; 16 while its rows are written
#   order       0 to 15: a lower number has waited longer in its queue; plus 16 in the main queue
#   reads       reads of each row since it joined its queue
#   ghosts      fingerprints; 0 = none
#   tags        row id + 1; 0 = none, negative = held, while the row is written
# The rows of the set follow at once, so that a row and its record mostly lie in one page.
SET = np.dtype(
    [
        ("version", "<u4"),
        ("ghost_next", "u1"),
        ("taken", "u1"),
        ("_", "u1", 2),
        ("order", "u1", WAYS),
        ("reads", "u1", WAYS),
        ("ghosts", "<u2", GHOSTS),
        ("tags", "<i4", WAYS),
    ]
)
MOST_ROWS = 2**31 - 2  # of a store behind a cache, so that ids fit into the tags
_LINE = 64


def set_bytes(row_bytes: int) -> int:
    """Bytes of a set: its record and 16 rows, in whole cache lines."""
    return -(-(SET.itemsize + WAYS * row_bytes) // _LINE) * _LINE


class Sets:
    """Sets of 16 rows. The methods are the plain version, the specification of the native one.

    Many threads may use them at once. A thread that changes rows holds `lock`. The native `look`
    takes no lock: it compares `version` before and after. It also adds to `reads`, which may miss
    a count, since it is only a hint for evictions.

    Attributes:
        memory: uint8 [count, set_bytes(row_bytes)]; the system provides pages at their first use.
        records: SET [count], a view of the memory.
        rows: uint8 [count, 16, row_bytes], a view of the memory.
    """

    def __init__(self, count: int, row_bytes: int) -> None:
        self.lock = threading.Lock()
        self.memory = zeros(count, set_bytes(row_bytes))
        self.records = self.memory[:, : SET.itemsize].view(SET)[:, 0]
        rows = self.memory[:, SET.itemsize : SET.itemsize + WAYS * row_bytes]
        strides = (rows.strides[0], row_bytes, 1)
        self.rows = np.lib.stride_tricks.as_strided(rows, (count, WAYS, row_bytes), strides)

    def kept(self) -> np.ndarray:
        """Ids of the rows, int64 [N]: main queues before small ones, then most read first."""
        with self.lock:
            set_N, way_N = np.nonzero(self.records["tags"] > _EMPTY)
            is_main_N = self.records["order"][set_N, way_N] // _MAIN
            worth_N = is_main_N * WAYS + self.records["reads"][set_N, way_N]
            tag_N = self.records["tags"][set_N, way_N].astype(np.int64)
            best_first_N = np.argsort(-worth_N.astype(np.int64), kind="stable")
            return tag_N[best_first_N] - 1

    def look(self, ids_N: np.ndarray, out_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies the cached rows to their places in out_NR.

        Returns:
            The positions of the missing rows, int64 [M], ascending; and the versions of their sets,
            int64 [M], which tell `keep` whether a set has changed since.
        """
        set_N = place(ids_N, len(self.records)).set_N
        with self.lock:
            hit_N, slot_N = self._find(ids_N, set_N, held=False)
            out_NR[hit_N] = self.rows[np.divmod(slot_N[hit_N], WAYS)]
            slot_H, reads_H = np.unique(slot_N[hit_N], return_counts=True)
            set_H, way_H = np.divmod(slot_H, WAYS)
            reads = self.records["reads"]
            reads[set_H, way_H] = np.minimum(reads[set_H, way_H] + reads_H, _MOST_READS)
            missing_M = np.flatnonzero(~hit_N)
            return missing_M, self.records["version"][set_N[missing_M]].astype(np.int64)

    def keep(
        self, ids_M: np.ndarray, version_M: np.ndarray, reads_M: np.ndarray, rows_MR: np.ndarray
    ) -> None:
        """Inserts rows that a `look` missed, in order, at most the first 16 of each set.

        Skips rows of a set that has changed since the `look`: they may be outdated or already
        cached. Also skips rows of a set that is being written.

        Args:
            ids_M: int64 [M], distinct ids.
            version_M: int64 [M], versions of their sets, from `look`.
            reads_M: int64 [M], how often each row was requested.
            rows_MR: uint8 [M, row_bytes], the rows.
        """
        here = place(ids_M, len(self.records))
        with self.lock:
            same_M = self.records["version"][here.set_N] == version_M
            is_free_M = self.records["taken"][here.set_N] == 0
            index = np.flatnonzero(same_M & is_free_M)
            index = index[np.argsort(here.set_N[index], kind="stable")]
            set_n = here.set_N[index]
            turn_n = np.arange(len(index)) - np.searchsorted(set_n, set_n)
            for turn in range(min(WAYS, int(turn_n.max(initial=-1)) + 1)):
                now = index[turn_n == turn]
                self._insert(ids_M[now], here.take(now), reads_M[now], rows_MR[now])

    def hold(self, ids_N: np.ndarray) -> None:
        """Holds rows that are going to be written, until `write`.

        Meanwhile `look` misses these rows, and `keep` adds no row to their sets. So a reader that
        has seen the new row never sees the old one in a later call, no matter whether the store or
        the cache is written first.
        """
        set_N = place(ids_N, len(self.records)).set_N
        with self.lock:
            self.records["version"][set_N] += 2
            self.records["taken"][set_N] = WAYS
            hit_N, slot_N = self._find(ids_N, set_N)
            self.records["tags"][np.divmod(slot_N[hit_N], WAYS)] = -(ids_N[hit_N] + 1)

    def write(self, ids_N: np.ndarray, rows_NR: np.ndarray | None) -> None:
        """Ends a `hold` after the store was written: cached rows get their new bytes.

        Args:
            ids_N: int64 [N], the ids that `hold` got. If an id occurs twice, its last row counts.
            rows_NR: uint8 [N, row_bytes], the new rows. None if the write failed: the store may
                have been written in part, so the rows are dropped.
        """
        set_N = place(ids_N, len(self.records)).set_N
        with self.lock:
            self.records["version"][set_N] += 2  # so `keep` skips rows that are being read now
            self.records["taken"][set_N] = 0
            hit_N, slot_N = self._find(ids_N, set_N)
            places = np.divmod(slot_N[hit_N], WAYS)
            if rows_NR is None:
                self.records["tags"][places] = _EMPTY
            else:
                self.records["tags"][places] = ids_N[hit_N] + 1
                self.rows[places] = rows_NR[hit_N]

    def _find(
        self, ids_N: np.ndarray, set_N: np.ndarray, held: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Whether each row is cached, bool [N], and its slot, set * 16 + way, int64 [N].

        held: also find rows that are held.
        """
        tags_NW = self.records["tags"][set_N]
        if held:
            tags_NW = np.abs(tags_NW)
        same_NW = tags_NW == (ids_N + 1)[:, None]
        return same_NW.any(axis=1), set_N * WAYS + same_NW.argmax(axis=1)

    def _insert(
        self, ids_N: np.ndarray, here: _Place, reads_N: np.ndarray, rows_NR: np.ndarray
    ) -> None:
        """Inserts rows of distinct sets: in the main queue if they have a ghost, else the small."""
        records = self.records
        set_N = here.set_N
        records["version"][set_N] += 2
        same_NG = records["ghosts"][set_N] == here.print_N[:, None]
        known_N = same_NG.any(axis=1)
        records["ghosts"][set_N[known_N], same_NG[known_N].argmax(axis=1)] = _EMPTY
        way_N = self._free_way(set_N)
        records["tags"][set_N, way_N] = ids_N + 1
        records["reads"][set_N, way_N] = np.minimum(reads_N - 1, _MOST_READS)
        self.rows[set_N, way_N] = rows_NR
        self._to_the_end(set_N, _only(way_N))
        order_N = records["order"][set_N, way_N] % WAYS
        records["order"][set_N, way_N] = order_N + known_N * _MAIN

    def _free_way(self, set_N: np.ndarray) -> np.ndarray:
        """A way of each set that is free, int64 [N]; evicts a row if the set is full."""
        records = self.records
        free_NW = records["tags"][set_N] == _EMPTY
        way_N = free_NW.argmax(axis=1)
        full_n = np.flatnonzero(~free_NW.any(axis=1))
        while len(full_n):
            set_n = set_N[full_n]
            order_nW = records["order"][set_n]
            small_nW = order_nW < _MAIN
            oldest_n = np.where(small_nW, order_nW, 255).argmin(axis=1)
            from_main_n = small_nW.sum(axis=1) < SMALL
            was_read_n = records["reads"][set_n, oldest_n] > 0
            promoted_n = ~from_main_n & was_read_n
            evicted_n = ~from_main_n & ~was_read_n
            self._promote(set_n[promoted_n], oldest_n[promoted_n])
            self._leave_ghost(set_n[evicted_n], oldest_n[evicted_n])
            way_N[full_n[evicted_n]] = oldest_n[evicted_n]
            way_N[full_n[from_main_n]] = self._least_read(set_n[from_main_n])
            full_n = full_n[promoted_n]  # a promotion frees no way
        return way_N

    def _promote(self, set_N: np.ndarray, way_N: np.ndarray) -> None:
        """Moves rows from the small queue to the end of the main one."""
        self._to_the_end(set_N, _only(way_N))
        self.records["order"][set_N, way_N] += _MAIN
        self.records["reads"][set_N, way_N] = 0

    def _leave_ghost(self, set_N: np.ndarray, way_N: np.ndarray) -> None:
        """Keeps the fingerprints of rows that are about to be evicted."""
        records = self.records
        next_N = records["ghost_next"][set_N]
        ids_N = records["tags"][set_N, way_N] - 1
        records["ghosts"][set_N, next_N] = place(ids_N, len(records)).print_N
        records["ghost_next"][set_N] = (next_N + 1) % GHOSTS

    def _least_read(self, set_N: np.ndarray) -> np.ndarray:
        """The way that leaves the main queue of each set, int64 [N].

        In S3-FIFO the oldest row leaves if it has no reads left. Otherwise it moves to the end with
        one read less, and the next row is tried. This computes the result of all steps at once.
        """
        records = self.records
        order_NW = records["order"][set_N]
        reads_NW = records["reads"][set_N].astype(np.int64)
        main_NW = order_NW >= _MAIN
        least_N1 = np.where(main_NW, reads_NW, 255).min(axis=1, keepdims=True, initial=255)
        way_N = np.where(main_NW & (reads_NW == least_N1), order_NW, 255).argmin(axis=1)
        passed_NW = main_NW & (order_NW < np.take_along_axis(order_NW, way_N[:, None], axis=1))
        left_NW = reads_NW - least_N1 - passed_NW
        records["reads"][set_N] = np.where(main_NW, left_NW, reads_NW)
        self._to_the_end(set_N, passed_NW)
        return way_N

    def _to_the_end(self, set_N: np.ndarray, moved_NW: np.ndarray) -> None:
        """Moves some rows of each set to the end of their queues; they keep their order."""
        order_NW = self.records["order"][set_N]
        by_age_NW = np.argsort(order_NW % WAYS + moved_NW * WAYS, axis=1, kind="stable")
        self.records["order"][set_N] = np.argsort(by_age_NW, axis=1) + order_NW // _MAIN * _MAIN


class NativeSets(Sets):
    """`Sets` with native kernels. A reader waits only for a thread that is changing its set.

    Attributes:
        changes: uint64 [1], a version of all sets together, odd while a call changes some. If a
            reader finds it unchanged, it need not compare the version of each set.
    """

    def __init__(self, core: Any, count: int, row_bytes: int) -> None:
        super().__init__(count, row_bytes)
        self._core = core
        # The middle of two cache lines, so that no other data shares its line.
        self.changes = np.zeros(2 * _LINE // 8, np.uint64)[7:8]
        self._place = (core.address(self.memory), core.address(self.changes), count, row_bytes)

    def look(self, ids_N: np.ndarray, out_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = self._core.address
        ids_N = np.ascontiguousarray(ids_N)
        missing_2N = np.empty((2, len(ids_N)), np.int64)
        count = self._core.cache_look(
            *self._place, at(ids_N), len(ids_N), at(out_NR), at(missing_2N)
        )
        return missing_2N[0, :count], missing_2N[1, :count]

    def keep(
        self, ids_M: np.ndarray, version_M: np.ndarray, reads_M: np.ndarray, rows_MR: np.ndarray
    ) -> None:
        at = self._core.address
        with self.lock:
            self._core.cache_keep(
                *self._place, at(ids_M), at(version_M), at(reads_M), at(rows_MR), len(ids_M)
            )

    def hold(self, ids_N: np.ndarray) -> None:
        ids_N = np.ascontiguousarray(ids_N)
        with self.lock:
            self._core.cache_hold(*self._place, self._core.address(ids_N), len(ids_N))

    def write(self, ids_N: np.ndarray, rows_NR: np.ndarray | None) -> None:
        ids_N = np.ascontiguousarray(ids_N)
        rows = 0  # no address
        if rows_NR is not None:
            rows_NR = np.ascontiguousarray(rows_NR)
            rows = self._core.address(rows_NR)
        with self.lock:
            self._core.cache_write(*self._place, self._core.address(ids_N), rows, len(ids_N))


class _Place(NamedTuple):
    """The sets of some rows, int64 [N], and their fingerprints as ghosts, uint16 [N], never 0."""

    set_N: np.ndarray
    print_N: np.ndarray

    def take(self, index: np.ndarray) -> _Place:
        return _Place(self.set_N[index], self.print_N[index])


def place(ids_N: np.ndarray, sets: int) -> _Place:
    """The sets and fingerprints of rows in a cache of `sets` sets."""
    mixed_N = ids_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed_N = (mixed_N ^ mixed_N >> 32) * np.uint64(0xD6E8FEB86659FD93)
    set_N = ((mixed_N >> 32) * np.uint64(sets) >> 32).astype(np.int64)
    return _Place(set_N, np.maximum(mixed_N.astype(np.uint16), 1))


def _only(way_N: np.ndarray) -> np.ndarray:
    """bool [N, 16]: True for one way of each set."""
    return way_N[:, None] == np.arange(WAYS)
