"""When a call of remote rows is late: a clock for calls under way, and what is usual for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Protocol

_KEPT = 200  # durations
_LEARNT = 20  # durations that have to be known before a quantile says anything
_AT_FIRST = 0.05  # seconds until then
_LEAST = 0.002
_BURST = 16.0
_LOOK = 0.003  # seconds between looks at the calls under way
_LINGER = 300  # looks without a call, until the thread sleeps
_SHARE = 0.1  # of the calls may be asked for twice; calls that are far too late always are
_FAR = 10.0


class Late(Protocol):
    """A call under way.

    Attributes:
        due: when `fire` is called next (time.monotonic), in another thread; inf = never again.
    """

    due: float

    def fire(self) -> None: ...


class Watch:
    """Calls `fire` of calls that are still under way at their time, from one thread.

    While there are calls the thread looks every few milliseconds, and for a while after the last
    one. So a call that ends in time costs two set operations, and wakes nobody: waking a thread
    takes a tenth of the time of a small call.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: set[Late] = set()
        self._used = False  # since the thread looked last
        self._sleeps = False  # until it is notified
        self._thread: threading.Thread | None = None

    def add(self, call: Late) -> None:
        """Watches a call until `discard`."""
        with self._changed:
            self._calls.add(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engraphy-late", daemon=True)
                self._thread.start()
            self._used = True
            if self._sleeps:
                self._changed.notify()

    def discard(self, call: Late) -> None:
        """Watches a call no longer. It may be fired once more all the same."""
        with self._changed:
            self._calls.discard(call)

    def _run(self) -> None:
        quiet = 0
        while True:
            with self._changed:
                quiet = 0 if self._used or self._calls else quiet + 1
                self._used = False
                self._sleeps = quiet > _LINGER
                self._changed.wait(None if self._sleeps else _LOOK)
                self._sleeps = False
                now = time.monotonic()
                due = [call for call in self._calls if call.due <= now]
            for call in due:
                call.fire()
                if call.due == float("inf"):
                    self.discard(call)


class Pace:
    """How long calls usually take, by their size, and how many may be asked for twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[int, deque[float]] = {}
        self._noted: dict[int, int] = {}
        self._p95: dict[int, float] = {}
        self._budget = _BURST

    def note(self, rows: int, seconds: float) -> None:
        """Notes a call that one server answered."""
        size = rows.bit_length() // 2
        with self._lock:
            self._budget = min(_BURST, self._budget + _SHARE)
            kept = self._seconds.get(size)
            if kept is None:
                kept = self._seconds[size] = deque(maxlen=_KEPT)
                self._p95[size] = _AT_FIRST
            kept.append(seconds)
            noted = self._noted[size] = self._noted.get(size, 0) + 1
            if noted % _LEARNT == 0:
                self._p95[size] = max(_LEAST, sorted(kept)[int(0.95 * (len(kept) - 1))])

    def late_after(self, rows: int) -> float:
        """Seconds after which a call of so many rows is late: the 95th percentile."""
        return self._p95.get(rows.bit_length() // 2, _AT_FIRST)

    def far_after(self, rows: int) -> float:
        """Seconds after which another server is asked whatever the budget."""
        return max(0.1, _FAR * self.late_after(rows))

    def may_hedge(self) -> bool:
        """Takes one hedge from the budget, unless it is spent."""
        with self._lock:
            if self._budget < 1:
                return False
            self._budget -= 1
            return True


WATCH = Watch()
