"""What servers lose that share one pool, beside a copy for each.

    python bench/pool.py [--rounds 8] [--gib 0.5] [--json FILE]

Needs root: a server is a network namespace on a bridge, with a process that is asked over TCP
(tests/tools/rack_pool.py). Eight of them have a table in three ways:

- pool: one region in /dev/shm, which all of them map;
- private: a region of its own for each, so as much memory as eight copies;
- modelled: the pool, each read with the pause that published figures of a CXL 2.0 pool give
  (750 ns a cache line, 16 of them under way). This is a model: no CXL was there to be measured.

A batch is that of V4.1's decoding with 64 sequences: 3,072 rows of 264 bytes in two layers, found
by hashing random tokens, read ahead, dequantised and fused by the memory layers (256 wide, one
thread a server); or it is only looked up. 1, 2, 4 and 8 servers run at once for 0.3 s in each way.
Ways take turns in an order that is drawn each round; a loss is the median, over the rounds, of the
ratio within a round. Memory is the sum of proportional set sizes of the pool's mappings.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import passive  # noqa: F401  before torch
from claims import Claim, median_and_error, write
from probe import machine

from engraphy.store import publish_pool, read_header

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.tools.rack_pool import (
    SERVERS,
    Server,
    ask_all,
    missing,
    namespaces,
    start_seconds,
    write_table,
)
from tests.tools.rack_server import FORMAT, LAYERS, MODELLED

COUNTS = (1, 2, 4, 8)
SECONDS = 0.3
HEADS = 24
WORK = {True: "looked up and fused", False: "looked up alone"}
Speeds = dict[tuple[str, int, bool], list[float]]


def measure(servers: Sequence[Server], rounds: int) -> Speeds:
    """Tokens a second of all servers together, by way, servers and work, in each round."""
    ways = ["pool", "private", MODELLED]
    every = itertools.product(ways, COUNTS, WORK)
    speeds: Speeds = {(way, count, fuse): [] for way, count, fuse in every}
    shuffle = random.Random(0).shuffle
    order = list(speeds)
    for number in range(rounds + 1):
        shuffle(order)
        for way, count, fuse in order:
            asked = {"run": way, "seconds": SECONDS, "seed": number, "fuse": fuse}
            answers = ask_all(servers[:count], **asked)
            if number:
                speeds[way, count, fuse].append(
                    sum(one["tokens"] / one["seconds"] for one in answers)
                )
    return speeds


def ratio(speeds: Speeds, one: str, other: str, count: int, fuse: bool) -> tuple[float, float]:
    """Median of the ratios within a round, and its standard error."""
    pairs = zip(speeds[one, count, fuse], speeds[other, count, fuse], strict=True)
    return median_and_error([first / second for first, second in pairs])


def show(
    speeds: Speeds, opened: dict[str, list[float]], shared: list[dict[str, int]], size: int
) -> None:
    print("\n| work | servers | pool, tokens/s | private | pool loses, % | modelled CXL loses, % |")
    print("|---|---|---|---|---|---|")
    for (fuse, work), count in itertools.product(WORK.items(), COUNTS):
        pool = statistics.median(speeds["pool", count, fuse])
        private = statistics.median(speeds["private", count, fuse])
        losses = []
        for way, beside in (("pool", "private"), (MODELLED, "pool")):
            found, error = ratio(speeds, way, beside, count, fuse)
            losses.append(f"{100 * (1 - found):.1f} ± {100 * error:.1f}")
        print(f"| {work} | {count} | {pool:,.0f} | {private:,.0f} | {' | '.join(losses)} |")
    print("\n| memory | |\n|---|---|")
    print(f"| rows of the table | {size / 2**30:.3f} GiB |")
    print(f"| resident in each server | {shared[0]['Rss'] / 2**30:.3f} GiB |")
    print(
        f"| sum of proportional set sizes | {sum(one['Pss'] for one in shared) / 2**30:.3f} GiB |"
    )
    print("\n| start | seconds |\n|---|---|")
    for what, values in opened.items():
        print(f"| {what} | {statistics.median(values):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--gib", type=float, default=0.5, help="size of the table")
    parser.add_argument("--json", type=Path, help="writes what is claimed to this file")
    options = parser.parse_args()
    gaps = missing()
    if gaps:
        raise SystemExit(f"bench/pool.py: expected {'; '.join(gaps)}; found none")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    begun = time.monotonic()
    where = machine(Path(tempfile.gettempdir()))
    print(" | ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    rows_per_head = int(options.gib * 2**30 / len(LAYERS) / HEADS / FORMAT.row_bytes)
    opened: dict[str, list[float]] = {}
    with ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        write_table(disk / "table", rows_per_head, 1)
        print(f"a table after {time.monotonic() - begun:.0f} s", flush=True)
        opened["publish a pool, or a private copy"] = [
            _publish(disk / "table", memory / name)
            for name in ("pool", *(f"private-{number}" for number in range(SERVERS)))
        ]
        print(f"9 copies after {time.monotonic() - begun:.0f} s", flush=True)
        places = stack.enter_context(namespaces(SERVERS))
        url = {"pool": f"pool:{memory}/pool"}
        opened["a program with one memory on the pool, alone, imports and all"] = [
            start_seconds(places[0], rows_per_head, url)
        ]
        print(f"a program after {time.monotonic() - begun:.0f} s", flush=True)
        servers: list[Server] = []
        for number, place in enumerate(places):
            urls = {
                "pool": f"pool:{memory}/pool",
                "private": f"pool:{memory}/private-{number}",
                MODELLED: f"pool:{memory}/pool?populate=0",
            }
            server = Server(place, rows_per_head, urls)
            stack.callback(server.close)
            servers.append(server)
        for server in servers:
            server.connect()
        opened["attach the pool, all pages mapped, one of 8 at once"] = [
            one.opened["pool"] for one in servers
        ]
        print(f"8 servers after {time.monotonic() - begun:.0f} s", flush=True)
        shared = ask_all(servers, memory=f"{memory}/pool")
        layers = read_header(memory / "pool").layers
        size = sum(layer.rows for layer in layers.values()) * FORMAT.row_bytes
        speeds = measure(servers, options.rounds)
    show(speeds, opened, shared, size)
    claims: list[Claim] = []
    for fuse, work in WORK.items():
        found, error = ratio(speeds, "pool", "private", SERVERS, fuse)
        what = f"8 servers on one pool, tokens/s lost beside private copies, {work}"
        lost = 100 * (1 - found)
        claims.append(Claim(what, lost, "%", 5.0, "at most", error=100 * error))
    claims.append(
        Claim(
            "8 servers on one pool, copies of the table in memory",
            sum(one["Pss"] for one in shared) / size,
            "x",
            1.05,
            "at most",
        )
    )
    write(options.json, "pool", where, claims)


def _publish(table: Path, target: Path) -> float:
    begun = time.perf_counter()
    publish_pool(table, target)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
