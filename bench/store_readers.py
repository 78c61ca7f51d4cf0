"""Many readers of one table: their speed together, and how many copies of the table are in memory.

Part of bench/store.py. Each reader asks for the same hot rows, in an order of its own.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from probe import AHEAD, Probe, huge
from store_disk import ROW_BYTES, OnDisk
from store_ram import LIMIT, use_threads
from turns import Result, Variant, best_first, rows_a_second

from engraphy.store import CacheStore, RowStore, open_store
from engraphy.store.sets import WAYS, set_bytes
from engraphy.table.shards import HEADER_BYTES

COUNTS = (1, 2, 4, 8)
HOT = 16_384  # rows
CALL = 1024  # rows a call
ORDERS = 8  # calls of a reader until its ids come again
LARGE = 16 * CALL  # rows a call: copying takes far longer than passing on the interpreter's lock
KEPT = 0.8  # share of one reader's speed that all of them together should reach
PATIENCE = 300  # seconds until a reader is given up
forked = multiprocessing.get_context("fork")


def readers(probe: Probe, table: OnDisk, calls: int, rounds: int) -> list[Result]:
    """Speeds of 1 to 8 threads and processes, with `calls` calls each. They read a mapped file in
    small calls, and the same number of rows in large ones. Threads also read a cache before it."""
    use_threads(1)
    hot = np.random.default_rng(10).choice(table.shard_rows, HOT, replace=False)
    url = f"file:{table.path}?read=mmap"
    store = open_store(url, layer=0)
    populated = open_store(f"{url}&populate=1", layer=0)
    cache = CacheStore(open_store(url, layer=0), 4 * HOT // WAYS * set_bytes(ROW_BYTES))
    memory = np.memmap(table.shards[0], np.uint8, "r", HEADER_BYTES)
    kinds: dict[str, Callable[[int], Variant]] = {
        LIMIT: lambda count: _probe_readers(probe, memory, hot, count, calls),
        "threads, file:": lambda count: _thread_readers(store, hot, count, calls),
        "threads, populated file:": lambda count: _thread_readers(populated, hot, count, calls),
        "threads, large calls, file:": lambda count: _thread_readers(
            store, hot, count, max(1, calls // 16), LARGE
        ),
        "threads, cache": lambda count: _thread_readers(cache, hot, count, max(1, calls // 4)),
        "processes, file:": lambda count: _process_readers(url, hot, count, calls),
    }
    variants = {f"{kind}, {count}": make(count) for kind, make in kinds.items() for count in COUNTS}
    speeds = rows_a_second(variants, rounds, seed=11)
    for opened in (store, populated, cache):
        opened.close()
    results = []
    for kind in list(kinds)[1:]:
        own = {name: speed for name, speed in speeds.items() if name.startswith((LIMIT, kind))}
        asked = {f"{kind}, {count}": [(KEPT, f"{kind}, 1")] for count in COUNTS[1:]}
        title = f"readers of {HOT} hot rows: {kind}, together"
        results.append(Result(title, ROW_BYTES, best_first(own, LIMIT), LIMIT, asked))
        print(results[-1].markdown(), flush=True)
    return results


def _batches(hot: np.ndarray, reader: int, rows: int = CALL) -> np.ndarray:
    return np.random.default_rng(reader).choice(hot, (ORDERS, rows))


def _probe_readers(
    probe: Probe, memory: np.ndarray, hot: np.ndarray, count: int, calls: int
) -> Variant:
    out = huge(count * CALL * ROW_BYTES)
    times = max(1, calls // ORDERS)
    parts = [np.tile(_batches(hot, reader).reshape(-1), times) for reader in range(count)]
    ids_N = np.concatenate(parts)
    return Variant(
        len(ids_N),
        lambda: None,
        lambda _: probe.gather(
            memory, ids_N, ROW_BYTES, out, count, AHEAD[1], False, call_rows=CALL
        ),
    )


def _thread_readers(
    store: RowStore, hot: np.ndarray, count: int, calls: int, rows: int = CALL
) -> Variant:
    def run(_: None) -> float:
        spans: list[tuple[float, float]] = []
        start = threading.Barrier(count)

        def one(reader: int) -> None:
            spans.append(_read(store, hot, reader, calls, start, rows))

        threads = [threading.Thread(target=one, args=(reader,)) for reader in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return _between(spans, count)

    return Variant(count * calls * rows, lambda: None, run)


def _process_readers(url: str, hot: np.ndarray, count: int, calls: int) -> Variant:
    def one(reader: int, start: Any, answers: Any) -> None:
        store = open_store(url, layer=0)
        answers.put(_read(store, hot, reader, calls, start))

    return Variant(
        count * calls * CALL, lambda: None, lambda _: _between(_in_processes(one, count), count)
    )


def _read(
    store: RowStore, hot: np.ndarray, reader: int, calls: int, start: Any, rows: int = CALL
) -> tuple[float, float]:
    """When this reader began and when it ended; the clock is the same in all processes."""
    batches = _batches(hot, reader, rows)
    out_NR = np.zeros((rows, ROW_BYTES), np.uint8)
    store.gather(hot)
    start.wait(PATIENCE)
    begun = time.monotonic()
    for call in range(calls):
        store.gather(batches[call % ORDERS], out=out_NR)
    return begun, time.monotonic()


def _between(spans: list[tuple[float, float]], count: int) -> float:
    if len(spans) != count:
        raise SystemExit(f"readers: expected {count} to end, {len(spans)} did")
    return max(end for _, end in spans) - min(begun for begun, _ in spans)


def _in_processes(work: Callable[[int, Any, Any], None], count: int) -> list[Any]:
    """Runs `work(number, barrier, answers)` in `count` forked processes. Returns what each puts
    into `answers`."""
    start = forked.Barrier(count)
    answers = forked.Queue()
    children = [
        forked.Process(target=work, args=(number, start, answers), daemon=True)
        for number in range(count)
    ]
    for child in children:
        child.start()
    results = [answers.get(timeout=PATIENCE) for _ in children]
    for child in children:
        child.join()
    return results


def copies(table: OnDisk, shared: Path, count: int = 8) -> list[dict[str, Any]]:
    """How many copies of the table are in memory while `count` processes have all of it mapped: the
    sum of the proportional set sizes of their mappings. A pool is made in `shared`, which needs
    room for one."""
    results = [_copies(f"file:{table.path}?populate=1", table.path, count)]
    folder = Path(tempfile.mkdtemp(prefix="engraphy-bench-", dir=shared))
    try:
        results.append(_copies(f"pool:{folder / 'pool'}?from={table.path}", folder / "pool", count))
    finally:
        shutil.rmtree(folder)
    print(f"\n### {count} processes, the whole table in the page table of each\n")
    print("| path | copies in memory | asked |\n|---|---|---|")
    for result in results:
        print(f"| {result['path']} | {result['copies']:.3f} | at most 1.05 |", flush=True)
    return results


def _copies(url: str, folder: Path, count: int) -> dict[str, Any]:
    open_store(url, layer=0).close()  # fills a pool

    def one(number: int, all_there: Any, answers: Any) -> None:
        store = open_store(url, layer=0)
        all_there.wait(PATIENCE)
        sizes = _mapped_sizes(folder)
        all_there.wait(PATIENCE)
        store.close()
        answers.put(sizes)

    sizes = _in_processes(one, count)
    table_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    proportional = sum(process["Pss:"] for process in sizes)
    return {
        "path": url.partition(":")[0] + ":",
        "processes": count,
        "table_bytes": table_bytes,
        "resident_bytes_each": sizes[0]["Rss:"],
        "proportional_bytes_of_all": proportional,
        "copies": round(proportional / table_bytes, 4),
    }


def _mapped_sizes(folder: Path) -> dict[str, int]:
    """Bytes of this process' mappings of files in `folder`: resident, and divided by the number of
    processes that map them."""
    sizes = {"Rss:": 0, "Pss:": 0}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-1].startswith(f"{folder}/")
        elif ours and words[0] in sizes:
            sizes[words[0]] += int(words[1]) * 1024
    return sizes
