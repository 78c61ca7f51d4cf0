"""Reads rows before a request needs them: caches and page tables are full when the first comes.

A cache can be told to keep them: the rows of the most frequent n-grams, say
(`addresses.frequent_rows`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from .base import RowStore
from .cache import CacheStore

_CHUNK = 65_536  # rows
# Sets fill unevenly: after reading as many rows as a cache has places, a tenth of them are empty.
_KEPT = 0.8


@dataclass(frozen=True)
class Warmed:
    """What `warm` has done.

    Attributes:
        rows: rows that were read.
        bytes: their bytes.
        seconds: how long it took.
        kept: how many of these rows the cache keeps; None if there is no cache.
        ready: True if the cache keeps at least 80 % of the rows that it has places for, or there
            is no cache.
    """

    rows: int
    bytes: int
    seconds: float
    kept: int | None
    ready: bool


def warm(
    store: RowStore,
    what: np.ndarray | float,
    progress: Callable[[int, int], None] | None = None,
    *,
    pin: bool = False,
) -> Warmed:
    """Reads rows and drops them; what a cache keeps of them is there from then on.

    Args:
        store: the store to read, or a wrapper around a cache.
        what: int64 [N], row ids, those that matter most first (`CacheStore.kept` of an earlier
            run, say); or a share of all rows, from the first on.
        progress: called with the rows that were read so far, and the rows to read.
        pin: the cache keeps rows of these from now on, and no others (`CacheStore.pin`): needs
            row ids. Give it more than it has places for.

    Raises:
        ConfigError: if the share is not within 0..1; with `pin`, if there is no cache, or a share.
        RowOutOfRange, InputError, StoreError: as `gather` does.
    """
    if pin:
        return _pinned(store, what, progress)
    row_bytes = store.info.row_bytes
    total = len(what) if isinstance(what, np.ndarray) else _rows_of(store, what)
    begun = time.monotonic()
    buffer_nR = np.empty((min(_CHUNK, total), row_bytes), np.uint8)
    for first in range(0, total, _CHUNK):
        last = min(first + _CHUNK, total)
        if isinstance(what, np.ndarray):
            ids_n = what[first:last]
        else:
            ids_n = np.arange(first, last, dtype=np.int64)
        store.gather(ids_n, out=buffer_nR[: last - first])
        if progress is not None:
            progress(last, total)
    seconds = time.monotonic() - begun
    cache = _cache_of(store)
    if cache is None:
        return Warmed(total, total * row_bytes, seconds, None, True)
    distinct = np.unique(what) if isinstance(what, np.ndarray) else np.arange(total)
    kept = int(np.isin(cache.kept(), distinct, assume_unique=True).sum())
    wanted = min(len(distinct), cache.capacity)
    return Warmed(total, total * row_bytes, seconds, kept, kept >= _KEPT * wanted)


def _pinned(
    store: RowStore, what: np.ndarray | float, progress: Callable[[int, int], None] | None
) -> Warmed:
    cache = _cache_of(store)
    if cache is None or not isinstance(what, np.ndarray):
        raise ConfigError(
            f"warm: expected row ids and a cache to pin them in, found {type(what).__name__} and "
            f"{store!r}"
        )
    begun = time.monotonic()
    kept = cache.pin(what, progress)
    seconds = time.monotonic() - begun
    wanted = min(len(what), cache.capacity)
    return Warmed(kept, kept * store.info.row_bytes, seconds, kept, kept >= _KEPT * wanted)


def _rows_of(store: RowStore, share: Any) -> int:
    """How many rows a share is. Raises ConfigError unless it is a number within 0..1."""
    is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not is_number or not 0 <= share <= 1:
        raise ConfigError(f"warm: expected row ids or a share from 0 to 1, found {share!r}")
    return int(share * store.info.rows)


def _cache_of(store: RowStore) -> CacheStore | None:
    """The cache within a store, if there is one."""
    behind: RowStore | None = store
    while behind is not None and not isinstance(behind, CacheStore):
        behind = behind.inner
    return behind
