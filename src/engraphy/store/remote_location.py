"""One server as a client sees it: its channel, its open streams, and how it has done so far."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import DigestMismatch, EngraphyError, StoreError
from . import remote_wire as wire
from .remote_arrow import check_process, flight
from .remote_options import RemoteOptions
from .remote_wire import Served

_CONNECT = 2.0  # seconds that connecting, or a first answer, may take
_MOST_IDLE = 4  # streams that are kept open for the next calls
_PENALTIES = (0.1, 0.5, 1.0, 2.0)  # seconds without calls after so many failures in a row
_WINDOW = 4  # requests in flight on one stream
_NO_IDS = np.empty(0, np.int64)
CHANNEL = [
    ("grpc.enable_http_proxy", 0),  # row servers are not on the other side of a web proxy
    ("grpc.use_local_subchannel_pool", 1),  # a new client is a new connection
    ("grpc.min_reconnect_backoff_ms", int(_CONNECT * 1000)),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 4 * wire.MOST_BYTES),
    # A window for answers that does not have to be measured first.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 << 20),
]


class Stream:
    """One DoExchange stream. One thread uses it at a time; `cancel` may come from any other."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.used = False  # whether it has answered a call before this one
        self.draining = False
        self._writer: Any = None
        self._reader: Any = None
        self._cancelled = False
        self._ids_N = _NO_IDS
        self._asked = 0

    @property
    def is_open(self) -> bool:
        """Whether `begin` goes to a stream that was opened before."""
        return self._reader is not None

    def open(self) -> None:
        """Opens the stream, and checks that it has the rows of `location.expected`."""
        if self._reader is not None:
            return
        location = self.location
        expected = location.expected
        self._writer, self._reader = location.exchange()
        if self._cancelled:
            self._reader.cancel()
        self._writer.begin(wire.IDS)
        found = Served.read(self._reader.schema, location.address)
        if found != expected:
            raise _other_table(location.address, expected, found)

    def begin(self, ids_N: np.ndarray) -> None:
        """Opens the stream if it is new, and sends the first requests for rows."""
        self.open()
        self._ids_N = ids_N
        self._asked = 0
        self._send(0)

    def finish(self, put: Callable[[int, np.ndarray], None]) -> int:
        """Receives all rows; `put` gets position and rows of each answer. Returns how many."""
        served = self.location.expected
        size = served.most_rows
        total = len(self._ids_N)
        answers = 0
        for first in range(0, total, size):
            answer = self._reader.read_chunk()
            self._send(first + size)
            put(first, wire.rows_of(answer.data, min(size, total - first), served.row_bytes))
            if answer.app_metadata is not None:
                self.draining = True
            answers += 1
        self.used = True
        return answers

    def _send(self, received: int) -> None:
        """Sends requests until _WINDOW of them wait for an answer."""
        size = self.location.expected.most_rows
        end = min(len(self._ids_N), received + _WINDOW * size)
        while self._asked < end:
            ids_n = self._ids_N[self._asked : self._asked + size]
            self._writer.write_batch(wire.id_batch(ids_n))
            self._asked += size

    def cancel(self) -> None:
        """Ends the stream now; a call that waits for it raises."""
        self._cancelled = True
        reader = self._reader
        if reader is not None:
            reader.cancel()

    def close(self) -> None:
        """Cancels and frees the stream; nobody may use it any more."""
        self.cancel()
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()


class Location:
    """A server of some rows of one layer.

    Attributes:
        address: its URI, for messages.
        expected: what it has to serve.
        requests, failures, hedges: calls that it answered, that failed, and that another server
            was asked for too because it was late.
        penalty: no calls before this time (time.monotonic), if another server has the rows.
    """

    def __init__(self, address: str, options: RemoteOptions, expected: Served) -> None:
        self.address = address
        self.expected = expected
        self.requests = 0
        self.failures = 0
        self.hedges = 0
        self.penalty = 0.0
        self._in_a_row = 0
        self._options = options
        self._client: Any = None
        self._idle: list[Stream] = []
        self._taken: set[Stream] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def under_way(self) -> int:
        """Calls that wait for it."""
        return len(self._taken)

    def take(self) -> Stream:
        """An idle stream, or a new one that is still to be opened."""
        with self._lock:
            stream = self._idle.pop() if self._idle else Stream(self)
            self._taken.add(stream)
        return stream

    def give(self, stream: Stream) -> None:
        """Takes a stream back that has answered a call."""
        with self._lock:
            self._taken.discard(stream)
            self.requests += 1
            self._in_a_row = 0
            self.penalty = 0.0
            if stream.draining:
                self.penalty = time.monotonic() + _PENALTIES[-1]
            keep = not (stream.draining or self._closed) and len(self._idle) < _MOST_IDLE
            if keep:
                self._idle.append(stream)
        if not keep:
            stream.close()

    def drop(self, stream: Stream, is_failure: bool) -> None:
        """Closes a stream that did not answer.

        After a failure the next stream gets a channel of its own: nobody polls a channel between
        two calls, so one that has to connect again might never notice that it could. A stream that
        had answered before may have ended with an earlier life of its server: the other idle
        streams end with it, and it is not held against the server.
        """
        with self._lock:
            self._taken.discard(stream)
            stale = [stream]
            if is_failure:
                self._client = None
                if stream.used:
                    stale += self._idle
                    self._idle = []
                else:
                    self.failures += 1
                    wait = _PENALTIES[min(self._in_a_row, len(_PENALTIES) - 1)]
                    self.penalty = time.monotonic() + wait
                    self._in_a_row += 1
        for ended in stale:
            ended.close()

    def late(self) -> None:
        """Notes that another server was faster although it was asked later."""
        with self._lock:
            self.penalty = time.monotonic() + _PENALTIES[min(self._in_a_row, 2)]
            self._in_a_row += 1

    def exchange(self) -> Any:
        """Opens a DoExchange stream. The channel is tried with a timeout first, since opening a
        stream has none."""
        served = self.expected
        client = self._connect()
        call = call_options(self._options, _CONNECT)
        list(client.do_action(flight.Action("ping", b""), call))
        wanted = wire.descriptor(served.table_id, served.layer)
        return client.do_exchange(wanted, call_options(self._options, None))

    def close(self) -> None:
        """Ends all streams and the channel. Calls that wait for them raise."""
        self._closed = True
        self.end_streams()
        with self._lock:
            client = self._client
            self._client = None
        if client is not None:
            client.close()

    def end_streams(self) -> None:
        """Ends all streams; the next call opens one anew."""
        with self._lock:
            idle = self._idle
            taken = list(self._taken)
            self._idle = []
        for stream in idle:
            stream.close()
        for stream in taken:
            stream.cancel()

    def _connect(self) -> Any:
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.address}: expected an open store, found it closed")
            if self._client is None:
                self._client = connect(self.address, self._options)
            return self._client


def connect(uri: str, options: RemoteOptions) -> Any:
    """A Flight client, which connects when it is first used."""
    check_process()
    arguments: dict[str, Any] = {"generic_options": CHANNEL}
    if options.tls and options.ca is not None:
        arguments["tls_root_certs"] = options.certificates()
    return flight.FlightClient(uri, **arguments)


def call_options(options: RemoteOptions, timeout: float | None) -> Any:
    """The options of a call: its timeout in seconds, and the token as the file has it now."""
    token = options.token()
    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    return flight.FlightCallOptions(timeout=timeout, headers=headers)


def _other_table(address: str, expected: Served, found: Served) -> EngraphyError:
    if found.table_id != expected.table_id or found.address_digest != expected.address_digest:
        return DigestMismatch(
            f"{address}: expected table {expected.table_id} with address digest "
            f"{expected.address_digest}, found table {found.table_id} with {found.address_digest}"
        )
    return StoreError(f"{address}: expected {expected}, found {found}")


def ask_server(address: str, options: RemoteOptions, action: str) -> str:
    """Asks a server for an action, such as "health". Returns its answer.

    Raises:
        EngraphyError: if it does not answer, or refuses.
    """
    uri = f"{options.scheme}://{address}"
    client = connect(uri, options)
    try:
        call = call_options(options, options.deadline)
        results = list(client.do_action(flight.Action(action, b""), call))
    except Exception as error:
        raise wire.from_flight(error, uri) from None
    finally:
        client.close()
    return b"".join(result.body.to_pybytes() for result in results).decode()
