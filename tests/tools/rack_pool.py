"""Eight servers on one machine that share a pool; a part of make test-rack.

    python -m tests.tools.rack_pool [--servers 8]

A server is a network namespace with an address of its own on a bridge, and a limit of its
bandwidth; a process in it (rack_server.py) attaches the pool and is asked over that network. Needs
root, `ip` and `tc`. Delays on the network are not made: this kernel may lack netem, so what is slow
is slow in the reader.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engraphy import Table, VocabMap
from engraphy.errors import StoreError
from engraphy.store import open_store, publish_pool, read_header
from tests.tools import rack_server
from tests.tools.paths import ROOT
from tests.tools.rack_server import FORMAT, LAYERS, VOCAB, config_of, drawn

SERVERS = 8
ROWS_PER_HEAD = 10_000  # of the checks: 127 MB in all
NET = "10.213.77"
PORT = 7300
BANDWIDTH = "10gbit"
PUBLISH = "import sys; from engraphy.store import publish_pool; publish_pool(*sys.argv[1:])"
_WAIT = 60.0  # seconds until a server is ready
_NEWNET = 0x40000000  # CLONE_NEWNET


@dataclass(frozen=True)
class Place:
    """A network namespace.

    Attributes:
        name: As `ip netns` knows it.
        address: Its address on the bridge.
    """

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` in the namespace."""
        return ["ip", "netns", "exec", self.name, *words]


def missing() -> list[str]:
    """What this part needs and does not find."""
    gaps = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if os.geteuid() != 0:
        gaps.append("root, to make network namespaces")
    elif not gaps:
        name = f"eng{secrets.token_hex(3)}"
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        if made.returncode:
            gaps.append(f"network namespaces ({made.stderr.strip()})")
        else:
            subprocess.run(["ip", "netns", "delete", name], check=True)
    return gaps


@contextmanager
def namespaces(count: int, bandwidth: str = BANDWIDTH) -> Iterator[list[Place]]:
    """Network namespaces on a bridge, each with a limit of its bandwidth; removed afterwards."""
    run = secrets.token_hex(3)
    bridge = f"br{run}"
    places = [Place(f"eng{run}-{n}", f"{NET}.{n + 10}") for n in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{NET}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, place in enumerate(places):
            _join(place, bridge, f"v{run}{number}", bandwidth)
        yield places
    finally:
        for place in places:
            subprocess.run(["ip", "netns", "delete", place.name], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def _join(place: Place, bridge: str, cable: str, bandwidth: str) -> None:
    _ip("netns", "add", place.name)
    _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", place.name)
    _ip("link", "set", cable, "master", bridge, "up")
    inside = ("-n", place.name)
    _ip(*inside, "address", "add", f"{place.address}/24", "dev", "eth0")
    _ip(*inside, "link", "set", "eth0", "up")
    _ip(*inside, "link", "set", "lo", "up")
    limit = ("tbf", "rate", bandwidth, "burst", "4mb", "latency", "50ms")
    subprocess.run(["tc", "qdisc", "add", "dev", cable, "root", *limit], check=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Server:
    """A rack_server in a namespace: a forked process, so that imports are there already.

    Attributes:
        opened: Way -> seconds that opening its stores took.
    """

    def __init__(self, place: Place, source: int | Path, urls: dict[str, str]) -> None:
        self._place = place
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(place, source, urls), daemon=True
        )
        self._process.start()

    def connect(self) -> None:
        """Waits until it is ready. Raises RuntimeError if it ended."""
        self._socket = _connect(self._place, self._process.is_alive)
        self._lines = self._socket.makefile("rw")
        self.opened: dict[str, float] = json.loads(self._lines.readline())["opened"]

    def ask(self, **asked: Any) -> None:
        """Sends a question; `answer` waits for the answer."""
        print(json.dumps(asked), file=self._lines, flush=True)

    def answer(self) -> Any:
        return json.loads(self._lines.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _connect(place: Place, is_alive: Callable[[], bool]) -> socket.socket:
    """A connection to the server in a namespace, as soon as it listens."""
    until = time.monotonic() + _WAIT
    while True:
        try:
            return socket.create_connection((place.address, PORT), timeout=_WAIT)
        except OSError:
            if not is_alive() or time.monotonic() > until:
                raise RuntimeError(
                    f"{place.name}: expected a server that is ready, found none"
                ) from None
            time.sleep(0.02)


def _serve(place: Place, source: int | Path, urls: dict[str, str]) -> None:
    """A server's process: enters the namespace's network, and serves."""
    with open(f"/run/netns/{place.name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NEWNET):
            raise OSError(ctypes.get_errno(), f"{place.name}: it cannot be entered")
    rack_server.serve(place.address, PORT, source, urls)


def start_seconds(place: Place, rows_per_head: int, urls: dict[str, str]) -> float:
    """How long a program takes from its start until it can serve."""
    pairs = [f"{name}={url}" for name, url in urls.items()]
    words = ["-m", "tests.tools.rack_server", place.address, str(PORT), str(rows_per_head), *pairs]
    begun = time.monotonic()
    command = place.command(sys.executable, *words)
    with subprocess.Popen(command, cwd=ROOT) as process:
        connection = _connect(place, lambda: process.poll() is None)
        taken = time.monotonic() - begun
        process.kill()
        connection.close()
    return taken


def ask_all(servers: Sequence[Server], **asked: Any) -> list[Any]:
    """The answers of all servers to a question that they get at once."""
    for server in servers:
        server.ask(**asked)
    return [server.answer() for server in servers]


def write_table(path: Path, rows_per_head: int, seed: int) -> None:
    """A sealed table of random rows."""
    table = Table.create(path, config_of(rows_per_head), FORMAT, VocabMap.identity(VOCAB))
    rng = np.random.default_rng(seed)
    for layer in LAYERS:
        count = table.rows(layer)
        for first in range(0, count, 1 << 17):
            number = min(1 << 17, count - first)
            raw = np.frombuffer(rng.bytes(number * FORMAT.row_bytes), np.uint8)
            table.write_rows(layer, first, raw.reshape(number, -1) & 0x3F)  # no NaN
    table.seal()
    table.close()


def expected_rows(url: str, seed: int, layers: Sequence[int] = LAYERS) -> dict[str, str]:
    """What a server answers that reads the right rows."""
    found: dict[str, str] = {}
    for layer in layers:
        store = open_store(url, layer=layer)
        rows = store.gather(drawn(store.info.rows, seed))
        found[str(layer)] = hashlib.sha256(rows).hexdigest()
        store.close()
    return found


def run(count: int = SERVERS) -> dict[str, Any]:
    """Runs the checks.

    Returns:
        What was counted.

    Raises:
        AssertionError: A server read other rows, or there is more than one copy.
    """
    with ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        pool = memory / "pool"
        for seed in (1, 2):
            write_table(disk / f"table-{seed}", ROWS_PER_HEAD, seed)
        publish = [sys.executable, "-c", PUBLISH, str(disk / "table-1"), str(pool)]
        subprocess.run(publish, check=True)  # and it is gone
        places = stack.enter_context(namespaces(count))
        begun = time.monotonic()
        servers = [Server(place, ROWS_PER_HEAD, {"pool": f"pool:{pool}"}) for place in places]
        for server in servers:
            stack.callback(server.close)
        for server in servers:
            server.connect()
        ready = time.monotonic() - begun
        tokens = _check_reads(servers, disk / "table-1")
        size = sum(place.rows for place in read_header(pool).layers.values()) * FORMAT.row_bytes
        copies = sum(one["Pss"] for one in ask_all(servers, memory=str(pool))) / size
        assert 0.98 < copies < 1.05, f"expected one copy of the rows, found {copies:.3f}"
        # A new epoch: who has the old one ends on it, and who comes later gets the new one.
        publish_pool(disk / "table-2", pool)
        _check_reads(servers, disk / "table-1")
        servers[0].close()
        again = Server(places[0], ROWS_PER_HEAD, {"pool": f"pool:{pool}"})
        stack.callback(again.close)
        again.connect()
        _check_reads([again], disk / "table-2")
        pool.unlink()
        _check_reads([again], disk / "table-2")  # mapped, though it has no name any more
        _check_reads(servers[1:], disk / "table-1")
        try:
            open_store(f"pool:{pool}", layer=LAYERS[0])
            raise AssertionError("expected no pool after it was removed")
        except StoreError:
            pass
    return {
        "servers": count,
        "copies in memory": round(copies, 3),
        "tokens": tokens,
        "until all are ready, s": round(ready, 1),
        "bandwidth of each": BANDWIDTH,
    }


def _check_reads(servers: Sequence[Server], table: Path) -> int:
    """Asserts that all servers read the table's rows. Returns tokens that they also fused."""
    expected = expected_rows(f"file:{table}", 5)
    for found in ask_all(servers, rows="pool", seed=5):
        assert found == expected, f"expected the rows of {table.name}, found {found}"
    runs = ask_all(servers, run="pool", seconds=0.5, seed=6, fuse=True)
    assert all(one["tokens"] for one in runs)
    return sum(one["tokens"] for one in runs)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--servers", type=int, default=SERVERS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    gaps = missing()
    if gaps:
        print("rack_pool: expected " + "; ".join(gaps) + "; found none", file=sys.stderr)
        return 2
    for what, value in run(options.servers).items():
        print(f"{what}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
