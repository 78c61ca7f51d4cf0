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

The clock is calibrated before: batches of an idle tier, by one process that sleeps between them as
long as a forward; for the disk by `engraphy machine probe`; and the rows a second that a disk or a
row server gives to three processes at once. It holds if the median wait of a forward differs by at
most 20 % of what is simulated or 0.3 ms, whichever is more. No number of this script is one of CXL.
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
from engraphy.plan import Batch, Layout, Load, Shared, Tier, measure, simulate
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
    """A tier: how a server opens a layer of it, which rows it asks for, and what the clock knows.

    hits: whether the hit rate of the servers' caches is taken from the run.
    """

    name: str
    open: Open
    draw: Draw
    tier: Tier
    shared: Shared
    hits: bool = False


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


def server(shelf: Shelf, seed: int, forwards: int, begin: Any, answer: Any) -> None:
    """One server. Answers with the waits and the seconds of its blocks, and its hits and reads."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    stores = {layer: shelf.open(layer) for layer in LAYERS}
    sources = {layer: (store, FORMAT) for layer, store in stores.items()}
    for store in stores.values():
        if isinstance(store, CacheStore):
            for _ in range(60):  # fills the cache as the forwards will use it
                store.gather(shelf.draw(rng, ROWS))
    before = [store.stats for store in stores.values()]
    with Prefetcher(sources) as reader:
        begin.wait()
        time.sleep(rng.uniform(0, BLOCKS * BLOCK))
        waits, blocks = [], []
        for number in range(forwards + WARM):
            ids = {layer: shelf.draw(rng, ROWS).reshape(BATCH, 1, COLUMNS) for layer in LAYERS}
            waited, slept = forward(reader, ids)
            if number >= WARM:
                waits.append(waited)
                blocks.append(slept)
    after = [store.stats for store in stores.values()]
    pairs = list(zip(before, after, strict=True))
    reads = sum(new.rows - old.rows for old, new in pairs)
    misses = sum((new.misses or 0) - (old.misses or 0) for old, new in pairs)
    answer.put((waits, blocks, reads - misses if shelf.hits else 0, reads))


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


def run(shelf: Shelf, servers: int, forwards: int) -> Row:
    """Measures a number of servers, and simulates them."""
    begin = _FORK.Barrier(servers)
    answer = _FORK.Queue()
    processes = [
        _FORK.Process(target=server, args=(shelf, seed, forwards, begin, answer))
        for seed in range(servers)
    ]
    for process in processes:
        process.start()
    answers = [answer.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    measured = statistics.median([wait for waits, _, _, _ in answers for wait in waits])
    block = statistics.mean([slept for _, blocks, _, _ in answers for slept in blocks]) / BLOCKS
    hits = sum(hit for _, _, hit, _ in answers) / sum(reads for *_, reads in answers)
    layout = Layout("servers", config_of(1000), BLOCKS, FORMAT, "bench/simulate.py")
    load = Load(servers, BATCH, 1, block, hits)
    found = simulate(layout, shelf.tier, load, shelf.shared, forwards=100)
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


def idle(name: str, how: str, store: RowStore, draw: Draw) -> Tier:
    """A tier by the batches of one process that has it for itself, dequantised as a memory does."""
    rng = np.random.default_rng(7)
    batches = []
    with Prefetcher({1: (store, FORMAT)}) as reader:
        for count in (ROWS // 4, ROWS):
            taken = []
            for _ in range(16):
                ids = draw(rng, count).reshape(1, 1, count)
                time.sleep(BLOCKS * BLOCK)
                begun = time.perf_counter()
                reader.submit({1: ids}).wait()
                taken.append(time.perf_counter() - begun)
            p99 = float(np.quantile(taken, 0.99))
            batches.append(Batch(count, statistics.median(taken), p99))
    return Tier.measured(name, how, tuple(batches), unit=0)


def rate_of(open_one: Open, draw: Draw, seconds: float = 1.0) -> float:
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
    """All tiers, calibrated."""
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
            Shelf(
                "pool", pool, draw, idle("pool", "a pool, idle", pool(LAYERS[0]), draw), Shared()
            ),
            _cached(pool, rows),
            _on_disk(Path(folder, "large")),
            _row_server(url, rows),
        ]


def _cached(pool: Open, rows: int) -> Shelf:
    most = int(CACHED * rows / 4)
    budget = int(CACHED * rows) * FORMAT.row_bytes

    def cached(layer: int) -> RowStore:
        return CacheStore(Far(pool(layer)), budget)

    near = CacheStore(pool(LAYERS[0]), budget)
    draw = with_favourites(rows, most)
    rng = np.random.default_rng(8)
    for _ in range(60):
        near.gather(draw(rng, ROWS))
    software = idle("near", "the cache over memory", near, draw).seconds(ROWS, FORMAT.row_bytes)
    print(f"cache: {ROWS} rows in {software * 1e3:.3f} ms if the misses cost nothing")
    far = Tier("far", "a pause", 0, FAR, FAR_IN_FLIGHT / FAR)
    return Shelf("cache", cached, draw, far, Shared(request=software), hits=True)


def _on_disk(path: Path) -> Shelf:
    table = make_table(path, DISK_BYTES // FORMAT.row_bytes // COLUMNS)
    rows = min(table.rows(layer) for layer in LAYERS)
    found = measure(path, size=DISK_BYTES // 2).tier
    url = f"file:{path}?direct=1"
    draw = evenly(rows)

    def direct(layer: int) -> RowStore:
        return open_store(url, layer=layer)

    shared = Shared(rate=rate_of(direct, draw) * found.units(FORMAT.row_bytes))
    return Shelf("disk", direct, draw, found, shared)


def _row_server(url: str, rows: int) -> Shelf:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listener.getsockname()[1]
    process = _FORK.Process(target=serve_rows, args=(listener, url), daemon=True)
    process.start()
    listener.close()

    def connect(layer: int) -> RowStore:
        return FromServer(port, rows)

    draw = evenly(rows)
    tier = idle("row server", "TCP on the loopback, idle", connect(LAYERS[0]), draw)
    return Shelf("row server", connect, draw, tier, Shared(rate=rate_of(connect, draw)))


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
            for batch in shelf.tier.batches:
                print(f"{shelf.name}: {batch.reads} reads in {batch.seconds * 1e3:.3f} ms")
            if shelf.shared.rate < math.inf:
                print(f"{shelf.name}: {shelf.shared.rate:,.0f} reads a second in all")
            for servers in SERVERS:
                # Of one or two servers there are few forwards.
                forwards = options.forwards * (2 if servers <= 2 else 1)
                rows.append(run(shelf, servers, forwards))
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
