"""What a simulated rack waits for its rows, beside what servers of this machine wait.

    python bench/simulate.py [--forwards 12] [--disk FOLDER] [--json FILE]

1, 2, 4 and 8 processes are the servers. Each runs forwards of 6 blocks, which sleep 20 ms, with a
memory at blocks 0 and 3 that is read ahead by a Prefetcher: 64 sequences, 24 rows of 264 bytes of
each in a layer. They share one of these tiers:

- pool: a region in /dev/shm, mapped;
- cache: rows in a cache of each server, in front of rows that come after a pause, as from memory
  that is far away (0.02 ms a read, 4 of them under way);
- disk: a table of half a GiB a layer, read past the page cache;
- row server: another process, which gathers rows and sends them over TCP on the loopback, one
  request after the other.

The clock is calibrated right before each run, since a virtual machine's disk and CPU change by the
minute: one server with a memory at block 0 alone gives the time of a batch; and three processes
that ask at once give the rows a second of the disk, or of the row server. It holds if the median
wait of a forward differs by at most 20 % of what is simulated or 0.3 ms, whichever is more. No
number of this script is one of CXL.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import passive  # noqa: F401  before torch
import torch
from claims import Claim, write
from probe import machine

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat, Table, VocabMap, open_store
from engraphy.memory import Prefetcher
from engraphy.plan import Batch, Layout, Load, Shared, Tier, simulate
from engraphy.store import CacheStore, RowStore, StoreInfo, WrapperStore, publish_pool

BLOCKS, LAYERS, BATCH = 6, (0, 3), 64
BLOCK = 20e-3  # seconds
FORMAT = RowFormat("fp8", 256)
VOCAB = 4096
HEADS, ORDERS = 8, (2, 3, 4)
COLUMNS = HEADS * len(ORDERS)
ROWS = BATCH * COLUMNS  # of a layer in a forward
POOL_ROWS = 1 << 19  # of a layer, about
DISK_BYTES = 1 << 29  # of a layer
SERVERS = (1, 2, 4, 8)
FAR, FAR_IN_FLIGHT = 2e-5, 4
CACHED = 0.25  # of the rows of a layer, which the stream prefers
SHARE, LEAST = 0.2, 3e-4  # of the goal
WARM = 3  # forwards that are not counted
CONNECTIONS = 3  # processes that ask a part at once to find its rate
_FORK = multiprocessing.get_context("fork")

Open = Callable[[int], RowStore]
Draw = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True)
class Shelf:
    """A tier: how a server opens a layer of it, and which rows it asks for.

    near: the same without the pauses that stand for distance; None if there are none.
    shared: whether the servers share what gives the rows.
    """

    name: str
    open: Open
    draw: Draw
    near: Open | None = None
    shared: bool = False


@dataclass(frozen=True)
class Row:
    """One line: servers, hit rate, median waits of a forward, what the busiest part does."""

    shelf: str
    servers: int
    hit_rate: float
    simulated: float
    measured: float
    busy: float

    @property
    def off(self) -> float:
        """The difference as a part of what is allowed."""
        allowed = max(SHARE * self.simulated, LEAST)
        return abs(self.measured - self.simulated) / allowed


class Far(WrapperStore):
    """Rows that come after a pause: a latency, and so many reads under way."""

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        time.sleep(FAR + len(ids_N) * FAR / FAR_IN_FLIGHT)
        super()._gather(ids_N, out_NR)


class FromServer(RowStore):
    """Rows of a row server: ids out, rows back, one request at a time."""

    def __init__(self, port: int, rows: int) -> None:
        super().__init__()
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rows = rows

    @property
    def info(self) -> StoreInfo:
        return StoreInfo("server", self._rows, FORMAT.row_bytes, False, format=FORMAT)

    def close(self) -> None:
        super().close()
        self._socket.close()

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        self._socket.sendall(struct.pack("<q", len(ids_N)) + ids_N.tobytes())
        receive(self._socket, out_NR.reshape(-1).data)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise NotImplementedError


def receive(connection: socket.socket, out: memoryview) -> bool:
    """Fills `out`. Returns False if the other side has closed."""
    while out:
        count = connection.recv_into(out)
        if not count:
            return False
        out = out[count:]
    return True


def serve_rows(listener: socket.socket, url: str) -> None:
    """A row server: requests of all connections, one after the other."""
    store = open_store(url, layer=LAYERS[0])
    turn = threading.Lock()

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = bytearray(8)
        while receive(connection, memoryview(head)):
            ids_N = np.empty(struct.unpack("<q", head)[0], np.int64)
            receive(connection, ids_N.data.cast("B"))
            with turn:
                connection.sendall(store.gather(ids_N))

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


# --- servers --------------------------------------------------------------------------------------


def server(
    open_one: Open,
    draw: Draw,
    layers: tuple[int, ...],
    seed: int,
    forwards: int,
    begin: Any,
    answer: Any,
) -> None:
    """One server. Answers with the waits and the seconds of its blocks, and its hits and reads."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    stores = {layer: open_one(layer) for layer in layers}
    sources = {layer: (store, FORMAT) for layer, store in stores.items()}
    for store in stores.values():
        if isinstance(store, CacheStore):
            for _ in range(60):  # fills the cache as the forwards will use it
                store.gather(draw(rng, ROWS))
    before = [store.stats for store in stores.values()]
    with Prefetcher(sources) as reader:
        begin.wait()
        time.sleep(rng.uniform(0, BLOCKS * BLOCK))
        waits, blocks = [], []
        for number in range(forwards + WARM):
            ids = {layer: draw(rng, ROWS).reshape(BATCH, 1, COLUMNS) for layer in layers}
            waited, slept = forward(reader, ids)
            if number >= WARM:
                waits.append(waited)
                blocks.append(slept)
    after = [store.stats for store in stores.values()]
    pairs = list(zip(before, after, strict=True))
    reads = sum(new.rows - old.rows for old, new in pairs)
    hits = sum((new.hits or 0) - (old.hits or 0) for old, new in pairs)
    answer.put((waits, blocks, hits, reads))


def forward(reader: Prefetcher, ids: dict[int, np.ndarray]) -> tuple[float, float]:
    """Seconds that blocks waited for rows, and seconds that blocks took."""
    tickets = {layer: reader.submit({layer: rows}) for layer, rows in ids.items()}
    waited = slept = 0.0
    for block in range(BLOCKS):
        begun = time.perf_counter()
        if block in tickets:
            tickets[block].wait()
        waiting = time.perf_counter()
        time.sleep(BLOCK)
        waited += waiting - begun
        slept += time.perf_counter() - waiting
    return waited, slept


Answer = tuple[list[float], list[float], int, int]


def together(
    open_one: Open, draw: Draw, layers: tuple[int, ...], servers: int, forwards: int
) -> list[Answer]:
    """What so many servers at once answer."""
    begin = _FORK.Barrier(servers)
    answer = _FORK.Queue()
    processes = [
        _FORK.Process(target=server, args=(open_one, draw, layers, seed, forwards, begin, answer))
        for seed in range(servers)
    ]
    for process in processes:
        process.start()
    answers = [answer.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return answers


def alone(open_one: Open, draw: Draw, forwards: int) -> float:
    """Seconds of a batch: what one server waits with a memory at block 0 alone."""
    waits, _, _, _ = together(open_one, draw, (0,), 1, forwards)[0]
    return statistics.median(waits)


def calibrated(shelf: Shelf, forwards: int) -> tuple[Tier, Shared]:
    """The tier as it is now."""
    if shelf.near is not None:
        software = alone(shelf.near, shelf.draw, forwards)
        return Tier("far", "a pause", 0, FAR, FAR_IN_FLIGHT / FAR), Shared(request=software)
    seconds = alone(shelf.open, shelf.draw, forwards)
    tier = Tier.measured(shelf.name, "one server", (Batch(ROWS, seconds, seconds),), unit=0)
    return tier, Shared(rate=rate_of(shelf.open, shelf.draw) if shelf.shared else math.inf)


def run(shelf: Shelf, servers: int, forwards: int) -> Row:
    """Calibrates the clock, measures a number of servers, and simulates them."""
    tier, shared = calibrated(shelf, forwards)
    answers = together(shelf.open, shelf.draw, LAYERS, servers, forwards)
    measured = statistics.median([wait for waits, _, _, _ in answers for wait in waits])
    block = statistics.mean([slept for _, blocks, _, _ in answers for slept in blocks]) / BLOCKS
    hits = sum(hit for _, _, hit, _ in answers) / sum(reads for *_, reads in answers)
    layout = Layout("servers", config_of(1000), BLOCKS, FORMAT, "bench/simulate.py")
    load = Load(servers, BATCH, 1, block, hits)
    found = simulate(layout, tier, load, shared, forwards=100)
    return Row(shelf.name, servers, hits, found.median, measured, found.busy)


# --- tiers ----------------------------------------------------------------------------------------


def config_of(rows_per_head: int) -> EngramConfig:
    spec = HashSpec.demo(LAYERS, ORDERS, HEADS, rows_per_head, VOCAB, pad_id=0)
    return EngramConfig(spec, LayerSpec(256, spec.columns * FORMAT.d, order=4), FORMAT.d)


def make_table(path: Path, rows_per_head: int) -> Table:
    table = Table.create(path, config_of(rows_per_head), FORMAT, VocabMap.identity(VOCAB))
    rng = np.random.default_rng(4)
    for layer in LAYERS:
        count = table.rows(layer)
        for first in range(0, count, 1 << 17):
            number = min(1 << 17, count - first)
            raw = np.frombuffer(rng.bytes(number * FORMAT.row_bytes), np.uint8)
            raw_NR = raw.reshape(number, -1) & 0x3F  # no NaN
            table.write_rows(layer, first, raw_NR)
    table.seal()
    table.close()
    return table


def evenly(rows: int) -> Draw:
    return lambda rng, count: rng.integers(0, rows, count)


def with_favourites(rows: int, most: int) -> Draw:
    """Half of the reads are of the first `most` rows, the others of any."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        favourite = rng.random(count) < 0.5
        return np.where(favourite, rng.integers(0, most, count), rng.integers(0, rows, count))

    return draw


def rate_of(open_one: Open, draw: Draw, seconds: float = 0.5) -> float:
    """Rows a second that a disk or a row server gives to several processes at once."""

    def ask(answer: Any, seed: int) -> None:
        store = open_one(LAYERS[0])
        rng = np.random.default_rng(seed)
        rows = 0
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            store.gather(draw(rng, ROWS))
            rows += ROWS
        answer.put(rows / (time.perf_counter() - begun))

    answer = _FORK.Queue()
    processes = [_FORK.Process(target=ask, args=(answer, n)) for n in range(CONNECTIONS)]
    for process in processes:
        process.start()
    found = sum(answer.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return found


@contextlib.contextmanager
def shelves(disk: Path) -> Iterator[list[Shelf]]:
    """All tiers."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(dir=disk) as folder,
    ):
        table = make_table(Path(folder, "table"), POOL_ROWS // COLUMNS)
        rows = min(table.rows(layer) for layer in LAYERS)
        publish_pool(table.path, Path(memory, "pool"))
        url = f"pool:{memory}/pool"
        draw = evenly(rows)

        def pool(layer: int) -> RowStore:
            return open_store(url, layer=layer)

        yield [
            Shelf("pool", pool, draw),
            _cached(pool, rows),
            _on_disk(Path(folder, "large")),
            _row_server(url, rows),
        ]


def _cached(pool: Open, rows: int) -> Shelf:
    most = int(CACHED * rows / 4)
    budget = int(CACHED * rows) * FORMAT.row_bytes

    def cached(layer: int) -> RowStore:
        return CacheStore(Far(pool(layer)), budget)

    def near(layer: int) -> RowStore:
        return CacheStore(pool(layer), budget)

    return Shelf("cache", cached, with_favourites(rows, most), near)


def _on_disk(path: Path) -> Shelf:
    table = make_table(path, DISK_BYTES // FORMAT.row_bytes // COLUMNS)
    rows = min(table.rows(layer) for layer in LAYERS)
    url = f"file:{path}?direct=1"

    def direct(layer: int) -> RowStore:
        return open_store(url, layer=layer)

    return Shelf("disk", direct, evenly(rows), shared=True)


def _row_server(url: str, rows: int) -> Shelf:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listener.getsockname()[1]
    process = _FORK.Process(target=serve_rows, args=(listener, url), daemon=True)
    process.start()
    listener.close()

    def connect(layer: int) -> RowStore:
        return FromServer(port, rows)

    return Shelf("row server", connect, evenly(rows), shared=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forwards", type=int, default=12)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", help="one tier")
    parser.add_argument("--json", type=Path, help="writes what is claimed to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine(options.disk)
    print(" | ".join(f"{key} {value}" for key, value in where.items()))
    rows: list[Row] = []
    with shelves(options.disk) as found:
        for shelf in found:
            if options.only not in (None, shelf.name):
                continue
            for servers in SERVERS:
                rows.append(run(shelf, servers, options.forwards))
    print("\n| tier | servers | hit rate | wait simulated, ms | measured | off by | holds | busy |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.shelf} | {row.servers} | {row.hit_rate:.1%} | {row.simulated * 1e3:.2f} | "
            f"{row.measured * 1e3:.2f} | {(row.measured - row.simulated) * 1e3:+.2f} | "
            f"{'yes' if row.off <= 1 else 'NO'} | {row.busy:.0%} |"
        )
    claims = [
        Claim(
            f"{name}, 1 to 8 servers: the clock's largest error, of what is allowed",
            max(row.off for row in rows if row.shelf == name),
            "",
            1.0,
            "at most",
        )
        for name in dict.fromkeys(row.shelf for row in rows)
    ]
    write(options.json, "simulate", where, claims)
    for process in multiprocessing.active_children():
        process.kill()  # the row server


if __name__ == "__main__":
    main()
