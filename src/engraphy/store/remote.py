"""Rows of other hosts, read over Arrow Flight: `RemoteStore`, a client of `engraphy table serve`.

    open_store("remote:HOST:PORT,HOST:PORT?tls=1&token_file=F", layer=1)

Servers say which rows they have. Ranges of rows that several servers have are read from the one
with the fewest calls under way; if it fails, or is later than 95 % of the calls before, another one
is asked too (remote_call.py). A server of another table is never read.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, DigestMismatch, EngraphyError, StoreError
from . import remote_wire as wire
from .base import RowStore
from .info import StoreInfo
from .remote_arrow import check_process
from .remote_call import RangeCall
from .remote_location import Location, call_options, connect
from .remote_options import RemoteOptions
from .remote_watch import Pace
from .remote_wire import Served

_ASK = 3.0  # seconds that a server may take to say what it has
_RETRY = 1.0  # seconds between questions to servers that did not answer


@dataclass(frozen=True)
class ServerStats:
    """How one server has done.

    Attributes:
        address: its URI.
        first, last: the rows that it has, `last` excluded.
        requests: calls that it answered.
        failures: calls that failed.
        hedges: calls for which another server was asked too, since it was late.
        under_way: calls that wait for it now.
    """

    address: str
    first: int
    last: int
    requests: int
    failures: int
    hedges: int
    under_way: int


@dataclass
class Range:
    """Rows [first, last) and the servers that have them."""

    first: int
    last: int
    locations: list[Location]


class RemoteStore(RowStore):
    """One layer of a table that row servers have.

    Args:
        options: addresses and how to reach them.
        layer: the model's layer, 0-based.

    Raises:
        ConfigError: if no server has the layer, or a file of the options cannot be read.
        DigestMismatch: if the servers have different tables.
        StoreError: if no server answers, or the servers that answer do not have all rows.
    """

    def __init__(self, options: RemoteOptions, layer: int) -> None:
        super().__init__()
        check_process()
        self._options = options
        self._layer = layer
        self._pace = Pace()
        self._ask_lock = threading.Lock()
        self._asked = time.monotonic()
        self._silent: dict[str, EngraphyError] = {}
        self._locations: dict[str, Location] = {}
        self._ranges: list[Range] = []
        self._served: Served | None = None
        try:
            for address in options.addresses:
                self._ask(address)
            served = self._checked()
        except BaseException:
            self.close()
            raise
        self._firsts = np.array([part.first for part in self._ranges], np.int64)
        transport = "Flight with TLS" if options.tls else "Flight"
        count = len(self._locations)
        self._info = StoreInfo(
            "remote",
            served.rows,
            served.row_bytes,
            writable=False,
            table_id=served.table_id,
            layer=layer,
            path=",".join(options.addresses),
            format=served.row_format,
            address_digest=served.address_digest,
            reads=f"{transport}, {count} server{'s' if count > 1 else ''}",
        )

    @property
    def info(self) -> StoreInfo:
        return self._info

    @property
    def servers(self) -> tuple[ServerStats, ...]:
        """How each server has done so far."""
        return tuple(
            ServerStats(
                location.address,
                part.first,
                part.last,
                location.requests,
                location.failures,
                location.hedges,
                location.under_way,
            )
            for part in self._ranges
            for location in part.locations
        )

    def close(self) -> None:
        super().close()
        for location in list(self._locations.values()):
            location.close()

    def look_again(self) -> None:
        """Asks the servers that did not answer so far, at most once a second."""
        with self._ask_lock:
            if not self._silent or time.monotonic() < self._asked + _RETRY:
                return
            self._asked = time.monotonic()
            for address in list(self._silent):
                self._ask(address)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        check_process()
        if not len(ids_N):
            return
        ids_N = np.ascontiguousarray(ids_N)
        deadline = time.monotonic() + self._options.deadline
        calls = self._calls(ids_N, out_NR, deadline)
        requests = 0
        try:
            for call in calls:
                call.begin()  # all servers work at the same time
            for call in calls:
                call.end()
                requests += call.requests
        except EngraphyError:
            self._check_open()
            raise
        finally:
            for call in calls:
                call.abandon()
        self._counters.add_reads(requests, out_NR.nbytes)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise AssertionError("not called: the store says that it is read-only")

    def _calls(self, ids_N: np.ndarray, out_NR: np.ndarray, deadline: float) -> list[RangeCall]:
        """One call for each range that has some of the ids."""
        whole = len(self._ranges) == 1
        if whole:
            return [RangeCall(self, self._ranges[0], ids_N, None, out_NR, deadline)]
        number_N = np.searchsorted(self._firsts, ids_N, "right") - 1
        calls: list[RangeCall] = []
        for number, part in enumerate(self._ranges):
            position_n = np.flatnonzero(number_N == number)
            if len(position_n):
                ids_n = ids_N[position_n]
                calls.append(RangeCall(self, part, ids_n, position_n, out_NR, deadline))
        return calls

    # What calls need.

    @property
    def deadline(self) -> float:
        """Seconds that a call may take."""
        return self._options.deadline

    @property
    def pace(self) -> Pace:
        """How long calls usually take."""
        return self._pace

    # Which server has which rows.

    def _ask(self, address: str) -> None:
        """Asks a server for its rows. What it answers wrongly is raised by `_checked`."""
        uri = f"{self._options.scheme}://{address}"
        try:
            client = connect(uri, self._options)
            try:
                wanted = wire.descriptor(None, self._layer)
                info = client.get_flight_info(wanted, call_options(self._options, _ASK))
            finally:
                client.close()
            served = Served.read(info.schema, uri)
            self._same_table(uri, served)
            for endpoint in info.endpoints:
                self._add(uri, served, endpoint)
            self._silent.pop(address, None)
        except ConfigError:
            raise
        except Exception as error:
            self._silent[address] = wire.from_flight(error, uri)
            logging.getLogger("engraphy").warning("%s", self._silent[address])

    def _same_table(self, uri: str, served: Served) -> None:
        if self._served is None:
            self._served = served
        if served != self._served:
            raise DigestMismatch(
                f"{uri}: expected the table of the other servers, {self._served.table_id} with "
                f"address digest {self._served.address_digest}, found {served.table_id} with "
                f"{served.address_digest}"
            )

    def _add(self, uri: str, served: Served, endpoint: Any) -> None:
        """Adds the servers of a range."""
        first, last = wire.range_of(endpoint, served.rows, uri)
        named = [location.uri.decode() for location in endpoint.locations]
        for name in named or [uri]:
            scheme = name.partition("://")[0]
            if scheme in ("arrow-flight-reuse-connection",):
                name = uri
            elif scheme.replace("+tcp", "") != self._options.scheme:
                # Never from TLS to a connection without it, since a server says so.
                raise StoreError(f"{uri}: expected servers of {self._options.scheme}, found {name}")
            self._add_location(name, first, last, served)

    def _add_location(self, name: str, first: int, last: int, served: Served) -> None:
        for part in self._ranges:
            if (part.first, part.last) == (first, last):
                break
        else:
            part = Range(first, last, [])
            self._ranges.append(part)
        if name not in [location.address for location in part.locations]:
            if name not in self._locations:
                self._locations[name] = Location(name, self._options, served)
            part.locations.append(self._locations[name])

    def _checked(self) -> Served:
        """The description of the rows. Raises unless the servers have all of them."""
        served = self._served
        wrong = [error for error in self._silent.values() if type(error) is not StoreError]
        if wrong:
            raise wrong[0]
        silent = "; ".join(str(error) for error in self._silent.values())
        if served is None:
            raise StoreError(
                f"layer {self._layer}: expected a server of rows, found none: {silent}"
            )
        self._ranges.sort(key=lambda part: part.first)
        covered = 0
        for part in self._ranges:
            if part.first != covered:
                break
            covered = part.last
        if covered != served.rows:
            raise StoreError(
                f"layer {self._layer}: expected servers of all {served.rows} rows, each row in one "
                f"range, found {[(part.first, part.last) for part in self._ranges]}"
                + (f"; {silent}" if silent else "")
            )
        return served
