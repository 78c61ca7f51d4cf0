"""A bounded cache of rows in front of any store: exact, and what is read once does not push out
what is read often."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from .. import _native
from ..errors import ConfigError
from .base import RowStore, StoreInfo, StoreStats
from .reload import ReloadableStore
from .sets import MOST_ROWS, WAYS, NativeSets, Sets, set_bytes


class CacheStore(RowStore):
    """The rows of `store`, those asked for often kept in at most `budget` bytes, bookkeeping
    included.

    Owns the store: closing closes both. Scattered rows go to the store, and to the cache where they
    are in it. Writing to the store behind its back is not seen, and neither is another process that
    writes the same table. A call reads each missing row once. `stats`: misses are rows read from
    the store, hits all others. Raises ConfigError for a budget below one set of 16 rows and for a
    store of more than 2**31 - 2 rows, StoreError where the system refuses the memory.
    """

    def __init__(self, store: RowStore, budget: int) -> None:
        super().__init__()
        if isinstance(store, ReloadableStore):
            raise ConfigError(
                "cache: expected a store whose rows stay; put a cache around each table that is loaded"
            )
        row_bytes = store.info.row_bytes
        if store.info.rows > MOST_ROWS:
            raise ConfigError(
                f"cache: expected a store of at most {MOST_ROWS} rows, found {store.info.rows}"
            )
        least = set_bytes(row_bytes)
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < least:
            raise ConfigError(
                f"cache: expected a budget of {least} bytes or more, {WAYS} rows of {row_bytes} bytes "
                f"and what is noted of them, found {budget!r}"
            )
        self.inner: RowStore = store
        self._count = int(budget) // least
        self._writer = threading.Lock()
        self._hits = self._misses = 0
        self._sets: Sets | None = None
        self._make()

    def _make(self) -> None:
        core, row_bytes = _native.core, self.info.row_bytes
        self._sets = (
            Sets(self._count, row_bytes)
            if core is None
            else NativeSets(core, self._count, row_bytes)
        )

    @property
    def info(self) -> StoreInfo:
        return self.inner.info

    @property
    def stats(self) -> StoreStats:
        with self._count_lock:
            hits, misses = self._hits, self._misses
        return dataclasses.replace(super().stats, hits=hits, misses=misses)

    @property
    def capacity(self) -> int:
        """Rows that it can hold."""
        return self._count * WAYS

    def kept(self) -> np.ndarray:
        """Ids of the rows in the cache now, int64 [N]: the main queues' first, and of these the
        most read first."""
        return self._opened().kept()

    def close(self) -> None:
        super().close()
        self.inner.close()
        self._sets = None  # the memory lives as long as a call that uses it

    def _opened(self) -> Sets:
        sets = self._sets
        self._check_open()
        assert sets is not None  # which it becomes when the store is marked as closed already
        return sets

    def _after_fork(self) -> None:
        super()._after_fork()
        if self._sets is not None and not (_is_free(self._sets.lock) and _is_free(self._writer)):
            self._make()  # a thread that is gone was half-way through a change
        self._writer = threading.Lock()

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        sets = self._opened()
        missing_M, version_M = sets.look(ids_N, out_NR)
        misses = self._read(sets, ids_N, missing_M, version_M, out_NR) if len(missing_M) else 0
        with self._count_lock:
            self._hits += len(ids_N) - misses
            self._misses += misses

    def _read(
        self,
        sets: Sets,
        ids_N: np.ndarray,
        missing_M: np.ndarray,
        version_M: np.ndarray,
        out_NR: np.ndarray,
    ) -> int:
        """Rows at positions `missing_M` from the store, each once. Returns how many that were."""
        ids_n, first_n, back_M, reads_n = np.unique(
            ids_N[missing_M], return_index=True, return_inverse=True, return_counts=True
        )
        rows_nR = self.inner.gather(ids_n)
        out_NR[missing_M] = rows_nR[back_M]
        sets.keep(ids_n, version_M[first_n], reads_n, rows_nR)
        return len(ids_n)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        with self._writer:  # so that of two writers of a row, store and cache end with the same one
            sets, written = self._opened(), False
            try:
                sets.hold(ids_N)
                self.inner.scatter(ids_N, rows_NR)
                written = True
            finally:
                sets.write(ids_N, rows_NR if written else None)


def _is_free(lock: threading.Lock) -> bool:
    """Whether nobody holds a lock, found by taking it: `locked()` still says no where a thread that
    waited for the lock has got it and not yet the interpreter's."""
    if not lock.acquire(blocking=False):
        return False
    lock.release()
    return True
