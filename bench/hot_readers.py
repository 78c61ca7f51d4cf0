"""Readers of the same 1,000 hot rows: a store without a lock beside a dictionary with one.

    python bench/hot_readers.py [--rounds 5] [--json FILE]

1, 2, 4 and 8 threads, and as many processes, read rows of 264 bytes again and again, each in an
order of its own: 48 rows a call (one token of DeepSeek-V4.1), and 16,384 a call (a prompt). The
store is a pool in /dev/shm. The dictionary has the rows as bytes by their ids, and a lock around
each call; processes have a copy of it each, and one lock for all of them. The C program gathers the
same rows with as many threads of its own. All take turns, in another order each round; medians.

More readers than cores cannot be faster than as many as there are cores. Small calls of threads
keep the interpreter's lock, which one thread has at a time: a store cannot give it back in the
time that such a call takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from claims import Claim, write
from probe import AHEAD, Probe, huge, machine
from store_readers import _between, _in_processes
from turns import Variant, seconds_by_round

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat, Table, VocabMap, _native
from engraphy.store import RowStore, open_store, publish_pool

COUNTS = (1, 2, 4, 8)
HOT = 1000
ROW_BYTES = 264
CALLS = {48: 4000, 16_384: 24}  # rows of a call: calls of a reader
ORDERS = 8  # calls of a reader until its ids come again
KINDS = ("store, threads", "store, processes", "dictionary, threads", "dictionary, processes")
PATIENCE = 100


class Locked:
    """The rows of a store as a dictionary with a lock."""

    def __init__(self, store: RowStore, hot: np.ndarray, lock: Any) -> None:
        rows = store.gather(hot)
        self._rows = {int(row): rows[at].tobytes() for at, row in enumerate(hot)}
        self._lock = lock

    def gather(self, ids: list[int], out: np.ndarray) -> None:
        with self._lock:
            found = b"".join(map(self._rows.__getitem__, ids))
            out.reshape(-1)[:] = np.frombuffer(found, np.uint8)


def a_pool(folder: Path) -> str:
    """The URL of a pool with rows of 264 bytes."""
    spec = HashSpec.demo((0,), (2, 3), 8, 4000, 5000, 0)
    fmt = RowFormat("fp8", 256)
    config = EngramConfig(spec, LayerSpec(64, spec.columns * fmt.d), fmt.d)
    table = Table.create(folder / "table", config, fmt, VocabMap.identity(5000))
    some = np.random.default_rng(0).integers(0, 120, (table.rows(0), fmt.row_bytes), np.uint8)
    table.write_rows(0, 0, some)
    table.seal()
    publish_pool(folder / "table", folder / "pool")
    return f"pool:{folder / 'pool'}"


def batches(hot: np.ndarray, reader: int, rows: int) -> np.ndarray:
    return np.random.default_rng(reader).choice(hot, (ORDERS, rows))


def read_on(gather: Callable[..., Any], given: list[Any], calls: int, start: Any, rows: int) -> Any:
    """When this reader began and when it ended; the clock is the same in all processes."""
    out = np.zeros((rows, ROW_BYTES), np.uint8)
    gather(given[0], out=out)
    start.wait(PATIENCE)
    begun = time.monotonic()
    for call in range(calls):
        gather(given[call % ORDERS], out=out)
    return begun, time.monotonic()


def in_threads(gather: Callable[..., Any], ids: list[Any], calls: int, rows: int) -> float:
    spans: list[tuple[float, float]] = []
    start = threading.Barrier(len(ids))

    def one(given: Any) -> None:
        spans.append(read_on(gather, given, calls, start, rows))

    threads = [threading.Thread(target=one, args=(given,)) for given in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _between(spans, len(ids))


def in_processes(make: Callable[[], Any], ids: list[Any], calls: int, rows: int) -> float:
    def one(number: int, start: Any, answers: Any) -> None:
        answers.put(read_on(make().gather, ids[number], calls, start, rows))

    return _between(_in_processes(one, len(ids)), len(ids))


def variants(url: str, hot: np.ndarray, probe: Probe, rows: int) -> dict[str, Variant]:
    calls = CALLS[rows]
    store = open_store(url, layer=0)
    threaded = Locked(store, hot, threading.Lock())
    shared = Locked(store, hot, multiprocessing.get_context("fork").Lock())
    memory = np.ascontiguousarray(store.gather(np.arange(store.info.rows))).reshape(-1)
    out = huge(max(COUNTS) * rows * ROW_BYTES)
    made: dict[str, Variant] = {}
    for count in COUNTS:
        arrays = [list(batches(hot, reader, rows)) for reader in range(count)]
        lists = [[ids.tolist() for ids in given] for given in arrays]
        flat = np.concatenate([np.tile(np.concatenate(a), calls // ORDERS) for a in arrays])
        work: dict[str, Callable[[], float]] = {
            KINDS[0]: lambda ids=arrays: in_threads(store.gather, ids, calls, rows),
            KINDS[1]: lambda ids=arrays: in_processes(
                lambda: open_store(url, layer=0), ids, calls, rows
            ),
            KINDS[2]: lambda ids=lists: in_threads(threaded.gather, ids, calls, rows),
            KINDS[3]: lambda ids=lists: in_processes(lambda: shared, ids, calls, rows),
            "C probe, threads": lambda ids=flat, count=count: probe.gather(
                memory, ids, ROW_BYTES, out, count, AHEAD[1], False, call_rows=rows
            ),
        }
        for kind, run in work.items():
            made[f"{kind}, {count}"] = Variant(count * calls * rows, lambda: None, _timed(run))
    return made


def _timed(run: Callable[[], float]) -> Callable[[Any], float]:
    return lambda _: run()


def measure(url: str, hot: np.ndarray, probe: Probe, rows: int, rounds: int) -> list[Claim]:
    made = variants(url, hot, probe, rows)
    seconds = seconds_by_round(made, rounds, seed=rows)
    speeds = {name: made[name].rows / statistics.median(seconds[name]) for name in made}
    print(f"\n{rows:,} rows a call, M rows/s together (times one reader)\n")
    print("| readers | " + " | ".join(map(str, COUNTS)) + " |")
    print("|---|" + "---|" * len(COUNTS))
    for kind in (*KINDS, "C probe, threads"):
        alone = speeds[f"{kind}, 1"]
        cells = [speeds[f"{kind}, {count}"] for count in COUNTS]
        shown = " | ".join(f"{cell / 1e6:.3g} ({cell / alone:.2f})" for cell in cells)
        print(f"| {kind} | {shown} |", flush=True)
    claims = []
    for kind in KINDS[:2]:
        for count in COUNTS[1:]:
            found = speeds[f"{kind}, {count}"]
            what = f"{count} readers of 1,000 hot rows, {kind}, {rows:,} rows a call, beside one"
            claims.append(Claim(what, found / speeds[f"{kind}, 1"]))
            other = speeds[f"{kind.replace('store', 'dictionary')}, {count}"]
            what = f"{count} readers of 1,000 hot rows, {kind}, {rows:,} rows a call, beside a "
            claims.append(Claim(f"{what}locked dictionary", found / other))
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _native.compiled()
    _native.set_threads(1)
    where = machine(Path(tempfile.gettempdir()))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    probe = Probe()
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        url = a_pool(Path(folder))
        hot = np.random.default_rng(1).choice(open_store(url, layer=0).info.rows, HOT, False)
        for rows in CALLS:
            claims += measure(url, hot, probe, rows, options.rounds)
    write(options.json, "hot_readers", where, claims)


if __name__ == "__main__":
    main()
