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
# Trying again helps against these; the others say that the same will happen again.
_PASSING = (
    flight.FlightUnavailableError,
    flight.FlightTimedOutError,
    flight.FlightCancelledError,
    flight.FlightInternalError,
    StopIteration,
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
        self._stream: Stream | None = None
        self._begun = 0.0
        self._is_done = False
        self._is_late = False  # the deadline is over
        self._error: EngraphyError | None = None
        self._lasting: set[Location] = set()  # servers that failed in a way that lasts
        self._tried: set[Location] = set()
        self._hedge: _Hedge | None = None
        self.due = 0.0
        self.requests = 0

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
                self._tried = set(self._lasting)
                continue
            self._ask(location)

    def abandon(self) -> None:
        """Frees what the call still holds; after `end` nothing."""
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
                for stream in (self._stream, self._hedge and self._hedge.stream):
                    if stream is not None:
                        stream.cancel()
            else:
                self._ask_another()

    def won(self, hedge: _Hedge, rows_nR: np.ndarray) -> None:
        """Takes the rows of a second server, unless the first one was faster."""
        with self._lock:
            if self._is_done:
                return
            hedge.rows_nR = rows_nR
            if self._stream is not None:
                self._stream.cancel()  # wakes the caller

    def lost(self, hedge: _Hedge, error: Exception) -> None:
        """The second server failed: while the first one is silent, another one is asked soon."""
        with self._lock:
            if self._is_done or self._stream is None or self._hedge is not hedge:
                return
            self._hedge = None
            self._note(hedge.location, error)
            self.due = min(time.monotonic() + _AGAIN, self._deadline)
        WATCH.add(self)

    # In the caller's thread.

    def _ask(self, location: Location | None) -> None:
        if location is None:
            return
        stream = location.take()
        now = time.monotonic()
        self._begun = now
        after = self._store.pace.late_after(len(self._ids_n))
        if not stream.used:
            after = max(after, _OPENING)
        with self._lock:
            self._stream = stream
            self.due = min(now + after, self._deadline)
        WATCH.add(self)
        try:
            stream.begin(self._ids_n)
        except Exception as error:
            self._failed(error)

    def _finish(self) -> bool:
        """Whether the rows are there: those of the stream, or those of the second server."""
        stream = self._stream
        if stream is not None:
            try:
                self.requests += stream.finish(self._put)
            except Exception as error:
                self._failed(error)
            else:
                self._succeeded(stream)
                return True
        hedge = self._hedge
        if hedge is None:
            return False
        hedge.ended.wait(max(0.0, self._deadline - time.monotonic()))
        with self._lock:
            self._hedge = None
            rows_nR = hedge.rows_nR
            self._is_done = rows_nR is not None
        if rows_nR is None:
            self._note(hedge.location, hedge.error)
            return False
        self._put(0, rows_nR)
        self.requests += 1
        return True

    def _succeeded(self, stream: Stream) -> None:
        with self._lock:
            self._is_done = True
            self._stream = None
        WATCH.discard(self)
        if self._hedge is None:
            self._store.pace.note(len(self._ids_n), time.monotonic() - self._begun)
        stream.location.give(stream)

    def _failed(self, error: Exception) -> None:
        """Lets go of the stream, which raised."""
        with self._lock:
            stream = self._stream
            self._stream = None
            hedge = self._hedge
            is_beaten = self._is_late or (hedge is not None and hedge.rows_nR is not None)
        assert stream is not None  # only the caller's thread takes it away
        location = stream.location
        location.drop(stream, is_failure=not is_beaten)
        if is_beaten:
            location.late()
            self._tried.add(location)
        elif stream.used:
            # The server may have started anew since: it is asked again, on a new stream.
            self._tried.discard(location)
        else:
            self._note(location, error)

    def _note(self, location: Location, error: Exception | None) -> None:
        """Remembers why a server gave no rows."""
        if error is None:
            return
        self._error = wire.from_flight(error, location.address)
        if not isinstance(error, _PASSING):
            self._lasting.add(location)
            self._tried.add(location)

    def _choose(self) -> Location | None:
        """The server to ask next, out of those that were not tried yet."""
        chosen = self._least_busy(self._tried)
        if chosen is not None:
            self._tried.add(chosen)
        return chosen

    def _least_busy(self, but: set[Location]) -> Location | None:
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
        busy = set(self._lasting)
        if self._stream is not None:
            busy.add(self._stream.location)
        another = None if self._hedge is not None else self._least_busy(busy)
        far = self._begun + self._store.pace.far_after(len(self._ids_n))
        if another is None:
            self.due = self._deadline
        elif time.monotonic() < far and not self._store.pace.may_hedge():
            self.due = min(far, self._deadline)
        else:
            self.due = self._deadline
            if self._stream is not None:
                self._stream.location.hedges += 1
            self._hedge = _Hedge(self, another, self._ids_n.copy(), self._out_NR.shape[1])


class _Hedge:
    """The same rows from a second server, in a thread of its own."""

    def __init__(
        self, call: RangeCall, location: Location, ids_n: np.ndarray, row_bytes: int
    ) -> None:
        self.location = location
        self.rows_nR: np.ndarray | None = None
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.stream = location.take()
        self._call = call
        self._ids_n = ids_n
        self._row_bytes = row_bytes
        threading.Thread(target=self._run, name="engraphy-hedge", daemon=True).start()

    def _run(self) -> None:
        rows_nR = np.empty((len(self._ids_n), self._row_bytes), np.uint8)

        def put(first: int, part_nR: np.ndarray) -> None:
            rows_nR[first : first + len(part_nR)] = part_nR

        try:
            self.stream.begin(self._ids_n)
            self.stream.finish(put)
        except Exception as error:
            self.error = error
            self.location.drop(self.stream, is_failure=True)
            self._call.lost(self, error)
        else:
            self.location.give(self.stream)
            self._call.won(self, rows_nR)
        finally:
            self.ended.set()
