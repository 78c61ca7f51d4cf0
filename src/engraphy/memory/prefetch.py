"""Prefetcher: reads the rows of a batch while the model computes the layers before them.

    ticket = prefetcher.submit({1: ids_BTC, 14: ids_BTC})  # as soon as the tokens are known
    rows = ticket.wait()                                   # {1: rows_BTE, 14: rows_BTE}

One thread reads tickets, first in first out; a store may read in parallel internally. If there are
few rows and they are in memory, the caller's thread reads them at once, since handing them over
would take longer. This module knows neither tokens nor models.
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
from .ticket import Request, RowRequest, Ticket

__all__ = ["FEW_ROWS", "LIMIT", "PrefetchStats", "Prefetcher", "Ticket"]

LIMIT = 1 << 30  # bytes of rows in flight
# Reading so many rows from memory takes about as long as a hand-over to another thread and back.
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
            limit: most bytes of rows in flight, submitted and not read yet. `submit` blocks while
                there would be more. If nothing is in flight, it accepts a ticket of any size.
            device: where rows go unless a call says otherwise. CUDA: through page-locked memory,
                on a separate stream (written, but not yet run on a GPU).

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
        self._device = torch.device(device)
        self._queue = ReadQueue(limit)
        self._end = weakref.finalize(self, self._queue.end)
        self._end.atexit = False

    def submit(
        self,
        ids: Mapping[int, np.ndarray],
        *,
        device: torch.device | str | None = None,
        owned: bool = False,
    ) -> Ticket:
        """Requests rows. Errors of reading, such as ids out of range, are raised by `wait`.

        Args:
            ids: layer -> row ids int64 [B, T, C].
            device: where the rows go; None = where those of the prefetcher go.
            owned: True: the caller never changes the arrays again, so they are not copied. False:
                the caller may change them afterwards.

        Raises:
            ConfigError: a layer is not in the sources.
            InputError: a dtype or shape is invalid.
            StoreError: the prefetcher is closed.
        """
        for layer, ids_BTC in ids.items():
            self._check_ids(layer, ids_BTC)
        rows = sum([ids_BTC.size for ids_BTC in ids.values()])
        requests = [
            RowRequest(layer, *self._sources[layer], ids_BTC) for layer, ids_BTC in ids.items()
        ]
        transfer = self._queue.transfer(self._target(device))
        if rows <= FEW_ROWS and all([request.store.in_memory for request in requests]):
            return self._queue.at_once(requests, rows, transfer)
        if not owned:
            requests = [request._replace(ids_BTC=request.ids_BTC.copy()) for request in requests]
        ticket = Ticket(self._queue, requests, transfer)
        self._queue.put(ticket, rows)
        return ticket

    def read(
        self, request: Request, *, device: torch.device | str | None = None, now: bool = False
    ) -> Ticket:
        """Requests rows by a request that knows how to read them.

        Args:
            request: its rows are those of this prefetcher's sources.
            device: as in `submit`.
            now: True: they are read in the caller's thread, before this returns.

        Raises:
            StoreError: the prefetcher is closed.
        """
        transfer = self._queue.transfer(self._target(device))
        if now:
            return self._queue.at_once([request], request.rows, transfer)
        ticket = Ticket(self._queue, [request], transfer)
        self._queue.put(ticket, request.rows)
        return ticket

    def _target(self, device: torch.device | str | None) -> torch.device:
        return self._device if device is None else torch.device(device)

    def _check_ids(self, layer: int, ids_BTC: np.ndarray) -> None:
        if layer not in self._sources:
            raise ConfigError(
                f"prefetch: expected layers of {sorted(self._sources)}, found {layer!r}"
            )
        is_array = isinstance(ids_BTC, np.ndarray)
        if not is_array or ids_BTC.dtype != np.int64 or ids_BTC.ndim != 3:
            found = getattr(ids_BTC, "dtype", type(ids_BTC).__name__)
            raise InputError(
                f"prefetch, layer {layer}: expected row ids int64 [B, T, C], "
                f"found {found} {np.shape(ids_BTC)}"
            )

    @property
    def closed(self) -> bool:
        """Whether it accepts no more tickets."""
        return self._queue.ended

    def count_inline(self, rows: int) -> None:
        """Counts rows that the caller has read without a ticket."""
        self._queue.count_inline(rows)

    @property
    def stats(self) -> PrefetchStats:
        """Counters so far."""
        return self._queue.stats

    def close(self) -> None:
        """Accepts no more tickets, and waits until the submitted ones are read. Stores stay open.

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
