"""The queue of a prefetcher: tickets that wait, the thread that reads them, and counters."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from ..store.latency import BUCKETS, Latency, bucket_of, latency_of
from .ticket import Request, Ticket
from .transfer import Transfer

_MOST_UNCOUNTED = 1024  # inline tickets


@dataclass(frozen=True)
class PrefetchStats:
    """Counters of a prefetcher.

    Attributes:
        tickets: tickets submitted.
        inline: tickets that the caller's thread read at once.
        cancelled: tickets cancelled.
        rows: rows requested.
        waiting: tickets that are not read yet.
        bytes_in_flight: bytes of the rows of the waiting tickets.
        waited: how long the first `wait` for each ticket took; inline tickets do not count.
    """

    tickets: int
    inline: int
    cancelled: int
    rows: int
    waiting: int
    bytes_in_flight: int
    waited: Latency = field(default=Latency(), compare=False)


class ReadQueue:
    """The state that prefetcher, tickets and thread share, behind one lock.

    It has no reference to the Prefetcher: the thread keeps the queue alive, and a Prefetcher that
    nobody uses is collected and ends the queue.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Reentrant, since the garbage collector may call `end` at any time.
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._reading: Ticket | None = None
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._ended = False
        self._transfers: dict[torch.device, Transfer] = {}
        self._tickets = self._inline = self._cancelled = self._rows = self._nanoseconds = 0
        self._buckets = [0] * BUCKETS
        # Rows of inline tickets that are still to be counted: taking the lock would take longer.
        self._uncounted: list[int] = []
        _ALL.add(self)

    def transfer(self, device: torch.device) -> Transfer:
        """The way of rows to a device."""
        with self._changed:
            transfer = self._transfers.get(device)
            if transfer is None:
                transfer = self._transfers[device] = Transfer(device, self._limit)
            return transfer

    def at_once(self, requests: Sequence[Request], rows: int, transfer: Transfer) -> Ticket:
        """Reads rows in the caller's thread. Returns a ticket that is done, or has failed."""
        self._check_open()
        ticket = Ticket(self, requests, transfer)
        ticket.counted = True
        ticket.read_inline()
        if ticket.state == "done":
            self.count_inline(rows)
        return ticket

    @property
    def ended(self) -> bool:
        """Whether no more tickets are accepted."""
        return self._ended

    def count_inline(self, rows: int) -> None:
        """Counts a ticket that was read without the queue."""
        self._uncounted.append(rows)
        if len(self._uncounted) >= _MOST_UNCOUNTED:
            with self._changed:
                self._count_uncounted()

    def _count_uncounted(self) -> None:
        """Counts what `count_inline` left. Others may append meanwhile; the caller has the lock."""
        rows_by_ticket = self._uncounted[:]
        del self._uncounted[: len(rows_by_ticket)]
        self._tickets += len(rows_by_ticket)
        self._inline += len(rows_by_ticket)
        self._rows += sum(rows_by_ticket)

    def put(self, ticket: Ticket, rows: int) -> None:
        """Puts a ticket into the queue. Blocks while too many bytes are in flight."""
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

    def _check_open(self) -> None:
        if self._ended:
            raise StoreError("prefetch: it is closed")

    def _count(self, rows: int) -> None:
        self._check_open()
        self._tickets += 1
        self._rows += rows

    def wait_for(self, ticket: Ticket) -> None:
        """Blocks until the ticket is done, failed or cancelled."""
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
        """Stores the result of reading a ticket, unless the ticket was cancelled meanwhile."""
        with self._changed:
            if ticket.state == "waiting":
                ticket.finish(rows, error)
            if self._reading is ticket:
                self._reading = None
                self._bytes -= ticket.bytes
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Takes a ticket out of the queue, and drops its rows."""
        with self._changed:
            if ticket.state == "cancelled":
                return
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._bytes -= ticket.bytes
            ticket.give_up(StoreError("prefetch: the ticket was cancelled"))
            self._cancelled += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Ends the queue: no new tickets are accepted."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Ends the queue, and cancels the tickets that wait."""
        with self._changed:
            for ticket in list(self._waiting):
                self.cancel(ticket)
            self.end()
        self.join()

    def join(self) -> None:
        """Waits until the thread has ended."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def stats(self) -> PrefetchStats:
        """Counters so far."""
        with self._changed:
            self._count_uncounted()
            return PrefetchStats(
                tickets=self._tickets,
                inline=self._inline,
                cancelled=self._cancelled,
                rows=self._rows,
                waiting=len(self._waiting) + (self._reading is not None),
                bytes_in_flight=self._bytes,
                waited=latency_of(self._buckets, self._nanoseconds),
            )

    def buffer(
        self,
        transfer: Transfer,
        shape: tuple[int, ...],
        dtype: type[np.float32 | np.uint16],
    ) -> np.ndarray:
        """An uninitialised buffer of this shape, from the pool of `transfer`."""
        with self._changed:
            return transfer.pool.take(shape, dtype)

    def _start(self) -> None:
        """Starts the thread if there is none, and a ticket waits."""
        if self._thread is not None or not self._waiting:
            return
        thread = threading.Thread(target=_work, args=(self,), name="engraphy-prefetch", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise StoreError(
                "prefetch: expected a thread to read ahead, found that the system starts none "
                f"({error}): raise the limit of threads or of address space"
            ) from error
        self._thread = thread

    def next(self) -> Ticket | None:
        """Waits for the next ticket for the thread; None if the queue has ended."""
        with self._changed:
            while not self._waiting and not self._ended:
                self._changed.wait()
            if not self._waiting:
                return None
            self._reading = self._waiting[0]
            return self._waiting.popleft()

    def after_fork(self) -> None:
        """In a forked child there is no thread: the ticket that it was reading is queued again."""
        ticket = self._reading
        if ticket is not None and ticket.state == "waiting" and ticket not in self._waiting:
            self._waiting.appendleft(ticket)
        self._changed = threading.Condition()
        self._reading = None
        self._thread = None
        self._bytes = sum(ticket.bytes for ticket in self._waiting)


_ALL: weakref.WeakSet[ReadQueue] = weakref.WeakSet()


def _after_fork() -> None:
    for queue in list(_ALL):
        queue.after_fork()


def _at_exit() -> None:
    """Ends all threads: at exit Python would stop them inside native code and abort the process."""
    for queue in list(_ALL):
        queue.abandon()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def _work(queue: ReadQueue) -> None:
    while (ticket := queue.next()) is not None:
        ticket.read()
        del ticket  # its rows belong to the caller alone
