"""pyarrow and its Flight, imported once for the modules that speak Flight.

Importing this module without pyarrow raises DataUnavailable. gRPC starts here with its older way of
waiting: the thread that reads a stream polls the socket itself. The newer way hands each message to
a thread of gRPC's own first, which makes a small request take a third longer.
gRPC reads the setting from the environment when it starts, so it is
set for that moment alone.
"""

# pyarrow has no types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import os
from typing import Any

from ..errors import DataUnavailable, StoreError

try:
    import pyarrow
    import pyarrow.flight
except ImportError as error:
    raise DataUnavailable(
        "rows of other hosts: expected the package pyarrow, found none; "
        'pip install "engraphy[remote]"'
    ) from error

__all__ = ["check_process", "flight", "pa"]

pa: Any = pyarrow
flight: Any = pyarrow.flight

_VARIABLE = "GRPC_EXPERIMENTS"
_POLL_IN_THE_CALLER = "-event_engine_client,-event_engine_listener,-event_engine_dns"


def _start_grpc() -> None:
    before = os.environ.get(_VARIABLE)
    if before is not None:
        return  # the user has chosen
    os.environ[_VARIABLE] = _POLL_IN_THE_CALLER
    try:
        flight.FlightClient("grpc://127.0.0.1:1").close()  # connects to nothing yet
    finally:
        del os.environ[_VARIABLE]


_start_grpc()
_process = os.getpid()


def check_process() -> None:
    """Raises StoreError in a child that was forked after gRPC had started.

    gRPC does not survive a fork: a call in the child would wait forever.
    """
    if os.getpid() != _process:
        raise StoreError(
            f"rows of other hosts: expected the process {_process}, which started gRPC, found its "
            f"forked child {os.getpid()}; start processes with 'spawn' and open the store there"
        )
