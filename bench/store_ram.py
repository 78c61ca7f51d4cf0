"""Stores in RAM beside the limit of the memory: gathers, rows as numbers, torch's own look-ups, and
hits of a row cache.

Part of bench/store.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from probe import AHEAD, Probe, huge
from turns import Result, Variant, best_first, rows_a_second, threads_in_words

from engraphy import _native
from engraphy.rows import RowFormat, read
from engraphy.store import CacheStore, RowStore, open_store, warm
from engraphy.store.sets import WAYS, set_bytes

LIMIT = "C probe"
GATHER = "ram:, gather(out=)"
EMBEDDING = "nn.Embedding"
HITS = "cache, hits"
READS = 3  # of each row before the clock starts: a cache counts no further
LOAD = 0.6  # share of a cache's places that is filled: sets fill unevenly


def filled(rows: int, row_bytes: int) -> RowStore:
    store = open_store("ram:", rows=rows, row_bytes=row_bytes)
    some = np.random.default_rng(0).integers(0, 256, (65_536, row_bytes), np.uint8)
    for first in range(0, rows, len(some)):
        ids = np.arange(first, min(first + len(some), rows))
        store.scatter(ids, some[: len(ids)])
    return store


def use_threads(threads: int) -> None:
    _native.set_threads(threads)
    torch.set_num_threads(threads)


def ram(
    probe: Probe, table_bytes: int, sizes: list[int], ids: int, threads: list[int], rounds: int
) -> list[Result]:
    """Speeds of tables of `table_bytes` with rows of each size, `ids` random rows a call, into a
    reused buffer."""
    buffer = huge(ids * max(sizes))
    results = []
    for row_bytes in sizes:
        store = filled(table_bytes // row_bytes, row_bytes)
        for count in threads:
            use_threads(count)
            variants = _ram_variants(probe, store, buffer, ids, count)
            speeds = best_first(rows_a_second(variants, rounds, seed=row_bytes), LIMIT)
            title = f"RAM, {row_bytes} B rows, {threads_in_words(count)}"
            asked = {GATHER: [(0.7, LIMIT), (3.0, EMBEDDING)]}
            results.append(Result(title, row_bytes, speeds, LIMIT, asked))
            print(results[-1].markdown(), flush=True)
        store.close()
    return results


def probes(
    probe: Probe,
    table: np.ndarray,
    row_bytes: int,
    fresh_ids: Callable[[], np.ndarray],
    ids: int,
    out: np.ndarray,
    threads: int,
) -> dict[str, Variant]:
    """The probe's ways to copy rows; the best is the limit."""

    def copies(ahead: int, stream: bool) -> Variant:
        def run(ids_N: np.ndarray) -> float:
            return probe.gather(table, ids_N, row_bytes, out, threads, ahead, stream)

        return Variant(ids, fresh_ids, run)

    return {
        f"{LIMIT}, {ahead} ahead{', past the caches' * stream}": copies(ahead, stream)
        for ahead in AHEAD
        for stream in (False, True)
    }


def _ram_variants(
    probe: Probe, store: RowStore, buffer: np.ndarray, ids: int, threads: int
) -> dict[str, Variant]:
    rng = np.random.default_rng(1)
    info = store.info
    out_NR = buffer[: ids * info.row_bytes].reshape(ids, info.row_bytes)
    table = _as_tensor(store)
    table_out = torch.from_numpy(out_NR).view(torch.float32)
    module = torch.nn.Embedding.from_pretrained(table)

    def fresh() -> np.ndarray:
        return rng.integers(0, info.rows, ids)

    def embedded(ids_N: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return module(ids_N)

    def tensor() -> torch.Tensor:
        return torch.from_numpy(fresh())

    variants = probes(probe, _memory(store), info.row_bytes, fresh, ids, out_NR, threads)
    variants[GATHER] = Variant(ids, fresh, lambda ids_N: store.gather(ids_N, out=out_NR))
    if info.row_bytes == RowFormat("fp8", 256).row_bytes:
        numbers = np.zeros((ids, 256), np.uint16)
        variants["ram:, read as bf16 (fp8 + scales)"] = Variant(
            ids, fresh, lambda ids_N: read(store, ids_N, RowFormat("fp8", 256), numbers)
        )
    variants[EMBEDDING] = Variant(ids, tensor, embedded)
    variants["index_select(out=)"] = Variant(
        ids, tensor, lambda ids_N: torch.index_select(table, 0, ids_N, out=table_out)
    )
    return variants


def _as_tensor(store: RowStore) -> torch.Tensor:
    """The store's own rows as float32, not copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are read-only
        return torch.from_numpy(_memory(store)).view(torch.float32)


def _memory(store: RowStore) -> np.ndarray:
    """The store's own rows, uint8 [N, row_bytes], not copied."""
    with store.reading() as shards:
        assert shards is not None
        return shards[0]


def cache(
    cache_bytes: int, asked: dict[int, float], ids: int, threads: list[int], rounds: int
) -> list[Result]:
    """Speeds of hits of a CacheStore that holds all rows it is asked for, beside a gather of the
    same rows from RAM.

    cache_bytes: bytes of the rows. asked: row size -> the share of the gather that hits should
    reach.
    """
    results = []
    for row_bytes, least in asked.items():
        rows = cache_bytes // row_bytes
        behind = filled(rows, row_bytes)
        store = CacheStore(behind, int(rows / LOAD / WAYS) * set_bytes(row_bytes))
        warm(store, 1.0)
        kept = store.kept()
        out_NR = huge(ids * row_bytes).reshape(ids, row_bytes)
        for first in range(0, READS * len(kept), ids):  # rows worth keeping are read often
            store.gather(kept[np.arange(first, first + ids) % len(kept)], out=out_NR)
        for count in threads:
            use_threads(count)
            before = store.stats
            variants = _cache_variants(store, behind, kept, out_NR)
            speeds = rows_a_second(variants, rounds, seed=row_bytes)
            title = f"cache, {row_bytes} B rows, {len(kept)} kept, {threads_in_words(count)}"
            results.append(Result(title, row_bytes, speeds, GATHER, {HITS: [(least, GATHER)]}))
            print(results[-1].markdown(), flush=True)
            if store.stats.misses != before.misses:
                raise SystemExit(f"{title}: expected hits alone, found misses: {store.stats}")
        store.close()
    return results


def _cache_variants(
    store: CacheStore, behind: RowStore, kept: np.ndarray, out_NR: np.ndarray
) -> dict[str, Variant]:
    rng = np.random.default_rng(2)

    def some_kept() -> np.ndarray:
        return kept[rng.integers(0, len(kept), len(out_NR))]

    return {
        GATHER: Variant(len(out_NR), some_kept, lambda ids_N: behind.gather(ids_N, out=out_NR)),
        HITS: Variant(len(out_NR), some_kept, lambda ids_N: store.gather(ids_N, out=out_NR)),
    }
