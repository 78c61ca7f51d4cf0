"""Rows of another process over loopback: Arrow Flight beside a raw socket, TLS and Redis.

    python bench/remote.py [--rounds 40] [--json FILE]

One table of a million rows of 264 bytes (fp8), one server process for each way, random ids, one
call under way. All ways take turns, in an order of their own each round. A raw socket is what they
are compared with: a blocking loop that receives ids, gathers with numpy and sends the bytes,
without names, checks, identities or a second server. Bare Flight is the same loop over a DoExchange
stream of pyarrow, so what a client and a server of Engraphy cannot be faster than: the limit of
each claim. Claims are ratios of minima, since a busy machine adds to every call;
medians and 99th percentiles stand beside them. Redis (if redis-server is installed) is the example
examples/other_servers/redis_rows.py.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import claims
import numpy as np
from claims import Claim
from probe import machine
from turns import Variant, seconds_by_round

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat, Table, VocabMap
from engraphy.store import RowStore, open_store
from engraphy.store import remote_wire as wire
from engraphy.store.remote_arrow import flight
from engraphy.store.remote_location import CHANNEL

ROOT = Path(__file__).parents[1]
TLS = ROOT / "tests" / "data" / "tls"
LAYER = 1
ROWS = 1_000_000
FORMAT = RowFormat("fp8", 256)
GOALS = {48: 4.0, 1000: 3.0, 20_000: 1.6}  # rows a call: times a raw socket
TIMES = {48: 20, 1000: 8, 20_000: 1}  # rounds of a size, times --rounds
RAW = "raw socket"
BARE = "bare Flight"
PLAIN = "Flight"
SAFE = "Flight, TLS and a token"
REDIS = "Redis, GETRANGE"
LOCAL = "local file, mapped"

RAW_SERVER = """
import socket, sys
import numpy as np
rows = np.memmap(sys.argv[1], np.uint8, "r", int(sys.argv[3])).reshape(-1, int(sys.argv[2]))
with socket.create_server(("127.0.0.1", 0)) as listener:
    print("listening on", listener.getsockname()[1], flush=True)
    sock, _ = listener.accept()
sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while head := sock.recv(8, socket.MSG_WAITALL):
    ids = np.empty(int.from_bytes(head, "little"), np.int64)
    view = memoryview(ids).cast("B")
    while len(view):
        view = view[sock.recv_into(view):]
    sock.sendall(rows[ids])
"""
BARE_SERVER = """
import sys
import numpy as np
from engraphy.store.remote_arrow import flight, pa
width = int(sys.argv[2])
rows = np.memmap(sys.argv[1], np.uint8, "r", int(sys.argv[3])).reshape(-1, width)
schema = pa.schema([("row", pa.binary(width))])
kind = schema.field(0).type
class Server(flight.FlightServerBase):
    def do_exchange(self, context, descriptor, reader, writer):
        writer.begin(schema)
        for chunk in reader:
            ids = chunk.data.column(0).to_numpy()
            buffer = pa.allocate_buffer(len(ids) * width)
            out = np.frombuffer(buffer, np.uint8).reshape(-1, width)
            np.take(rows, ids, 0, out, "clip")
            array = pa.FixedSizeBinaryArray.from_buffers(kind, len(ids), [None, buffer])
            writer.write_batch(pa.RecordBatch.from_arrays([array], schema=schema))
server = Server("grpc://127.0.0.1:0")
print("listening on", server.port, flush=True)
server.serve()
"""
SERVE = "from engraphy.cli import app; app()"


class RawClient:
    """The other end of RAW_SERVER."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def gather(self, ids_N: np.ndarray, out: np.ndarray) -> None:
        self._socket.sendall(len(ids_N).to_bytes(8, "little") + ids_N.tobytes())
        view = memoryview(out).cast("B")
        while len(view):
            view = view[self._socket.recv_into(view) :]


class BareClient:
    """The other end of BARE_SERVER; its requests are as large as those of Engraphy's client."""

    def __init__(self, port: int) -> None:
        client = flight.FlightClient(f"grpc://127.0.0.1:{port}", generic_options=CHANNEL)
        self._writer, self._reader = client.do_exchange(flight.FlightDescriptor.for_path("rows"))
        self._writer.begin(wire.IDS)

    def gather(self, ids_N: np.ndarray, out: np.ndarray) -> None:
        step = min(wire.MOST_IDS, wire.MOST_BYTES // FORMAT.row_bytes)
        firsts = range(0, len(ids_N), step)
        for first in firsts:
            self._writer.write_batch(wire.id_batch(ids_N[first : first + step]))
        for first in firsts:
            part = out[first : first + step]
            part[:] = wire.rows_of(self._reader.read_chunk().data, len(part), FORMAT.row_bytes)


@contextlib.contextmanager
def process(*command: str) -> Iterator[int]:
    """Runs a server that prints "listening on ...PORT"; gives the port."""
    server = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
    assert server.stdout is not None
    try:
        for line in server.stdout:
            if line.startswith("listening on "):
                break
        else:
            raise SystemExit(f"{command}: expected a server, found that it ended")
        yield int(line.split()[-1].rpartition(":")[2])
    finally:
        server.kill()
        server.wait()


def make_table(path: Path) -> Path:
    """A sealed table of random bytes. Returns the file of its one shard."""
    spec = HashSpec.demo((LAYER,), (2,), 1, ROWS, 60, 0)
    config = EngramConfig(spec, LayerSpec(16, FORMAT.d, order=2), FORMAT.d)
    table = Table.create(path, config, FORMAT, VocabMap.identity(60))
    rng = np.random.default_rng(0)
    for first in range(0, table.rows(LAYER), 65_536):
        count = min(65_536, table.rows(LAYER) - first)
        some = rng.integers(0x60, 0x78, (count, FORMAT.row_bytes), np.uint8)
        table.write_rows(LAYER, first, some)
    table.seal()
    return table.shards(LAYER)[0].path


@contextlib.contextmanager
def redis(store: RowStore) -> Iterator[RowStore]:
    """The rows in a redis-server of its own."""
    sys.path.insert(0, str(ROOT / "examples" / "other_servers"))
    from redis_rows import RedisStore, copy_to_redis

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        server = subprocess.Popen([*command, "--dir", folder], stdout=subprocess.DEVNULL)
        try:
            time.sleep(1)
            copy_to_redis(store, f"127.0.0.1:{port}", LAYER)
            yield RedisStore(f"127.0.0.1:{port}", LAYER)
        finally:
            server.kill()
            server.wait()


Gather = Callable[[np.ndarray, np.ndarray], object]


@contextlib.contextmanager
def ways(folder: Path) -> Iterator[dict[str, Gather]]:
    """Each way to gather rows, by its name."""
    from engraphy.table.shards import HEADER_BYTES

    shard = make_table(folder / "table")
    token = folder / "token"
    token.write_text("a-token")
    serve = [sys.executable, "-c", SERVE, "table", "serve", str(folder / "table"), "--port", "0"]
    safely = ["--cert", TLS / "server.pem", "--key", TLS / "server.key", "--token-file", token]
    raw = [sys.executable, "-c", RAW_SERVER, shard, FORMAT.row_bytes, HEADER_BYTES]
    bare = [sys.executable, "-c", BARE_SERVER, *raw[3:]]
    with contextlib.ExitStack() as stack:
        local = open_store(f"file:{folder / 'table'}?read=mmap", layer=LAYER)
        ports = [
            stack.enter_context(process(*map(str, command)))
            for command in (raw, serve, [*serve, *safely], bare)
        ]
        plain = open_store(f"remote:127.0.0.1:{ports[1]}", layer=LAYER)
        options = f"?tls=1&ca={TLS / 'ca.pem'}&token_file={token}"
        safe = open_store(f"remote:127.0.0.1:{ports[2]}{options}", layer=LAYER)
        found: dict[str, Gather] = {
            RAW: RawClient(ports[0]).gather,
            BARE: BareClient(ports[3]).gather,
            PLAIN: plain.gather,
            SAFE: safe.gather,
            LOCAL: local.gather,
        }
        if shutil.which("redis-server"):
            found[REDIS] = stack.enter_context(redis(local)).gather
        everything = np.arange(local.info.rows)
        for gather in (found[RAW], found[BARE], found[PLAIN], found[SAFE]):
            for first in range(0, len(everything), 100_000):  # all pages are in memory now
                ids = everything[first : first + 100_000]
                gather(ids, np.empty((len(ids), FORMAT.row_bytes), np.uint8))
        yield found
        for store in (plain, safe, local):
            store.close()


def check(found: dict[str, Gather], rows: int) -> None:
    """Every way gives the same rows."""
    ids = np.random.default_rng(5).integers(0, ROWS, rows)
    outs = []
    for gather in found.values():
        outs.append(np.zeros((rows, FORMAT.row_bytes), np.uint8))
        gather(ids, outs[-1])
    assert all(np.array_equal(out, outs[0]) for out in outs), "the ways differ"


def measure(found: dict[str, Gather], rows: int, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of single calls of each way."""
    rng = np.random.default_rng(rows)
    out = np.zeros((rows, FORMAT.row_bytes), np.uint8)
    variants = {
        name: Variant(
            rows,
            lambda: rng.integers(0, ROWS, rows),
            lambda ids_N, gather=gather: gather(ids_N, out),
        )
        for name, gather in found.items()
    }
    seconds = seconds_by_round(variants, rounds * TIMES[rows], seed=rows)
    return {name: np.array(values) for name, values in seconds.items()}


def report(rows: int, seconds: dict[str, np.ndarray]) -> list[Claim]:
    """Prints a table, and returns the claims of the ways that have a goal."""
    least = seconds[RAW].min()
    print(f"\n### {rows:,} rows of {FORMAT.row_bytes} bytes, microseconds a call\n")
    print(f"| way | least | median | p99 | least, times {RAW} | medians, too |")
    print("|---|---|---|---|---|---|")
    middle = float(np.median(seconds[RAW]))
    for name, values in seconds.items():
        median, p99 = np.quantile(values, (0.5, 0.99))
        print(
            f"| {name} | {1e6 * values.min():,.0f} | {1e6 * median:,.0f} | {1e6 * p99:,.0f} | "
            f"{values.min() / least:.2f} | {median / middle:.2f} |"
        )
    what = f"Flight beside a raw socket, {rows:,} rows of {FORMAT.row_bytes} B, minima"
    found, limit = (float(seconds[name].min() / least) for name in (PLAIN, BARE))
    return [Claim(what, found, "x", GOALS[rows], "at most", limit)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the claims to this file")
    arguments = parser.parse_args()
    made: list[Claim] = []
    with tempfile.TemporaryDirectory() as folder:
        facts = machine(Path(folder))
        print(f"{facts['cpu']}, {facts['cores']} cores, {facts['memory']}")
        with ways(Path(folder)) as found:
            for rows in GOALS:
                check(found, rows)
                made += report(rows, measure(found, rows, arguments.rounds))
    for claim in made:
        bare = f"bare Flight {claim.limit:.2f}"
        print(f"{claim.what}: {claim.found:.2f}, {bare}, goal at most {claim.goal:g}")
    claims.write(arguments.json, "remote", facts, made)


if __name__ == "__main__":
    main()
