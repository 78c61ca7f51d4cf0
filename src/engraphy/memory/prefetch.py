"""Prefetcher: rows of a batch are read while the model computes what comes before them.

    ticket = prefetcher.submit({1: ids_BTC, 14: ids_BTC})  # as soon as the tokens are known
    rows = ticket.wait()                                   # {1: rows_BTE, 14: rows_BTE}

One thread reads, first in first out; only stores read in parallel, inside themselves. The caller
reads a few rows of memory at once, since handing them over would take longer. Knows neither tokens
nor models.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np
import torch

from ..errors import ConfigError, InputError
from ..rows.format import RowFormat
from ..store.base import RowStore
from ..store.group import StoreGroup
from .read_queue import PrefetchStats, ReadQueue
from .ticket import Request, Ticket

__all__ = ["FEW_ROWS", "LIMIT", "PrefetchStats", "Prefetcher", "Ticket"]

LIMIT = 1 << 30
# Reading so many from memory takes about as long as handing them to another thread and back.
FEW_ROWS = 1024


class Prefetcher:
    """Reads rows of several layers ahead of their use. Safe for many threads.

    Buffers that are no longer used are kept for the next ticket, up to `limit` bytes.
    """

    def __init__(
        self,
        sources: StoreGroup | Mapping[int, tuple[RowStore, RowFormat]],
        limit: int = LIMIT,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts no thread yet.

        Args:
            sources: the stores of a memory, or layer -> (store, format of its rows).
            limit: bytes of rows in flight, submitted and not read yet. `submit` waits while there
                are more, but takes a larger ticket if nothing else is under way.
            device: where rows go; to CUDA through pinned memory, on a stream of its own (written
                for it, run on no GPU yet).

        Raises:
            ConfigError: the limit is below 1.
            InputError: the rows of a store have another format.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"prefetch, limit: expected bytes from 1 on, found {limit!r}")
        if isinstance(sources, StoreGroup):
            sources = {layer: (store, sources.format) for layer, store in sources.items()}
        for layer, (store, fmt) in sources.items():
            _check_format(layer, store, fmt)
        self._sources = dict(sources)
        self._queue = ReadQueue(limit, torch.device(device))
        self._end = weakref.finalize(self, self._queue.end)
        self._end.atexit = False

    def submit(self, ids: Mapping[int, np.ndarray]) -> Ticket:
        """Asks for rows. What goes wrong with reading, `wait` raises, ids out of range included.

        Args:
            ids: layer -> row ids int64 [B, T, C]. The caller may change the arrays afterwards.

        Raises:
            ConfigError: a layer is not in the sources.
            InputError: another dtype or shape.
            StoreError: the prefetcher is closed.
        """
        for layer, ids_BTC in ids.items():
            self._check_ids(layer, ids_BTC)
        rows = sum([ids_BTC.size for ids_BTC in ids.values()])
        requests = [
            Request(layer, *self._sources[layer], ids_BTC) for layer, ids_BTC in ids.items()
        ]
        if rows <= FEW_ROWS and all([request.store.in_memory for request in requests]):
            return self._queue.at_once(requests, rows)
        copies = [request._replace(ids_BTC=request.ids_BTC.copy()) for request in requests]
        ticket = Ticket(self._queue, copies)
        self._queue.put(ticket, rows)
        return ticket

    def _check_ids(self, layer: int, ids_BTC: np.ndarray) -> None:
        if layer not in self._sources:
            raise ConfigError(
                f"prefetch: expected layers of {sorted(self._sources)}, found {layer!r}"
            )
        array = isinstance(ids_BTC, np.ndarray)
        if not array or ids_BTC.dtype != np.int64 or ids_BTC.ndim != 3:
            found = getattr(ids_BTC, "dtype", type(ids_BTC).__name__)
            raise InputError(
                f"prefetch, layer {layer}: expected row ids int64 [B, T, C], "
                f"found {found} {np.shape(ids_BTC)}"
            )

    def count_inline(self, rows: int) -> None:
        """Counts rows that the caller has read without a ticket. Raises StoreError once closed."""
        self._queue.count_inline(rows)

    @property
    def stats(self) -> PrefetchStats:
        """Counters so far."""
        return self._queue.stats

    def close(self) -> None:
        """Takes no more tickets and waits until those submitted are read. The stores stay open.

        May be called again.
        """
        self._queue.end()
        self._queue.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_format(layer: int, store: RowStore, fmt: RowFormat) -> None:
    info = store.info
    if info.row_bytes != fmt.row_bytes or info.format not in (None, fmt):
        raise InputError(
            f"prefetch, layer {layer}: expected rows of {fmt}, {fmt.row_bytes} bytes each, "
            f"found {info.format} of {info.row_bytes} bytes"
        )
