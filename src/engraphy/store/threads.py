"""Threads for a store's blocking system calls, up to a limit."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")

# Address space that one more thread needs: its stack, malloc's arena for it, and 32 MiB for the
# rest of the process.
_THREAD_ROOM = 160 << 20


class Threads:
    """At most `limit` threads for blocking calls, including the caller's.

    The others are started when they are needed. If the system starts no more, there are fewer.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool: ThreadPoolExecutor | None = None

    def each(self, call: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Runs call(item) for each item; if a call fails, raises its error when all have ended."""
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
            except RuntimeError:  # no thread was started; the queued call will find no batch left
                break
        return started


def _has_room() -> bool:
    """Whether there is address space for one more thread and the rest of the process."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mmap.mmap(-1, _THREAD_ROOM, flags=flags, prot=mmap.PROT_READ).close()
    except OSError:
        return False
    return True
