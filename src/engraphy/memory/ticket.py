"""A ticket: a request for rows of several layers, to be waited for or cancelled."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..rows.format import RowFormat
from ..rows.read import read
from ..store.base import RowStore

if TYPE_CHECKING:
    from .read_queue import ReadQueue
    from .transfer import Transfer


class Request(NamedTuple):
    """The rows to read of one layer. ids_BTC: row ids, int64 [B, T, C]."""

    layer: int
    store: RowStore
    fmt: RowFormat
    ids_BTC: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, E), E = C*d."""
        batch, tokens, columns = self.ids_BTC.shape
        return batch, tokens, columns * self.fmt.d

    def read(self, values_BTE: np.ndarray) -> Tensor:
        """Reads the rows into f32 [B, T, E]; returns a tensor over it."""
        read(self.store, self.ids_BTC, self.fmt, values_BTE)
        return torch.from_numpy(values_BTE)


class Ticket:
    """Rows that were requested; made by `Prefetcher.submit`.

    Attributes:
        state: "waiting", then "done", "failed" or "cancelled".
        bytes: bytes of the rows.
    """

    def __init__(self, queue: ReadQueue, requests: list[Request], transfer: Transfer) -> None:
        self._queue = queue
        self._requests = requests
        self._transfer = transfer
        self._rows: dict[int, Tensor] = {}
        self._error: BaseException | None = None
        # A list, as in `submit`: for one or two layers it is faster than a generator.
        self.bytes = sum([request.ids_BTC.size * request.fmt.d for request in requests]) * 4
        self.state = "waiting"
        self.counted = False  # whether the wait for it is in the statistics

    def wait(self) -> dict[int, Tensor]:
        """Waits until all rows are read.

        Returns:
            layer -> f32 [B, T, E], E = C*d, on the device that `submit` was given; the same
            tensors each time. Nothing else writes to them: a buffer is reused only after the last
            tensor or array over it is gone, including the ticket's own.

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
            rows = self._read_all(partial(self._queue.buffer, self._transfer))
        except BaseException as caught:  # the waiter raises it, in its own thread
            error = caught
            traceback.clear_frames(caught.__traceback__)  # frames hold buffers
        self._queue.settle(self, rows, error)

    def read_inline(self) -> None:
        """Reads the rows now, into new memory, or keeps the error."""
        try:
            rows = self._read_all(_new_buffer)
        except BaseException as caught:  # the waiter raises it
            self.finish({}, caught)
        else:
            self.finish(rows, None)

    def _read_all(self, buffer: Callable[[tuple[int, ...]], np.ndarray]) -> dict[int, Tensor]:
        rows = {}
        for request in self._requests:
            rows[request.layer] = request.read(buffer(request.shape))
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


def _new_buffer(shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, np.float32)
