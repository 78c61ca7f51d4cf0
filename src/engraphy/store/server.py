"""A server of rows on Arrow Flight: `RowServer`, behind `engraphy table serve`.

It serves stores that exist (a sealed table, a pool) and has no state of its own: it may be killed
and started again at any time. docs/guide/other-hosts.md describes the service; remote_wire.py has
the messages.
"""

# pyarrow has no types.
# pyright: reportUnknownMemberType=false, reportUntypedBaseClass=false

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, DigestMismatch, EngraphyError, InputError, RowOutOfRange
from . import remote_wire as wire
from .base import RowStore
from .remote_arrow import flight, pa
from .remote_wire import Served
from .server_counters import Calls, CountCalls, render
from .server_token import CheckToken, Tokens

STREAMS = 256
_GONE = (  # how reading or writing ends when the client has gone
    flight.FlightCancelledError,
    flight.FlightUnavailableError,
    flight.FlightInternalError,
    flight.FlightTimedOutError,
    pa.ArrowInvalid,
    OSError,
)


@dataclass(frozen=True)
class Part:
    """A server's part of each layer's rows: number `index` of `count` parts, from 0.

    Attributes:
        fleet: addresses of the servers of each part, in order; () if a server knows only itself.
    """

    index: int = 0
    count: int = 1
    fleet: tuple[tuple[str, ...], ...] = ()

    def rows(self, rows: int, index: int | None = None) -> tuple[int, int]:
        """The first row of a part (by default this server's), and the one after its last."""
        number = self.index if index is None else index
        return number * rows // self.count, (number + 1) * rows // self.count


class RowServer(flight.FlightServerBase):
    """Serves the rows of stores. It listens once it is made; `drain`, then `stop`.

    Args:
        stores: layer -> store; they stay open when the server stops.
        host: the address to listen on.
        port: 0 = any free one; see `port`.
        part: which rows it serves.
        streams: most streams that are open at a time; others are told that it is busy.
        tokens: None = whoever can connect may read and drain.
        certificate: (certificate, key) in PEM for TLS; None = no TLS.

    Raises:
        ConfigError: if there is no store, or it cannot listen there.
    """

    def __init__(
        self,
        stores: Mapping[int, RowStore],
        host: str = "127.0.0.1",
        port: int = 0,
        part: Part = Part(),
        streams: int = STREAMS,
        tokens: Tokens | None = None,
        certificate: tuple[bytes, bytes] | None = None,
    ) -> None:
        if not stores:
            raise ConfigError("row server: expected a store for each layer, found none")
        self.stores = dict(stores)
        self._served = {layer: Served.of(layer, store.info) for layer, store in stores.items()}
        self._schemas = {layer: served.schema() for layer, served in self._served.items()}
        self._part = part
        self._scheme = "grpc" if certificate is None else "grpc+tls"
        self._most_streams = streams
        self._changed = threading.Condition()
        self._streams = 0
        self._busy = 0
        self._draining = False
        self._begun = time.time()
        self.calls = Calls()
        middleware: dict[str, Any] = {"count": CountCalls(self.calls)}
        if tokens is not None:
            middleware["token"] = CheckToken(tokens)
        arguments: dict[str, Any] = {"middleware": middleware}
        if certificate is not None:
            arguments["tls_certificates"] = [certificate]
        try:
            super().__init__(f"{self._scheme}://{host}:{port}", **arguments)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(
                f"row server: expected to listen on {host}:{port}, found {error}"
            ) from None

    # Flight.

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        """The ranges of a layer's rows, and where each is served."""
        with _errors():
            served = self._wanted(descriptor)
            indexes = range(self._part.count) if self._part.fleet else [self._part.index]
            endpoints = [self._endpoint(served, index) for index in indexes]
            size = served.rows * served.row_bytes
            schema = self._schemas[served.layer]
            return flight.FlightInfo(schema, descriptor, endpoints, served.rows, size)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Row ids in, rows out, request by request."""
        with _errors(), self._stream():
            served = self._wanted(descriptor)
            schema = self._schemas[served.layer]
            first, last = self._part.rows(served.rows)
            writer.begin(schema)
            store = self.stores[served.layer]
            while (batch := _next(reader)) is not None:
                self._begin_request()
                try:
                    ids_N = wire.ids_of(batch)
                    _check_ids(ids_N, first, last, served)
                    answer = _rows(store, ids_N, schema)
                    if not _write(writer, answer, wire.DRAINING if self._draining else None):
                        return
                finally:
                    self._end_request()

    def do_action(self, context: Any, action: Any) -> Iterator[bytes]:
        """ping, health (JSON), metrics (Prometheus' text format), drain."""
        with _errors():
            if action.type == "ping":
                return iter(())
            if action.type == "health":
                return iter([json.dumps(self.health()).encode()])
            if action.type == "metrics":
                return iter([self.metrics().encode()])
            if action.type == "drain":
                self.drain()
                return iter([json.dumps(self.health()).encode()])
            raise InputError(
                f"action: expected ping, health, metrics or drain, found {action.type!r}"
            )

    def list_actions(self, context: Any) -> list[Any]:
        """The actions, with a line about each."""
        return [
            ("ping", "Nothing."),
            ("health", "State, identities and streams as JSON."),
            ("metrics", "Counters in Prometheus' text format."),
            ("drain", "Answer what is under way, take no new streams, then end."),
        ]

    # Operations.

    def health(self) -> dict[str, Any]:
        """State, identities and streams."""
        some = next(iter(self._served.values()))
        return {
            "state": "draining" if self._draining else "serving",
            "table_id": some.table_id,
            "address_digest": some.address_digest,
            "layers": {layer: self._part.rows(one.rows) for layer, one in self._served.items()},
            "part": f"{self._part.index + 1}/{self._part.count}",
            "streams": self._streams,
            "seconds": round(time.time() - self._begun, 1),
        }

    def metrics(self) -> str:
        """The counters in Prometheus' text format."""
        gauges = {
            "streams": ("Streams that are open.", self._streams),
            "busy": ("Requests that are being answered.", self._busy),
            "draining": ("1 once the server takes no new streams.", int(self._draining)),
        }
        return render(self.stores, self.calls, gauges)

    def drain(self) -> None:
        """Takes no new streams; answers tell clients to go elsewhere."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def wait_drained(self, timeout: float | None = None) -> bool:
        """Waits until it drains. Returns whether it does."""
        with self._changed:
            return self._changed.wait_for(lambda: self._draining, timeout)

    def wait_idle(self, grace: float) -> bool:
        """Waits until no request is being answered, at most `grace` seconds. Returns whether."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, grace)

    def stop(self, patience: float = 1.0) -> None:
        """Stops listening. Flight waits for open streams; this waits `patience` seconds at most."""
        ending = threading.Thread(target=self.shutdown, daemon=True)
        ending.start()
        ending.join(patience)

    # Helpers.

    def _endpoint(self, served: Served, index: int) -> Any:
        first, last = self._part.rows(served.rows, index)
        ticket = wire.ticket(served.table_id, served.layer, first, last)
        addresses = self._part.fleet[index] if self._part.fleet else ()
        # No location: the service that was asked.
        return flight.FlightEndpoint(ticket, [f"{self._scheme}://{name}" for name in addresses])

    def _wanted(self, descriptor: Any) -> Served:
        """The layer that a descriptor names. Raises unless it is one of the table's."""
        path = [part.decode("utf-8", "replace") for part in descriptor.path or ()]
        if len(path) != 2:
            raise InputError(f"descriptor: expected a path (table_id, layer), found {path}")
        table_id, layer = path
        served = {str(number): one for number, one in self._served.items()}.get(layer)
        if served is None:
            raise ConfigError(f"layer: expected one of {sorted(self._served)}, found {layer!r}")
        if table_id not in (wire.ANY_TABLE, served.table_id):
            raise DigestMismatch(f"expected table {table_id}, found table {served.table_id}")
        return served

    @contextmanager
    def _stream(self) -> Generator[None, None, None]:
        with self._changed:
            if self._draining:
                raise flight.FlightUnavailableError("draining: no new streams")
            if self._streams >= self._most_streams:
                self.calls.refused("streams")
                raise flight.FlightUnavailableError(
                    f"busy: expected at most {self._most_streams} streams"
                )
            self._streams += 1
        try:
            yield
        finally:
            with self._changed:
                self._streams -= 1

    def _begin_request(self) -> None:
        with self._changed:
            self._busy += 1

    def _end_request(self) -> None:
        with self._changed:
            self._busy -= 1
            if self._draining and not self._busy:
                self._changed.notify_all()


def _rows(store: RowStore, ids_N: np.ndarray, schema: Any) -> Any:
    """A batch of a store's rows."""
    # Memory of pyarrow's pool: gRPC may hold it after the write has returned, and the pool
    # has pages that were used before.
    shape = len(ids_N), store.info.row_bytes
    buffer = pa.allocate_buffer(shape[0] * shape[1])
    store.gather(ids_N, out=np.frombuffer(buffer, np.uint8).reshape(shape))
    return wire.row_batch(buffer, len(ids_N), schema)


def _write(writer: Any, answer: Any, metadata: bytes | None) -> bool:
    """Sends an answer. Returns whether the client is still there."""
    try:
        if metadata is None:
            writer.write_batch(answer)
        else:
            writer.write_with_metadata(answer, metadata)
    except _GONE:
        return False
    return True


def _next(reader: Any) -> Any:
    """The next request of a stream; None once the client has ended it, or is gone."""
    try:
        return reader.read_chunk().data
    except (StopIteration, *_GONE):
        return None


def _check_ids(ids_N: np.ndarray, first: int, last: int, served: Served) -> None:
    """Raises unless there are not too many ids, all of the part. `gather` checks the whole."""
    if len(ids_N) > served.most_rows:
        raise InputError(
            f"request: expected at most {served.most_rows} row ids, found {len(ids_N)}"
        )
    is_whole = last - first == served.rows
    if len(ids_N) and not is_whole and not (first <= int(ids_N.min()) and int(ids_N.max()) < last):
        wrong = ids_N[(ids_N < first) | (ids_N >= last)][0]
        raise RowOutOfRange(f"row id {wrong}: expected {first} to {last - 1}")


@contextmanager
def _errors() -> Generator[None, None, None]:
    """Sends errors of ours to the client by their names."""
    try:
        yield
    except EngraphyError as error:
        raise wire.to_flight(error) from None
