"""Threads for blocking calls of the system, as many of them as a store may have under way."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")

# Addresses that one more thread needs: its stack, what malloc reserves for it, and 32 MiB for what
# else the process does.
_THREAD_ROOM = 160 << 20


class Threads:
    """At most `limit` threads for blocking calls: the caller's and others.

    The others are started when they are needed, and fewer of them if the system starts no more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool: ThreadPoolExecutor | None = None

    def each(self, call: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Runs call(item) for each item; raises an error of theirs when all have ended."""
        size = -(-len(items) // (4 * self._limit))
        batches = deque(items[first : first + size] for first in range(0, len(items), size))

        def work() -> None:
            while True:
                try:
                    batch = batches.popleft()
                except IndexError:  # all are taken
                    return
                for item in batch:
                    call(item)

        others = self._start(work, min(self._limit, len(batches)) - 1)
        try:
            work()
        finally:
            running = [other for other in others if not other.cancel()]
            wait(running)
            batches.clear()  # after an error
        for other in running:
            other.result()

    def _start(self, work: Callable[[], None], count: int) -> list[Future[None]]:
        """Runs work() in up to `count` other threads."""
        started: list[Future[None]] = []
        if count <= 0:
            return started
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._limit, "engraphy-pread")
        while len(started) < count and _has_room():
            try:
                started.append(self._pool.submit(work))
            except RuntimeError:  # no more threads; the call that is queued will find nothing left
                break
        return started


def _has_room() -> bool:
    """Whether there are addresses for one more thread, and for what else the process does."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mmap.mmap(-1, _THREAD_ROOM, flags=flags, prot=mmap.PROT_READ).close()
    except OSError:
        return False
    return True
