"""A bounded cache of rows in front of any store.

It is exact, and rows that are read once do not push out rows that are read often. `pin` makes it a
fixed set of rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _native  # pyright: ignore[reportPrivateUsage]
from ..errors import ConfigError
from .base import RowStore, check_flat_ids
from .reload import ReloadableStore
from .sets import MOST_ROWS, WAYS, NativeSets, Sets, place, set_bytes
from .wrapper import WrapperStore

_STEP = 65_536  # rows that are pinned at a time


class CacheStore(WrapperStore):
    """Another store, with the rows that are requested often kept in memory.

    It owns the store: closing closes both. `scatter` writes rows to the store, and to the cache if
    it has them. The cache does not see writes that bypass it, nor those of another process to the
    same table; so `updating` gives None. A call reads each missing row once. In `stats` misses are
    the rows that were read from the store, hits are all others.

    Args:
        store: the store behind the cache.
        budget: bytes that the cache may take, bookkeeping included.

    Raises:
        ConfigError: if the budget is smaller than one set of 16 rows, or the store has more than
            2**31 - 2 rows or is a ReloadableStore.
        StoreError: if the system refuses the memory.
    """

    def __init__(self, store: RowStore, budget: int) -> None:
        super().__init__(store)
        if isinstance(store, ReloadableStore):
            raise ConfigError(
                "cache: expected a store that is never exchanged, found a "
                f"{type(store).__name__}; put a cache around each table that it loads"
            )
        info = store.info
        if info.rows > MOST_ROWS:
            raise ConfigError(
                f"cache: expected a store of at most {MOST_ROWS} rows, found {info.rows}"
            )
        self._count = _sets_within(budget, info.row_bytes)
        self._writer = threading.Lock()
        self._counters.add_looks(0, 0)  # from now on `stats` has hits and misses
        self._sets: Sets | None = None
        self._make()

    def _make(self) -> None:
        """Starts with an empty cache, which adapts."""
        self._pinned = False
        self._sets = self._empty()

    def _empty(self) -> Sets:
        row_bytes = self.info.row_bytes
        if _native.core is None:
            return Sets(self._count, row_bytes)
        return NativeSets(_native.core, self._count, row_bytes)

    @property
    def capacity(self) -> int:
        """How many rows the cache can hold."""
        return self._count * WAYS

    def kept(self) -> np.ndarray:
        """Ids of the rows that the cache has now.

        Returns:
            int64 [N]: rows of main queues first, then those of small queues; the most read first.

        Raises:
            StoreError: if the store is closed.
        """
        return self._opened().kept()

    @property
    def pinned(self) -> bool:
        """Whether the cache has the rows that `pin` gave it, and takes no others."""
        return self._pinned

    def pin(self, ids_N: np.ndarray, progress: Callable[[int, int], None] | None = None) -> int:
        """Keeps these rows from now on, and no others, whatever is read.

        A set has 16 places: of the rows of a set the first 16 are kept. Give more rows than the
        cache has places for, and nearly all places are taken. Until the rows are read, calls find
        what the cache had before, and writes wait.

        Args:
            ids_N: int64 [N], row ids, those that matter most first.
            progress: called with the rows that were read so far, and the rows to read.

        Returns:
            How many rows are kept.

        Raises:
            RowOutOfRange, InputError, StoreError: as `gather` does. The cache is as it was.
        """
        check_flat_ids(ids_N, self.info.rows)
        distinct_n = ids_N[np.sort(np.unique(ids_N, return_index=True)[1])]
        chosen_n = distinct_n[_first_of_sets(distinct_n, self._count)]
        with self._writer:
            self._opened()
            sets = self._empty()
            for first in range(0, len(chosen_n), _STEP):
                part_n = chosen_n[first : first + _STEP]
                rows_nR = self.wrapped.gather(part_n)
                # All are missing, and their sets have places: each is kept.
                _, version_n = sets.look(part_n, np.empty_like(rows_nR))
                sets.keep(part_n, version_n, np.ones(len(part_n), np.int64), rows_nR)
                if progress is not None:
                    progress(min(first + _STEP, len(chosen_n)), len(chosen_n))
            self._check_open()
            self._pinned = True
            self._sets = sets
        return len(chosen_n)

    def close(self) -> None:
        super().close()
        self._sets = None  # the memory lives as long as a call that uses it

    def _title(self) -> str:
        return f"{'pinned ' if self._pinned else ''}cache of {self.capacity} rows"

    def _opened(self) -> Sets:
        sets = self._sets
        self._check_open()
        assert sets is not None  # `close` marks the store as closed before it drops them
        return sets

    def _after_fork(self) -> None:
        super()._after_fork()
        is_whole = self._sets is None or (_is_free(self._sets.lock) and _is_free(self._writer))
        if not is_whole:
            self._make()  # a thread of the parent was in the middle of a change
        self._writer = threading.Lock()

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        sets = self._opened()
        missing_M, version_M = sets.look(ids_N, out_NR)
        misses = 0
        if len(missing_M):
            misses = self._read(sets, ids_N, missing_M, version_M, out_NR)
        self._counters.add_looks(len(ids_N) - misses, misses)

    def _read(
        self,
        sets: Sets,
        ids_N: np.ndarray,
        missing_M: np.ndarray,
        version_M: np.ndarray,
        out_NR: np.ndarray,
    ) -> int:
        """Reads the rows at positions `missing_M` from the store, each once. Returns how many."""
        ids_n, first_n, back_M, reads_n = np.unique(
            ids_N[missing_M], return_index=True, return_inverse=True, return_counts=True
        )
        rows_nR = self.wrapped.gather(ids_n)
        out_NR[missing_M] = rows_nR[back_M]
        if not self._pinned:
            sets.keep(ids_n, version_M[first_n], reads_n, rows_nR)
        return len(ids_n)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        # One writer at a time: if two write the same row, store and cache end with the same bytes.
        with self._writer:
            sets = self._opened()
            written = None
            try:
                sets.hold(ids_N)
                self.wrapped.scatter(ids_N, rows_NR)
                written = rows_NR
            finally:
                sets.write(ids_N, written)


def _sets_within(budget: Any, row_bytes: int) -> int:
    """How many sets fit into a budget. Raises ConfigError if not even one fits."""
    least = set_bytes(row_bytes)
    if not _is_integer(budget) or budget < least:
        raise ConfigError(
            f"cache: expected a budget of {least} bytes or more, {WAYS} rows of {row_bytes} bytes "
            f"and their bookkeeping, found {budget!r}"
        )
    return int(budget) // least


def _first_of_sets(ids_N: np.ndarray, sets: int) -> np.ndarray:
    """Positions of the first 16 rows of each set, ascending."""
    set_N = place(ids_N, sets).set_N
    order_N = np.argsort(set_N, kind="stable")
    ordered_N = set_N[order_N]
    turn_N = np.arange(len(ids_N)) - np.searchsorted(ordered_N, ordered_N)
    return np.sort(order_N[turn_N < WAYS])


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_free(lock: threading.Lock) -> bool:
    """Whether no thread holds a lock, found by taking it.

    `locked()` still returns False if a thread that waited for the lock has got it, but not yet the
    GIL.
    """
    if not lock.acquire(blocking=False):
        return False
    lock.release()
    return True
