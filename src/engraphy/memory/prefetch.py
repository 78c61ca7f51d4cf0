"""Prefetcher: rows of a batch are read while the model computes what comes before them.

    ticket = prefetcher.submit({1: ids_BTC, 14: ids_BTC})     # as soon as the tokens are known
    rows = ticket.wait()                                      # {1: rows_BTE, 14: rows_BTE}, when layer 1 needs them

One thread reads, first in first out; whatever goes on in parallel goes on inside a store. A few
rows of memory are read at once, by the caller: handing them over would take longer. Knows neither
tokens nor models.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError, StoreError
from ..rows.format import RowFormat
from ..rows.read import read
from ..store.base import RowStore
from ..store.group import StoreGroup
from ..store.latency import BUCKETS, Latency, bucket_of, latency_of
from .buffers import BufferPool

LIMIT = 1 << 30
FEW_ROWS = (
    1024  # read from memory in about the time that it takes to hand them to another thread and back
)


@dataclass(frozen=True)
class PrefetchStats:
    """What has been submitted. inline: what was read at once, by whoever asked. waiting,
    bytes_in_flight: tickets that are not read yet, and the bytes of their rows, now. waited: how
    long `wait` took for the others, the first time."""

    tickets: int
    inline: int
    cancelled: int
    rows: int
    waiting: int
    bytes_in_flight: int
    waited: Latency = field(default=Latency(), compare=False)


class Prefetcher:
    """Reads rows of several layers ahead of their use. sources: layer -> (store, format of its
    rows).

    limit: bytes of rows in flight, submitted and not read yet; `submit` waits while there are more,
    but a ticket larger than that is taken when nothing else is under way. Buffers that are no
    longer used are kept for the next ticket, up to `limit` bytes. device: where rows go; for CUDA
    through pinned memory on a stream of its own (written for it, run on no GPU yet). Safe for many
    threads. Closing waits for what was submitted; the stores stay open. Raises ConfigError for a
    limit below 1, InputError where a store's rows are of another format.
    """

    def __init__(
        self,
        sources: StoreGroup | Mapping[int, tuple[RowStore, RowFormat]],
        limit: int = LIMIT,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"prefetch, limit: expected bytes from 1 on, found {limit!r}")
        if isinstance(sources, StoreGroup):
            sources = {layer: (store, sources.format) for layer, store in sources.items()}
        for layer, (store, fmt) in sources.items():
            if store.info.row_bytes != fmt.row_bytes or store.info.format not in (None, fmt):
                raise InputError(
                    f"prefetch, layer {layer}: expected rows of {fmt}, {fmt.row_bytes} bytes each, found "
                    f"{store.info.format} of {store.info.row_bytes} bytes"
                )
        self._sources, self._device = dict(sources), torch.device(device)
        self._queue = _Queue(limit, self._device)
        self._end = weakref.finalize(self, self._queue.end)
        self._end.atexit = False

    def submit(self, ids: Mapping[int, np.ndarray]) -> Ticket:
        """Ask for rows: layer -> int64 [B, T, C]. The ids are the caller's again when this returns.

        Raises ConfigError for a layer that is not in the sources, InputError for other arrays,
        StoreError once closed. What goes wrong with reading is raised by `wait`, ids out of range
        included.
        """
        for layer, ids_BTC in ids.items():
            if layer not in self._sources:
                raise ConfigError(
                    f"prefetch: expected layers of {sorted(self._sources)}, found {layer!r}"
                )
            if (
                not isinstance(ids_BTC, np.ndarray)
                or ids_BTC.dtype != np.int64
                or ids_BTC.ndim != 3
            ):
                raise InputError(
                    f"prefetch, layer {layer}: expected row ids int64 [B, T, C], found "
                    f"{getattr(ids_BTC, 'dtype', type(ids_BTC).__name__)} {np.shape(ids_BTC)}"
                )
        rows = sum([ids_BTC.size for ids_BTC in ids.values()])
        asked = [_Asked(layer, *self._sources[layer], ids_BTC) for layer, ids_BTC in ids.items()]
        if rows <= FEW_ROWS and all([each.store.in_memory for each in asked]):
            return self._queue.at_once(asked, rows)
        ticket = Ticket(self._queue, [each._replace(ids_BTC=each.ids_BTC.copy()) for each in asked])
        self._queue.put(ticket, rows)
        return ticket

    def count_inline(self, rows: int) -> None:
        """Put rows to the counters that the caller has read without a ticket. Raises StoreError
        once closed."""
        self._queue.count_inline(rows)

    @property
    def stats(self) -> PrefetchStats:
        """Counters so far."""
        return self._queue.stats

    def close(self) -> None:
        """Take no more tickets and wait until those submitted are read. May be called again."""
        self._queue.end()
        self._queue.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ticket:
    """Rows that were asked for; made by `Prefetcher.submit`."""

    def __init__(self, queue: _Queue, asked: list[_Asked]) -> None:
        self._queue, self._asked = queue, asked
        self._rows: dict[int, Tensor] = {}
        self._error: BaseException | None = None
        self.bytes = sum([each.ids_BTC.size * each.fmt.d for each in asked]) * 4
        self.state = "waiting"  # then "done", "failed" or "cancelled"
        self.counted = False

    def wait(self) -> dict[int, Tensor]:
        """layer -> f32 [B, T, E], E = C*d, when all of them are read. The same tensors each time.

        Nothing else ever writes to them: a buffer is used again when the last tensor or array over
        it is gone, this ticket's own included. Raises what reading raised, each time; StoreError
        after `cancel`.
        """
        self._queue.wait_for(self)
        rows = self._rows  # before the error is looked at: another thread may cancel
        if self._error is not None:
            raise self._error
        return self._queue.handed_out(rows)

    def cancel(self) -> None:
        """Give up the rows: what is not read yet will not be, and `wait` raises. Tensors that
        `wait` gave stay."""
        self._queue.cancel(self)

    def read(self) -> None:
        """Read the rows, whatever comes of it. For the queue, once."""
        rows: dict[int, Tensor] = {}
        error = None
        try:
            buffer = self._queue.buffer
            rows = self._queue.to_device(
                {each.layer: each.read(buffer(each.shape)) for each in self._asked}
            )
        except BaseException as caught:  # the waiter's to raise, in its own thread
            error = caught
            traceback.clear_frames(caught.__traceback__)  # they hold buffers
        self._queue.settle(self, rows, error)


class _Asked(NamedTuple):
    """Rows of one layer."""

    layer: int
    store: RowStore
    fmt: RowFormat
    ids_BTC: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        batch, tokens, columns = self.ids_BTC.shape
        return batch, tokens, columns * self.fmt.d

    def read(self, values_BTE: np.ndarray) -> Tensor:
        read(self.store, self.ids_BTC, self.fmt, values_BTE)
        return torch.from_numpy(values_BTE)


class _Queue:
    """What prefetcher, tickets and thread share. One lock; nothing here refers to the Prefetcher,
    so that its end is noticed."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self._limit, self._device = limit, device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._changed = (
            threading.Condition()
        )  # reentrant: the garbage collector may call `end` at any time
        self._waiting: deque[Ticket] = deque()
        self._reading: Ticket | None = None
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._ended = False
        self._pool = BufferPool(limit, pinned=device.type == "cuda")
        self._tickets = self._inline = self._cancelled = self._rows = self._nanoseconds = 0
        self._buckets = [0] * BUCKETS
        _ALL.add(self)

    def at_once(self, asked: list[_Asked], rows: int) -> Ticket:
        """A ticket that is read already, whatever came of it."""
        self.count_inline(rows)
        ticket = Ticket(self, [])
        ticket.counted, ticket.state = True, "done"
        try:
            ticket._rows = self.to_device(
                {each.layer: each.read(np.empty(each.shape, np.float32)) for each in asked}
            )
        except BaseException as caught:  # the waiter's to raise
            ticket._error, ticket.state = caught, "failed"
        return ticket

    def count_inline(self, rows: int) -> None:
        with self._changed:
            self._count(rows)
            self._inline += 1

    def put(self, ticket: Ticket, rows: int) -> None:
        """Let a ticket wait in the queue."""
        with self._changed:
            while self._bytes and self._bytes + ticket.bytes > self._limit and not self._ended:
                self._start()
                self._changed.wait()
            self._count(rows)
            self._waiting.append(ticket)
            self._bytes += ticket.bytes
            try:
                self._start()
            except StoreError:
                self._waiting.pop()
                self._bytes -= ticket.bytes
                raise
            self._changed.notify_all()

    def _count(self, rows: int) -> None:
        if self._ended:
            raise StoreError("prefetch: it is closed")
        self._tickets += 1
        self._rows += rows

    def wait_for(self, ticket: Ticket) -> None:
        """Return when it is neither waiting nor being read."""
        if ticket.counted and ticket.state != "waiting":
            return
        begun = time.perf_counter_ns()
        with self._changed:
            while ticket.state == "waiting":
                self._start()
                self._changed.wait()
            if not ticket.counted:
                ticket.counted = True
                taken = time.perf_counter_ns() - begun
                self._nanoseconds += taken
                self._buckets[bucket_of(taken)] += 1

    def settle(self, ticket: Ticket, rows: dict[int, Tensor], error: BaseException | None) -> None:
        """It has been read; a ticket that was cancelled meanwhile stays so."""
        with self._changed:
            if ticket.state == "waiting":
                ticket._rows, ticket._error, ticket._asked = rows, error, []
                ticket.state = "done" if error is None else "failed"
            if self._reading is ticket:
                self._reading = None
                self._bytes -= ticket.bytes
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket.state == "cancelled":
                return
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._bytes -= ticket.bytes
            ticket._error = StoreError("prefetch: the ticket was cancelled")  # first: see `wait`
            ticket._rows, ticket._asked = {}, []
            ticket.state = "cancelled"
            self._cancelled += 1
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """End without reading what waits."""
        with self._changed:
            for ticket in list(self._waiting):
                self.cancel(ticket)
            self.end()
        self.join()

    def join(self) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def stats(self) -> PrefetchStats:
        with self._changed:
            waiting = len(self._waiting) + (self._reading is not None)
            return PrefetchStats(
                self._tickets,
                self._inline,
                self._cancelled,
                self._rows,
                waiting,
                self._bytes,
                latency_of(self._buckets, self._nanoseconds),
            )

    def buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        with self._changed:
            return self._pool.take(shape)

    def to_device(self, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """Copies on the device, complete: the pinned buffers are free when this returns."""
        if self._stream is None:
            return rows
        with torch.cuda.stream(self._stream):
            copies = {
                layer: each.to(self._device, non_blocking=True) for layer, each in rows.items()
            }
        self._stream.synchronize()
        return copies

    def handed_out(self, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        if self._stream is not None:
            for each in (
                rows.values()
            ):  # their memory belongs to the other stream, which must not reuse it too early
                each.record_stream(torch.cuda.current_stream(self._device))
        return dict(rows)

    def _start(self) -> None:
        if self._thread is None and self._waiting:
            thread = threading.Thread(
                target=_work, args=(self,), name="engraphy-prefetch", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                raise StoreError(
                    f"prefetch: expected a thread to read ahead, the system starts none ({error}): raise "
                    "the limit of threads or of address space"
                ) from error
            self._thread = thread

    def _next(self) -> Ticket | None:
        """The next ticket for the thread; None = there will be none."""
        with self._changed:
            while not self._waiting and not self._ended:
                self._changed.wait()
            if not self._waiting:
                return None
            self._reading = self._waiting[0]
            return self._waiting.popleft()

    def _after_fork(self) -> None:
        """In a forked child there is no thread, and what it was reading has to be read again."""
        again = self._reading
        if again is not None and again.state == "waiting" and again not in self._waiting:
            self._waiting.appendleft(again)
        self._changed, self._reading, self._thread = threading.Condition(), None, None
        self._bytes = sum(ticket.bytes for ticket in self._waiting)


_ALL: weakref.WeakSet[_Queue] = weakref.WeakSet()


def _after_fork() -> None:
    for queue in list(_ALL):
        queue._after_fork()


def _at_exit() -> (
    None
):  # Python stops threads that are left in the midst of native code, which aborts the process
    for queue in list(_ALL):
        queue.abandon()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def _work(queue: _Queue) -> None:
    while (ticket := queue._next()) is not None:
        ticket.read()
        del ticket  # its rows are the caller's alone
