"""A bounded cache of rows in front of any store: exact, and what is read once does not push out what is read often.

Rows lie in sets of 16; a row's set follows from its id. Each set keeps S3-FIFO (Yang et al., SOSP 2023) for itself:
what is new waits in a small queue, at least 4 long, what was read there joins the main queue, and 12 ghosts,
fingerprints of rows that left unread, let those that come back join it too. bench/cache_policy.py says why this and not
another. All of a set but its rows is one record of 192 bytes, made for a kernel that reads without locks: it looks at
`version` before and after, and adds to `reads`, which is for hints alone.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError
from .base import RowStore, StoreInfo, StoreStats
from .ram import zeros
from .reload import ReloadableStore

WAYS, SMALL, GHOSTS = 16, 4, 12
_MOST_READS = 3  # as far as reads of a row are counted
_EMPTY = 0
_MAIN = 16  # added to the order of what is in the main queue

# version: changes whenever rows of the set do. ghost_next: the ghost that is forgotten next. order: 0 to 15, in which
# rows came to the end of their queue. reads: of each row since then. ghosts, tags: 0 = none. tags: row id + 1.
_SET = np.dtype([("version", "<u4"), ("ghost_next", "u1"), ("_", "u1", 3), ("order", "u1", WAYS), ("reads", "u1", WAYS),
                 ("ghosts", "<u2", GHOSTS), ("tags", "<i8", WAYS)])


class CacheStore(RowStore):
    """The rows of `store`, those asked for often kept in at most `budget` bytes, bookkeeping included.

    Owns the store: closing closes both. Scattered rows go to the store, and to the cache where they are in it. Writing
    to the store behind its back is not seen, and neither is another process that writes the same table.
    A call reads each missing row once. `stats`: misses are rows read from the store, hits all others.
    Raises ConfigError for a budget below one set of 16 rows.
    """

    def __init__(self, store: RowStore, budget: int) -> None:
        super().__init__()
        if isinstance(store, ReloadableStore):
            raise ConfigError("cache: expected a store whose rows stay; put a cache around each table that is loaded")
        row_bytes = store.info.row_bytes
        least = _SET.itemsize + WAYS * row_bytes
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < least:
            raise ConfigError(f"cache: expected a budget of {least} bytes or more, {WAYS} rows of {row_bytes} bytes "
                              f"and what is noted of them, found {budget!r}")
        self.inner: RowStore = store
        self._count = int(budget) // least
        self._lock, self._writer = threading.Lock(), threading.Lock()
        self._hits = self._misses = 0
        self._make()

    def _make(self) -> None:
        self._sets = np.zeros(self._count, _SET)  # takes memory as it is used
        self._rows = zeros(self._count * WAYS, self.info.row_bytes)

    @property
    def info(self) -> StoreInfo:
        return self.inner.info

    @property
    def stats(self) -> StoreStats:
        with self._lock:
            hits, misses = self._hits, self._misses
        return dataclasses.replace(super().stats, hits=hits, misses=misses)

    @property
    def capacity(self) -> int:
        """Rows that it can hold."""
        return self._count * WAYS

    def kept(self) -> np.ndarray:
        """Ids of the rows in the cache now, int64 [N]: the main queues' first, and of these the most read first."""
        with self._lock:
            self._check_open()
            set_N, way_N = np.nonzero(self._sets["tags"])
            worth_N = self._sets["order"][set_N, way_N] // _MAIN * WAYS + self._sets["reads"][set_N, way_N]
            return self._sets["tags"][set_N, way_N][np.argsort(-worth_N.astype(np.int64), kind="stable")] - 1

    def close(self) -> None:
        super().close()
        self.inner.close()
        with self._lock:
            self._sets, self._rows = self._sets[:0], self._rows[:0]

    def _after_fork(self) -> None:
        super()._after_fork()
        if self._lock.locked() and not self._closed:  # by a thread that is gone, half-way through a change
            self._make()
        self._lock, self._writer = threading.Lock(), threading.Lock()

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        ids_M, back_N, reads_M = np.unique(ids_N, return_inverse=True, return_counts=True)
        place = _place(ids_M, self._count)
        rows_MR = np.empty((len(ids_M), out_NR.shape[1]), np.uint8)
        with self._lock:
            self._check_open()
            hit_M, slot_M = self._find(ids_M, place.set_N)
            slot_h = slot_M[hit_M]
            rows_MR[hit_M] = self._rows[slot_h]
            set_h, way_h = np.divmod(slot_h, WAYS)
            reads = self._sets["reads"]
            reads[set_h, way_h] = np.minimum(reads[set_h, way_h] + reads_M[hit_M], _MOST_READS)
            missing_m = np.flatnonzero(~hit_M)
            version_m = self._sets["version"][place.set_N[missing_m]]
            self._hits += len(ids_N) - len(missing_m)
            self._misses += len(missing_m)
        if len(missing_m):
            rows_MR[missing_m] = self.inner.gather(ids_M[missing_m])
            with self._lock:
                self._check_open()
                # What was read may be old where a set has changed since: it is served, not kept.
                kept_m = missing_m[self._sets["version"][place.set_N[missing_m]] == version_m]
                self._insert(ids_M[kept_m], place.take(kept_m), reads_M[kept_m], rows_MR[kept_m])
        np.take(rows_MR, back_N, axis=0, out=out_NR, mode="clip")

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        with self._writer:  # so that of two writers of a row, store and cache end with the same one
            written = False
            try:
                self.inner.scatter(ids_N, rows_NR)
                written = True
            finally:
                with self._lock:
                    self._check_open()
                    set_N = _place(ids_N, self._count).set_N
                    self._sets["version"][set_N] += 1  # a row that is being read now is not kept
                    hit_N, slot_N = self._find(ids_N, set_N)
                    if written:
                        self._rows[slot_N[hit_N]] = rows_NR[hit_N]
                    else:
                        self._sets["tags"][np.divmod(slot_N[hit_N], WAYS)] = _EMPTY

    def _find(self, ids_N: np.ndarray, set_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which rows are in the cache, bool [N], and in which slot: set * 16 + way."""
        same_NW = self._sets["tags"][set_N] == (ids_N + 1)[:, None]
        return same_NW.any(axis=1), set_N * WAYS + same_NW.argmax(axis=1)

    def _insert(self, ids_N: np.ndarray, place: _Place, reads_N: np.ndarray, rows_NR: np.ndarray) -> None:
        """Keep distinct rows that are not in the cache: of each set the first 16, one after the other."""
        order_N = np.argsort(place.set_N, kind="stable")
        sorted_N = place.set_N[order_N]
        turn_N = np.arange(len(ids_N)) - np.searchsorted(sorted_N, sorted_N)
        for turn in range(min(WAYS, int(turn_N.max(initial=-1)) + 1)):
            now_n = order_N[turn_N == turn]
            self._insert_one_each(ids_N[now_n], place.take(now_n), reads_N[now_n], rows_NR[now_n])
        self._sets["version"][place.set_N] += 1

    def _insert_one_each(self, ids_N: np.ndarray, place: _Place, reads_N: np.ndarray, rows_NR: np.ndarray) -> None:
        """Rows of distinct sets: to the main queue where a ghost remembers them, else to the small one."""
        sets, set_N = self._sets, place.set_N
        same_NG = sets["ghosts"][set_N] == place.print_N[:, None]
        known_N = same_NG.any(axis=1)
        sets["ghosts"][set_N[known_N], same_NG[known_N].argmax(axis=1)] = _EMPTY
        way_N = self._free_way(set_N)
        sets["tags"][set_N, way_N] = ids_N + 1
        sets["reads"][set_N, way_N] = np.minimum(reads_N - 1, _MOST_READS)
        self._rows[set_N * WAYS + way_N] = rows_NR
        self._to_the_end(set_N, _only(way_N))
        sets["order"][set_N, way_N] = sets["order"][set_N, way_N] % WAYS + known_N * _MAIN

    def _free_way(self, set_N: np.ndarray) -> np.ndarray:
        """A way of each set that nothing is in any more, int64 [N]."""
        sets = self._sets
        free_NW = sets["tags"][set_N] == _EMPTY
        way_N, full_n = free_NW.argmax(axis=1), np.flatnonzero(~free_NW.any(axis=1))
        while len(full_n):
            set_n = set_N[full_n]
            order_nW = sets["order"][set_n]
            small_nW = order_nW < _MAIN
            oldest_n = np.where(small_nW, order_nW, 255).argmin(axis=1)
            from_main_n = small_nW.sum(axis=1) < SMALL
            again_n = ~from_main_n & (sets["reads"][set_n, oldest_n] > 0)
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
        self._sets["order"][set_N, way_N] += _MAIN
        self._sets["reads"][set_N, way_N] = 0

    def _leave_ghost(self, set_N: np.ndarray, way_N: np.ndarray) -> None:
        sets, next_N = self._sets, self._sets["ghost_next"][set_N]
        sets["ghosts"][set_N, next_N] = _place(sets["tags"][set_N, way_N] - 1, self._count).print_N
        sets["ghost_next"][set_N] = (next_N + 1) % GHOSTS

    def _least_read(self, set_N: np.ndarray) -> np.ndarray:
        """The way that leaves the main queue of each set, int64 [N]: the first that is not read any more while the
        oldest, each time, goes to the end with one read less."""
        sets = self._sets
        order_NW, reads_NW = sets["order"][set_N], sets["reads"][set_N].astype(np.int64)
        main_NW = order_NW >= _MAIN
        least_N1 = np.where(main_NW, reads_NW, 255).min(axis=1, keepdims=True, initial=255)
        way_N = np.where(main_NW & (reads_NW == least_N1), order_NW, 255).argmin(axis=1)
        passed_NW = main_NW & (order_NW < np.take_along_axis(order_NW, way_N[:, None], axis=1))
        sets["reads"][set_N] = np.where(main_NW, reads_NW - least_N1 - passed_NW, reads_NW)
        self._to_the_end(set_N, passed_NW)
        return way_N

    def _to_the_end(self, set_N: np.ndarray, moved_NW: np.ndarray) -> None:
        """Make some rows of each set its latest, in the order in which they are."""
        order_NW = self._sets["order"][set_N]
        by_age_NW = np.argsort(order_NW % WAYS + moved_NW * WAYS, axis=1, kind="stable")
        self._sets["order"][set_N] = np.argsort(by_age_NW, axis=1) + order_NW // _MAIN * _MAIN


def _only(way_N: np.ndarray) -> np.ndarray:
    return way_N[:, None] == np.arange(WAYS)


def parse_size(url: str, text: str) -> int:
    """"2GiB" in bytes; KiB, MiB, GiB, or none of them for bytes. Raises ConfigError for anything else."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(|KiB|MiB|GiB)", text, re.ASCII)
    if found is None:
        raise ConfigError(f"store {url!r}, cache: expected a size such as 2GiB, 512MiB or 1000000, found {text!r}")
    number, unit = found.groups()
    return int(float(number) * 1024 ** ("", "KiB", "MiB", "GiB").index(unit))


class _Place(NamedTuple):
    """Where rows may be: their sets, int64 [N], and the fingerprints that ghosts have of them, uint16 [N], never 0."""

    set_N: np.ndarray
    print_N: np.ndarray

    def take(self, index: np.ndarray) -> _Place:
        return _Place(self.set_N[index], self.print_N[index])


def _place(ids_N: np.ndarray, sets: int) -> _Place:
    mixed_N = ids_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed_N = (mixed_N ^ mixed_N >> 32) * np.uint64(0xD6E8FEB86659FD93)
    set_N = ((mixed_N >> 32) * np.uint64(sets) >> 32).astype(np.int64)
    return _Place(set_N, np.maximum(mixed_N.astype(np.uint16), 1))
