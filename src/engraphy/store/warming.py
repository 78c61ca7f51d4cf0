"""Reading rows before anybody waits for them, so that caches and page tables are full when the
first request comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from .base import RowStore
from .cache import CacheStore

_CHUNK = 65_536  # rows
_KEPT = 0.8  # sets fill unevenly: as many rows as a cache has places leave a tenth of them empty


@dataclass(frozen=True)
class Warmed:
    """rows, bytes: what was read. kept: how many of these rows the cache keeps; None where there is
    no cache. ready: all of it was read, and the cache keeps at least 80 % of what it has places
    for."""

    rows: int
    bytes: int
    seconds: float
    kept: int | None
    ready: bool


def warm(
    store: RowStore, what: np.ndarray | float, progress: Callable[[int, int], None] | None = None
) -> Warmed:
    """Read rows and drop them. what: row ids, int64 [N], those that matter most first
    (`CacheStore.kept` of an earlier run, say), or a share of all rows, from the first on.

    progress: called with rows read and rows to be read. Raises ConfigError for a share outside
    0..1, and what `gather` raises.
    """
    total = len(what) if isinstance(what, np.ndarray) else _rows(store, what)
    begun, row_bytes = time.monotonic(), store.info.row_bytes
    buffer_nR = np.empty((min(_CHUNK, total), row_bytes), np.uint8)
    for first in range(0, total, _CHUNK):
        last = min(first + _CHUNK, total)
        ids_n = (
            what[first:last]
            if isinstance(what, np.ndarray)
            else np.arange(first, last, dtype=np.int64)
        )
        store.gather(ids_n, out=buffer_nR[: last - first])
        if progress is not None:
            progress(last, total)
    seconds = time.monotonic() - begun
    cache = _cache_of(store)
    if cache is None:
        return Warmed(total, total * row_bytes, seconds, None, True)
    distinct = np.unique(what) if isinstance(what, np.ndarray) else np.arange(total)
    kept = int(np.isin(cache.kept(), distinct, assume_unique=True).sum())
    return Warmed(
        total, total * row_bytes, seconds, kept, kept >= _KEPT * min(len(distinct), cache.capacity)
    )


def _rows(store: RowStore, share: float) -> int:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ConfigError(f"warm: expected row ids or a share from 0 to 1, found {share!r}")
    return int(share * store.info.rows)


def _cache_of(store: RowStore | None) -> CacheStore | None:
    while store is not None and not isinstance(store, CacheStore):
        store = store.inner
    return store
