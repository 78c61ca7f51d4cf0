"""Servers of rows for tests: in this process, or `engraphy table serve` in one of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engraphy.store import RowStore, base, open_store
from engraphy.store.remote import RemoteStore
from engraphy.store.server import Part, RowServer
from engraphy.store.server_token import Tokens
from engraphy.table import Table
from tests.tools.paths import ROOT

TLS = ROOT / "tests" / "data" / "tls"
_MAIN = "from engraphy.cli import app; app()"
WHOLE = Part()
SECRET = "a-token-that-no-message-may-show"


@contextmanager
def served(
    table: Path | dict[int, RowStore],
    part: Part = WHOLE,
    token_file: Path | None = None,
    certificate: str | None = None,
    **options: int,
) -> Iterator[RowServer]:
    """A server in this process. certificate: the name of a file in tests/data/tls."""
    if isinstance(table, Path):
        table = {layer: open_store(table, layer=layer) for layer in Table.open(table).layers}
    pair = None
    if certificate is not None:
        pair = (TLS / certificate).read_bytes(), (TLS / "server.key").read_bytes()
    tokens = None if token_file is None else Tokens(token_file)
    server = RowServer(table, part=part, tokens=tokens, certificate=pair, **options)
    try:
        yield server
    finally:
        # A stream that a failed test left open would keep this process from ending.
        for store in list(base._ALL):
            if isinstance(store, RemoteStore) and store._locations:
                for name, location in store._locations.items():
                    if name.endswith(f":{server.port}"):
                        location.end_streams()
        server.stop(patience=0.05)
        for store in table.values():
            store.close()


class ServerProcess:
    """`engraphy table serve` in a process of its own, which may be killed, stalled and restarted.

    Attributes:
        port: where it listens, also after a restart.
    """

    def __init__(self, table: Path | str, *options: str, port: int = 0) -> None:
        self._command = [sys.executable, "-c", _MAIN, "table", "serve", str(table)]
        self._options = options
        self.port = port
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, and waits until it listens."""
        command = [*self._command, "--port", str(self.port), *self._options]
        self.process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("listening on "):
                self.port = int(line.rpartition(":")[2])
                return
        raise AssertionError(f"{command} ended with {self.process.wait()}: {self.said}")

    def kill(self) -> None:
        """Ends it at once, as a crash would."""
        self._end(signal.SIGKILL)

    def drain(self) -> None:
        """Asks it to drain, and waits until it has ended."""
        self._end(signal.SIGTERM)

    def stall(self) -> None:
        """Stops it where it is: connections stay open and nothing answers."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Lets it go on."""
        os.kill(self.process.pid, signal.SIGCONT)

    def _end(self, number: int) -> None:
        if self.process.stdout is None or self.process.stdout.closed:
            return  # it has ended before
        if self.process.poll() is None:
            self.process.send_signal(number)
            if number == signal.SIGKILL:
                self.wake()
        self.process.wait(60)
        self.said += self.process.stdout.readlines()
        self.process.stdout.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def until(condition: object, seconds: float = 10.0) -> None:
    """Waits until condition() is true. Raises AssertionError if it takes longer."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)
