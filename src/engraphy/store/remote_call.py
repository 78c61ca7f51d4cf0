"""One call for the rows of one range: which server is asked, and who else if it fails or is late.

Only the thread of the caller writes into the caller's buffer. A second server is asked by a thread
of its own, into a buffer of its own; if it is done first, it cancels the first stream, which wakes
the caller. Reading is idempotent, so a call may be repeated as often as its deadline allows.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EngraphyError, StoreError
from . import remote_wire as wire
from .remote_arrow import flight
from .remote_location import Location, Stream
from .remote_watch import WATCH

if TYPE_CHECKING:
    from .remote import Range, RemoteStore

_PAUSE = 0.02  # seconds before all servers are tried again; doubles up to _LONGEST_PAUSE
_LONGEST_PAUSE = 0.5
_AGAIN = 0.1  # seconds after a second server failed
_OPENING = 0.1  # seconds after which a call that opens a stream is late
# What a server says on purpose: it will say so again. Anything else, such as a connection that
# broke, may pass.
_LASTING = (
    EngraphyError,
    flight.FlightServerError,
    flight.FlightUnauthenticatedError,
    flight.FlightUnauthorizedError,
)


class RangeCall:
    """Reads the rows of one range for one gather. `begin`, `end`, and in the end `abandon`.

    Args:
        store: the store that reads.
        part: the range, and its servers.
        ids_n: contiguous int64 [n], ids in the range.
        position_n: where each row goes in `out_NR`; None: row i goes to i.
        out_NR: uint8 [N, row_bytes].
        deadline: time.monotonic at which the call gives up.
    """

    # Most calls change few of these. They stand here, since a small call takes microseconds.
    due = 0.0
    requests = 0
    _stream: Stream | None = None
    _begun = 0.0
    _is_done = False
    _is_late = False  # the deadline is over
    _has_hedged = False
    _error: EngraphyError | None = None
    _rows_nR: np.ndarray | None = None  # of the attempt that was first
    _lasting: frozenset[Location] = frozenset()  # servers that failed in a way that lasts
    _tried: frozenset[Location] = frozenset()
    _attempts: tuple[_Attempt, ...] = ()
    _ended: threading.Condition | None = None  # an attempt has; over `_lock`, made with the first

    def __init__(
        self,
        store: RemoteStore,
        part: Range,
        ids_n: np.ndarray,
        position_n: np.ndarray | None,
        out_NR: np.ndarray,
        deadline: float,
    ) -> None:
        self._store = store
        self._locations = part.locations
        self._ids_n = ids_n
        self._position_n = position_n
        self._out_NR = out_NR
        self._deadline = deadline
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Chooses a server and asks it. Errors are seen to by `end`."""
        self._ask(self._choose())

    def end(self) -> None:
        """Waits for the rows. Raises the last error once nothing is left to try."""
        pause = _PAUSE
        while not self._finish():
            if time.monotonic() >= self._deadline:
                raise self._out_of_time()
            location = self._choose()
            if location is None:
                if self._error is not None and len(self._lasting) == len(self._locations):
                    raise self._error
                self._store.look_again()
                time.sleep(max(0.0, min(pause, self._deadline - time.monotonic())))
                pause = min(2 * pause, _LONGEST_PAUSE)
                with self._lock:
                    self._tried = self._lasting
                continue
            self._ask(location)

    def abandon(self) -> None:
        """Frees what the call still holds; after `end` nothing."""
        if self._is_done:
            return  # by the caller's thread, which is this one
        with self._lock:
            self._is_done = True
            stream = self._stream
            self._stream = None
        WATCH.discard(self)
        if stream is not None:
            stream.location.drop(stream, is_failure=False)

    def fire(self) -> None:
        """The call is late: asks another server, or gives up. Called by the watch's thread."""
        with self._lock:
            if self._is_done:
                self.due = float("inf")
            elif time.monotonic() >= self._deadline:
                self.due = float("inf")
                self._is_late = True
                if self._stream is not None:
                    self._stream.cancel()
            else:
                self._ask_another()

    def ended(self, attempt: _Attempt, error: Exception | None) -> None:
        """An attempt in another thread has ended, with its rows if there is no error."""
        with self._lock:
            if self._is_done:
                return
            self._attempts = tuple(one for one in self._attempts if one is not attempt)
            if error is None:
                self._rows_nR = attempt.rows_nR
                self.requests += attempt.requests
                if self._stream is not None:
                    self._stream.cancel()  # wakes the caller
            else:
                self._note(attempt.location, error)
                # While the others are silent, another server is asked soon.
                self.due = min(time.monotonic() + _AGAIN, self._deadline)
                WATCH.add(self)
            if self._ended is not None:
                self._ended.notify()

    # In the caller's thread.

    def _ask(self, location: Location | None) -> None:
        if location is None:
            return
        stream = location.take()
        now = time.monotonic()
        self._begun = now
        if not stream.is_open:
            # Opening cannot be cancelled, so the caller does not wait for it alone.
            with self._lock:
                self.due = min(now + _OPENING, self._deadline)
                self._attempt(stream)
            WATCH.add(self)
            return
        after = self._store.pace.late_after(len(self._ids_n))
        with self._lock:
            self._stream = stream
            self.due = min(now + after, self._deadline)
        WATCH.add(self)
        try:
            stream.begin(self._ids_n)
        except Exception as error:
            self._failed(error)

    def _finish(self) -> bool:
        """Whether the rows are there: those of the caller's stream, or of another attempt."""
        stream = self._stream
        if stream is not None:
            try:
                self.requests += stream.finish(self._put)
            except Exception as error:
                self._failed(error)
            else:
                self._succeeded(stream)
                return True
        with self._lock:
            while self._rows_nR is None and self._attempts and self._ended is not None:
                left = self._deadline - time.monotonic()
                if left <= 0 or not self._ended.wait(left):
                    break
            rows_nR = self._rows_nR
            if rows_nR is None:
                return False
            self._is_done = True
            beaten = [attempt.location for attempt in self._attempts]
        for location in beaten:
            location.late()
        WATCH.discard(self)
        self._put(0, rows_nR)
        return True

    def _succeeded(self, stream: Stream) -> None:
        with self._lock:
            self._is_done = True
            self._stream = None
        WATCH.discard(self)
        if not self._has_hedged:
            self._store.pace.note(len(self._ids_n), time.monotonic() - self._begun)
        stream.location.give(stream)

    def _failed(self, error: Exception) -> None:
        """Lets go of the caller's stream, which raised."""
        with self._lock:
            stream = self._stream
            self._stream = None
            is_beaten = self._is_late or self._rows_nR is not None
        assert stream is not None  # only the caller's thread takes it away
        location = stream.location
        location.drop(stream, is_failure=not is_beaten)
        if is_beaten:
            location.late()
        with self._lock:
            if is_beaten:
                self._tried |= {location}
                return
            # Its server may have started anew since: a new stream will tell.
            self._error = wire.from_flight(error, location.address)
            self._tried -= {location}

    def _note(self, location: Location, error: Exception) -> None:
        """Remembers why a server gave no rows."""
        self._error = wire.from_flight(error, location.address)
        if isinstance(error, _LASTING):
            self._lasting |= {location}
            self._tried |= {location}

    def _choose(self) -> Location | None:
        """The server to ask next, out of those that were not tried yet."""
        with self._lock:
            chosen = self._least_busy(self._tried)
            if chosen is not None:
                self._tried |= {chosen}
        return chosen

    def _least_busy(self, but: frozenset[Location]) -> Location | None:
        if len(self._locations) == 1:
            only = self._locations[0]
            return None if only in but else only
        now = time.monotonic()
        return min(
            [location for location in self._locations if location not in but],
            key=lambda location: (location.penalty > now, location.under_way, location.requests),
            default=None,
        )

    def _put(self, first: int, rows_nR: np.ndarray) -> None:
        last = first + len(rows_nR)
        if self._position_n is None:
            self._out_NR[first:last] = rows_nR
        else:
            self._out_NR[self._position_n[first:last]] = rows_nR

    def _out_of_time(self) -> EngraphyError:
        names = ", ".join(location.address for location in self._locations)
        cause = "" if self._error is None else f"; last: {self._error}"
        return StoreError(
            f"{names}: expected {len(self._ids_n)} rows within the deadline of "
            f"{self._store.deadline:g} s, found none in time{cause}"
        )

    # In the watch's thread.

    def _ask_another(self) -> None:
        """Asks a second server if there is one, and the budget allows it. The lock is held."""
        busy = self._lasting | {attempt.location for attempt in self._attempts}
        if self._stream is not None:
            busy |= {self._stream.location}
        another = self._least_busy(busy)
        far = self._begun + self._store.pace.far_after(len(self._ids_n))
        if another is None or not (self._attempts or self._stream):
            self.due = self._deadline
        elif time.monotonic() < far and not self._store.pace.may_hedge():
            self.due = min(far, self._deadline)
        else:
            self.due = self._deadline
            self._has_hedged = True
            if self._stream is not None:
                self._stream.location.hedges += 1
            self._attempt(another.take())

    def _attempt(self, stream: Stream) -> None:
        """Asks for the same rows in another thread. The lock is held."""
        if self._ended is None:
            self._ended = threading.Condition(self._lock)
        self._attempts += (_Attempt(self, stream, self._ids_n, self._out_NR.shape[1]),)


class _Attempt:
    """The same rows on another stream, in a thread of its own, into a buffer of its own."""

    def __init__(self, call: RangeCall, stream: Stream, ids_n: np.ndarray, row_bytes: int) -> None:
        self.location = stream.location
        self.rows_nR: np.ndarray | None = None
        self.requests = 0
        self._call = call
        self._stream = stream
        self._ids_n = ids_n.copy()  # the caller may be gone before this server is asked
        self._row_bytes = row_bytes
        threading.Thread(target=self._run, name="engraphy-remote", daemon=True).start()

    def _run(self) -> None:
        rows_nR = np.empty((len(self._ids_n), self._row_bytes), np.uint8)

        def put(first: int, part_nR: np.ndarray) -> None:
            rows_nR[first : first + len(part_nR)] = part_nR

        try:
            self._stream.begin(self._ids_n)
            self.requests = self._stream.finish(put)
        except Exception as error:
            self.location.drop(self._stream, is_failure=True)
            self._call.ended(self, error)
        else:
            self.rows_nR = rows_nR
            self.location.give(self._stream)
            self._call.ended(self, None)
