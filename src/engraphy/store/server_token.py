"""Who may read: bearer tokens from a file, checked before a call reaches the server of rows."""

# pyarrow has no types.
# pyright: reportUnknownMemberType=false, reportUntypedBaseClass=false

from __future__ import annotations

import hmac
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .remote_arrow import flight
from .remote_options import read_tokens


class Tokens:
    """The tokens of a file, one a line, as the file is now: to change a token, add a line, change
    the clients, remove the old line.

    Raises:
        ConfigError: if the file cannot be read or has no token. Later such a file leaves the
            tokens as they were.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._tokens = [token.encode() for token in read_tokens(path)]
        self._seen = _state(path)

    def accept(self, token: bytes) -> bool:
        """Whether a token is one of them. Takes as long for any token."""
        with self._lock:
            state = _state(self._path)
            if state is not None and state != self._seen:
                try:
                    self._tokens = [known.encode() for known in read_tokens(self._path)]
                    self._seen = state
                except ConfigError:
                    pass  # a file that is being written
            known = self._tokens
        return any([hmac.compare_digest(token, one) for one in known])


class CheckToken(flight.ServerMiddlewareFactory):
    """Refuses calls without a known token."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens

    def start_call(self, info: Any, headers: Mapping[str, list[str]]) -> None:
        """Raises FlightUnauthenticatedError, which says neither token."""
        values = headers.get("authorization") or [""]
        scheme, _, token = values[0].partition(" ")
        if not token:
            raise flight.FlightUnauthenticatedError("expected a bearer token, found none")
        if scheme.lower() != "bearer" or not self._tokens.accept(token.encode()):
            raise flight.FlightUnauthenticatedError(
                "expected a bearer token that the server knows, found another"
            )


def _state(path: str | Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
