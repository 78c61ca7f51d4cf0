"""The rows that a cache keeps, in sets of 16, each with a policy of its own: the plain version and
the native calls.

A row's set follows from its id. Each set keeps S3-FIFO (Yang et al., SOSP 2023) for itself: what is
new waits in a small queue, at least 4 long, what was read there joins the main queue, and 12
ghosts, fingerprints of rows that left unread, let those that come back join it too.
bench/cache_policy.py says why this and not another.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from .ram import zeros

WAYS, SMALL, GHOSTS = 16, 4, 12
_MOST_READS = 3  # as far as reads of a row are counted
_EMPTY = 0
_MAIN = 16  # added to the order of what is in the main queue

# version: changes whenever rows of the set do, odd meanwhile. ghost_next: the ghost that is
# forgotten next. taken: rows that the call under way keeps here, 16 while rows of the set are being
# written. order: 0 to 15, in which rows came to the end of their queue. reads: of each row since
# then. ghosts, tags: 0 = none. tags: row id + 1, negative: held. Two cache lines. The rows follow
# at once, so that a row and what is noted of it mostly lie in one page.
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
MOST_ROWS = 2**31 - 2  # of a store: its ids have to fit the tags
_LINE = 64


def set_bytes(row_bytes: int) -> int:
    """What a set takes: its record and 16 rows, in whole cache lines."""
    return -(-(SET.itemsize + WAYS * row_bytes) // _LINE) * _LINE


class Sets:
    """`count` sets of 16 rows. Many threads may use them at once: whoever changes rows holds
    `lock`, and the native `look` takes none. It looks at `version` before and after, and adds to
    `reads`, which is for hints alone.

    memory: uint8 [count, set_bytes(row_bytes)], taken as it is used; records: SET [count], and
    rows: uint8 [count, 16, row_bytes], are views of it. The methods are the plain version, which is
    the native one's specification.
    """

    def __init__(self, count: int, row_bytes: int) -> None:
        self.lock = threading.Lock()
        self.memory = zeros(count, set_bytes(row_bytes))
        self.records = self.memory[:, : SET.itemsize].view(SET)[:, 0]
        rows = self.memory[:, SET.itemsize : SET.itemsize + WAYS * row_bytes]
        self.rows = np.lib.stride_tricks.as_strided(
            rows, (count, WAYS, row_bytes), (*rows.strides[:1], row_bytes, 1)
        )

    def kept(self) -> np.ndarray:
        """Ids, int64 [N]: the main queues' first, and of these the most read first."""
        with self.lock:
            set_N, way_N = np.nonzero(self.records["tags"] > _EMPTY)
            worth_N = (
                self.records["order"][set_N, way_N] // _MAIN * WAYS
                + self.records["reads"][set_N, way_N]
            )
            tag_N = self.records["tags"][set_N, way_N].astype(np.int64)
            return tag_N[np.argsort(-worth_N.astype(np.int64), kind="stable")] - 1

    def look(self, ids_N: np.ndarray, out_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copy the rows that are here to their places in out_NR. Returns the positions of the
        others, int64 [M], ascending, and the versions of their sets, int64 [M], by which `keep`
        knows whether they changed."""
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
        """Keep distinct rows that a `look` missed: of each set the first 16, one after the other.

        Where a set has changed since, what was read may be old, or be here already: it is not kept,
        and neither are rows of a set that are being written. reads_M: int64, how often each row was
        asked for.
        """
        here = place(ids_M, len(self.records))
        with self.lock:
            same_M = self.records["version"][here.set_N] == version_M
            index = np.flatnonzero(same_M & (self.records["taken"][here.set_N] == 0))
            index = index[np.argsort(here.set_N[index], kind="stable")]
            set_n = here.set_N[index]
            turn_n = np.arange(len(index)) - np.searchsorted(set_n, set_n)
            for turn in range(min(WAYS, int(turn_n.max(initial=-1)) + 1)):
                now = index[turn_n == turn]
                self._insert(ids_M[now], here.take(now), reads_M[now], rows_MR[now])

    def hold(self, ids_N: np.ndarray) -> None:
        """Rows are going to be written: until they are `look` misses them, and nothing new of their
        sets is kept. So a row never becomes older between two calls, whether the store or the cache
        has the new one first."""
        set_N = place(ids_N, len(self.records)).set_N
        with self.lock:
            self.records["version"][set_N] += 2
            self.records["taken"][set_N] = WAYS
            hit_N, slot_N = self._find(ids_N, set_N)
            self.records["tags"][np.divmod(slot_N[hit_N], WAYS)] = -(ids_N[hit_N] + 1)

    def write(self, ids_N: np.ndarray, rows_NR: np.ndarray | None) -> None:
        """Rows that `hold` was told of have been written: give those that are here the bytes
        `rows_NR`, of an id given twice the last ones; None: nobody knows what was written, so
        forget them."""
        set_N = place(ids_N, len(self.records)).set_N
        with self.lock:
            self.records["version"][set_N] += 2  # what is being read now is not kept
            self.records["taken"][set_N] = 0
            hit_N, slot_N = self._find(ids_N, set_N)
            self.records["tags"][np.divmod(slot_N[hit_N], WAYS)] = (
                _EMPTY if rows_NR is None else ids_N[hit_N] + 1
            )
            if rows_NR is not None:
                self.rows[np.divmod(slot_N[hit_N], WAYS)] = rows_NR[hit_N]

    def _find(
        self, ids_N: np.ndarray, set_N: np.ndarray, held: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which rows are here, bool [N], and in which slot: set * 16 + way. held: count those too."""
        tags_NW = self.records["tags"][set_N]
        same_NW = (np.abs(tags_NW) if held else tags_NW) == (ids_N + 1)[:, None]
        return same_NW.any(axis=1), set_N * WAYS + same_NW.argmax(axis=1)

    def _insert(
        self, ids_N: np.ndarray, here: _Place, reads_N: np.ndarray, rows_NR: np.ndarray
    ) -> None:
        """Rows of distinct sets: to the main queue where a ghost remembers them, else to the small
        one."""
        records, set_N = self.records, here.set_N
        records["version"][set_N] += 2
        same_NG = records["ghosts"][set_N] == here.print_N[:, None]
        known_N = same_NG.any(axis=1)
        records["ghosts"][set_N[known_N], same_NG[known_N].argmax(axis=1)] = _EMPTY
        way_N = self._free_way(set_N)
        records["tags"][set_N, way_N] = ids_N + 1
        records["reads"][set_N, way_N] = np.minimum(reads_N - 1, _MOST_READS)
        self.rows[set_N, way_N] = rows_NR
        self._to_the_end(set_N, _only(way_N))
        records["order"][set_N, way_N] = records["order"][set_N, way_N] % WAYS + known_N * _MAIN

    def _free_way(self, set_N: np.ndarray) -> np.ndarray:
        """A way of each set that nothing is in any more, int64 [N]."""
        records = self.records
        free_NW = records["tags"][set_N] == _EMPTY
        way_N, full_n = free_NW.argmax(axis=1), np.flatnonzero(~free_NW.any(axis=1))
        while len(full_n):
            set_n = set_N[full_n]
            order_nW = records["order"][set_n]
            small_nW = order_nW < _MAIN
            oldest_n = np.where(small_nW, order_nW, 255).argmin(axis=1)
            from_main_n = small_nW.sum(axis=1) < SMALL
            again_n = ~from_main_n & (records["reads"][set_n, oldest_n] > 0)
            goes_n = ~from_main_n & ~again_n
            self._promote(set_n[again_n], oldest_n[again_n])
            self._leave_ghost(set_n[goes_n], oldest_n[goes_n])
            way_N[full_n[goes_n]] = oldest_n[goes_n]
            way_N[full_n[from_main_n]] = self._least_read(set_n[from_main_n])
            full_n = full_n[again_n]
        return way_N

    def _promote(self, set_N: np.ndarray, way_N: np.ndarray) -> None:
        """From the small queue to the end of the main one."""
        self._to_the_end(set_N, _only(way_N))
        self.records["order"][set_N, way_N] += _MAIN
        self.records["reads"][set_N, way_N] = 0

    def _leave_ghost(self, set_N: np.ndarray, way_N: np.ndarray) -> None:
        records, next_N = self.records, self.records["ghost_next"][set_N]
        records["ghosts"][set_N, next_N] = place(
            records["tags"][set_N, way_N] - 1, len(records)
        ).print_N
        records["ghost_next"][set_N] = (next_N + 1) % GHOSTS

    def _least_read(self, set_N: np.ndarray) -> np.ndarray:
        """The way that leaves the main queue of each set, int64 [N]: the first that is not read any
        more while the oldest, each time, goes to the end with one read less."""
        records = self.records
        order_NW, reads_NW = records["order"][set_N], records["reads"][set_N].astype(np.int64)
        main_NW = order_NW >= _MAIN
        least_N1 = np.where(main_NW, reads_NW, 255).min(axis=1, keepdims=True, initial=255)
        way_N = np.where(main_NW & (reads_NW == least_N1), order_NW, 255).argmin(axis=1)
        passed_NW = main_NW & (order_NW < np.take_along_axis(order_NW, way_N[:, None], axis=1))
        records["reads"][set_N] = np.where(main_NW, reads_NW - least_N1 - passed_NW, reads_NW)
        self._to_the_end(set_N, passed_NW)
        return way_N

    def _to_the_end(self, set_N: np.ndarray, moved_NW: np.ndarray) -> None:
        """Make some rows of each set its latest, in the order in which they are."""
        order_NW = self.records["order"][set_N]
        by_age_NW = np.argsort(order_NW % WAYS + moved_NW * WAYS, axis=1, kind="stable")
        self.records["order"][set_N] = np.argsort(by_age_NW, axis=1) + order_NW // _MAIN * _MAIN


class NativeSets(Sets):
    """The same by native kernels. Reading rows that are here waits for nobody but who is just
    changing their set.

    changes: uint64 [1], a version of all sets together, odd while a call changes some. A reader
    that finds it as it was need not look at the version of each set again.
    """

    def __init__(self, core: Any, count: int, row_bytes: int) -> None:
        super().__init__(count, row_bytes)
        self._core = core
        self.changes = np.zeros(2 * _LINE // 8, np.uint64)[
            7:8
        ]  # amid two lines, so that its own is nobody else's
        self._place = core.address(self.memory), core.address(self.changes), count, row_bytes

    def look(self, ids_N: np.ndarray, out_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at, ids_N = self._core.address, np.ascontiguousarray(ids_N)
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
        rows_NR = None if rows_NR is None else np.ascontiguousarray(rows_NR)
        rows = 0 if rows_NR is None else self._core.address(rows_NR)
        with self.lock:
            self._core.cache_write(*self._place, self._core.address(ids_N), rows, len(ids_N))


class _Place(NamedTuple):
    """Where rows may be: their sets, int64 [N], and the fingerprints that ghosts have of them,
    uint16 [N], never 0."""

    set_N: np.ndarray
    print_N: np.ndarray

    def take(self, index: np.ndarray) -> _Place:
        return _Place(self.set_N[index], self.print_N[index])


def place(ids_N: np.ndarray, sets: int) -> _Place:
    """Where rows may be in a cache of so many sets."""
    mixed_N = ids_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed_N = (mixed_N ^ mixed_N >> 32) * np.uint64(0xD6E8FEB86659FD93)
    set_N = ((mixed_N >> 32) * np.uint64(sets) >> 32).astype(np.int64)
    return _Place(set_N, np.maximum(mixed_N.astype(np.uint16), 1))


def _only(way_N: np.ndarray) -> np.ndarray:
    return way_N[:, None] == np.arange(WAYS)
