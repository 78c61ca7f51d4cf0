"""A ticket: a request for rows of several layers, to be waited for or cancelled."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..rows.format import RowFormat
from ..rows.read import read
from ..store.base import RowStore

if TYPE_CHECKING:
    from .read_queue import ReadQueue
    from .transfer import Transfer


TakeBuffer = Callable[[tuple[int, ...], type[np.float32 | np.uint16]], np.ndarray]


class Request(Protocol):
    """Rows to be read, of one layer or several.

    Attributes:
        rows: how many.
        bytes: their bytes as numbers.
    """

    @property
    def rows(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def read(self, take: TakeBuffer) -> dict[int, Tensor]:
        """Reads the rows into buffers of `take`. Returns layer -> [B, T, E]."""
        ...


class RowRequest(NamedTuple):
    """The rows of one layer with given ids. ids_BTC: int64 [B, T, C]."""

    layer: int
    store: RowStore
    fmt: RowFormat
    ids_BTC: np.ndarray

    @property
    def rows(self) -> int:
        """How many."""
        return self.ids_BTC.size

    @property
    def bytes(self) -> int:
        """Their bytes as f32."""
        return self.ids_BTC.size * self.fmt.d * 4

    def read(self, take: TakeBuffer) -> dict[int, Tensor]:
        """Reads the rows: layer -> f32 [B, T, E], E = C*d."""
        batch, tokens, columns = self.ids_BTC.shape
        values_BTE = take((batch, tokens, columns * self.fmt.d), np.float32)
        read(self.store, self.ids_BTC, self.fmt, values_BTE)
        return {self.layer: torch.from_numpy(values_BTE)}


class Ticket:
    """Rows that were requested; made by `Prefetcher.submit`.

    Attributes:
        state: "waiting", then "done", "failed" or "cancelled".
        bytes: bytes of the rows.
    """

    def __init__(self, queue: ReadQueue, requests: Sequence[Request], transfer: Transfer) -> None:
        self._queue = queue
        self._requests: Sequence[Request] = requests
        self._transfer = transfer
        self._rows: dict[int, Tensor] = {}
        self._error: BaseException | None = None
        # A list, as in `submit`: for one or two layers it is faster than a generator.
        self.bytes = sum([request.bytes for request in requests])
        self.state = "waiting"
        self.counted = False  # whether the wait for it is in the statistics

    def wait(self) -> dict[int, Tensor]:
        """Waits until all rows are read.

        Returns:
            layer -> [B, T, E], E = C*d, on the device that was asked for; f32 for `submit`. The
            same tensors each time. Nothing else writes to them: a buffer is reused only after the
            last tensor or array over it is gone, including the ticket's own.

        Raises:
            StoreError: The ticket was cancelled.
            Exception: Whatever reading raised, each time.
        """
        self._queue.wait_for(self)
        rows = self._rows  # before the error is read, since another thread may cancel
        if self._error is not None:
            raise self._error
        return self._transfer.hand_out(rows)

    def cancel(self) -> None:
        """Gives up the rows: reads that have not begun are dropped, and `wait` raises StoreError.

        Tensors that `wait` has returned stay valid.
        """
        self._queue.cancel(self)

    def read(self) -> None:
        """Reads the rows, or keeps the error. The queue calls this once."""
        rows: dict[int, Tensor] = {}
        error = None
        try:
            rows = self._read_all()
        except BaseException as caught:  # the waiter raises it, in its own thread
            error = caught
            traceback.clear_frames(caught.__traceback__)  # frames hold buffers
        self._queue.settle(self, rows, error)

    def read_inline(self) -> None:
        """Reads the rows now, or keeps the error."""
        try:
            rows = self._read_all()
        except BaseException as caught:  # the waiter raises it
            self.finish({}, caught)
        else:
            self.finish(rows, None)

    def _read_all(self) -> dict[int, Tensor]:
        take = partial(self._queue.buffer, self._transfer)
        rows: dict[int, Tensor] = {}
        for request in self._requests:
            rows.update(request.read(take))
        return self._transfer.send(rows)

    def finish(self, rows: dict[int, Tensor], error: BaseException | None) -> None:
        """Stores the result of reading."""
        self._rows = rows
        self._error = error
        self._requests = []
        self.state = "done" if error is None else "failed"

    def give_up(self, error: BaseException) -> None:
        """Drops rows and requests; `wait` raises `error`."""
        self._error = error  # before the rows are dropped, see `wait`
        self._rows = {}
        self._requests = []
        self.state = "cancelled"
