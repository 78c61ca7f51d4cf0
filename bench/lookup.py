"""Looking up a batch beside the limit of the memory and beside nn.Embedding.

    python bench/lookup.py [--gib 8] [--rounds 9] [--threads 1 2] [--json FILE]

One buffer of `--gib` on huge pages, every page written before, is the table of each variant in
turn; the variants take turns within a round, on ids that were not used lately.

Rows as they are: `store.gather(ids, out=)` beside the C probe, which copies the same number of
random rows of the same table into the same buffer. The best of its ways is the limit.

Ids to rows, addresses included: `memory.lookup` and `lookup.rows` for 8 x 2048 token ids and two
layers of 16 columns, as in inference: 524,288 rows. `nn.Embedding` has the same table as one
weight, and gets the finished row ids, flat, so it does less: it hashes nothing. Both give the same
numbers, or the benchmark ends. bf16 rows go to a memory whose weights are bf16.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claim, write
from memory_store import MemoryStore
from probe import Probe, huge, machine
from store_ram import LIMIT, probes, use_threads
from turns import Variant, rows_a_second, threads_in_words

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.rows import RowFormat
from engraphy.store import RowStore

GATHERED = 1 << 18  # rows a call
BATCH, TOKENS, LAYERS, HEADS = 8, 2048, (1, 4), 8
IDS = 129_280
LOOKUP, EMBEDDING, GATHER = "memory.lookup", "nn.Embedding", "store.gather"
LOOKUP_GOALS = {128: 4.0, 256: 3.5}


def limit_of(speeds: dict[str, float]) -> float:
    return max(speed for name, speed in speeds.items() if name.startswith(LIMIT))


def gathers(
    probe: Probe, table: np.ndarray, out: np.ndarray, threads: int, rounds: int
) -> list[Claim]:
    """Rows as they are, of each size."""
    rng = np.random.default_rng(threads)
    claims = []
    for row_bytes in (64, 128, 256, 264, 512):
        store = MemoryStore(table, row_bytes)
        out_NR = out[: GATHERED * row_bytes].reshape(GATHERED, row_bytes)

        def fresh(rows: int = store.info.rows) -> np.ndarray:
            return rng.integers(0, rows, GATHERED)

        def gather(
            ids_N: np.ndarray, store: RowStore = store, out_NR: np.ndarray = out_NR
        ) -> np.ndarray:
            return store.gather(ids_N, out=out_NR)

        variants = probes(probe, table, row_bytes, fresh, GATHERED, out_NR, threads)
        variants[GATHER] = Variant(GATHERED, fresh, gather)
        speeds = rows_a_second(variants, rounds, seed=row_bytes)
        share = speeds[GATHER] / limit_of(speeds)
        print(
            f"| {row_bytes} | {speeds[GATHER] / 1e6:.1f} | {limit_of(speeds) / 1e6:.1f} | "
            f"{share:.2f} |",
            flush=True,
        )
        what = f"rows of {row_bytes} B, {threads_in_words(threads)}, beside the C probe"
        claims.append(Claim(what, share, goal=0.8))
    return claims


def make_memory(table: np.ndarray, kind: str, d: int) -> tuple[EngramMemory, torch.Tensor]:
    """A memory of two layers whose rows fill the table, and the table as one weight [N, d]."""
    fmt = RowFormat(kind, d)
    half = len(table) // 2 // fmt.row_bytes * fmt.row_bytes
    spec = HashSpec.demo(
        LAYERS, (2, 3), HEADS, half // fmt.row_bytes // (2 * HEADS) - 400, IDS, pad_id=2
    )
    stores: dict[int, RowStore] = {}
    for index, layer in enumerate(LAYERS):
        size = spec.row_count(layer) * fmt.row_bytes
        stores[layer] = MemoryStore(table[index * half : index * half + size], fmt.row_bytes)
    config = EngramConfig(spec, LayerSpec(64, spec.columns * d, order=3), d)
    memory = EngramMemory(config, VocabMap.identity(IDS), stores, fmt).eval()
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
    weight = torch.from_numpy(table[: 2 * half].view(np.uint8)).view(dtype).reshape(-1, d)
    return memory.to(dtype), weight


def lookups(
    probe: Probe, table: np.ndarray, out: np.ndarray, threads: int, rounds: int
) -> list[Claim]:
    """Token ids to rows beside finished row ids to rows."""
    claims = []
    for kind, d in (("f32", 32), ("bf16", 64), ("f32", 64), ("bf16", 128)):
        memory, weight = make_memory(table, kind, d)
        speeds = _lookup_speeds(probe, memory, weight, table, out, threads, rounds)
        row_bytes = memory.format.row_bytes
        ratio = speeds[LOOKUP] / speeds[EMBEDDING]
        limit = limit_of(speeds) / speeds[EMBEDDING]
        print(
            f"| {row_bytes}, {kind} | {speeds[LOOKUP] / 1e6:.1f} | {speeds[EMBEDDING] / 1e6:.1f} | "
            f"{limit_of(speeds) / 1e6:.1f} | {ratio:.2f} | {limit:.2f} |",
            flush=True,
        )
        what = f"ids to {kind} rows of {row_bytes} B, {threads_in_words(threads)}"
        goal = LOOKUP_GOALS[row_bytes]
        claims.append(Claim(f"{what}, beside nn.Embedding", ratio, goal=goal, limit=limit))
        memory.close()
        gc.collect()
    return claims


def _lookup_speeds(
    probe: Probe,
    memory: EngramMemory,
    weight: torch.Tensor,
    table: np.ndarray,
    out: np.ndarray,
    threads: int,
    rounds: int,
) -> dict[str, float]:
    rng = np.random.default_rng(7)
    module = torch.nn.Embedding.from_pretrained(weight)
    count = BATCH * TOKENS * len(LAYERS) * memory.config.hash.columns
    second = len(weight) // 2  # the first row of the second layer

    def tokens() -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, IDS, (BATCH, TOKENS)))

    def row_ids(ids: torch.Tensor) -> np.ndarray:
        ids_LBTC = memory.addresser.all_rows(ids)
        ids_LBTC[1] += second
        return ids_LBTC.reshape(-1)

    def look_up(ids: torch.Tensor) -> list[torch.Tensor]:
        lookup = memory.lookup(ids)
        return [lookup.rows[layer] for layer in LAYERS]

    some = tokens()
    expected = module(torch.from_numpy(row_ids(some))).view(torch.uint8)
    found = torch.cat([rows.reshape(-1) for rows in look_up(some)]).view(torch.uint8)
    if not torch.equal(found, expected.reshape(-1)):
        raise SystemExit("lookup and nn.Embedding: expected the same rows, found others")
    del expected, found
    embedded: Callable[[Any], Any] = module
    variants = probes(
        probe, table, memory.format.row_bytes, lambda: row_ids(tokens()), count, out, threads
    )
    variants[LOOKUP] = Variant(count, tokens, look_up)
    variants[EMBEDDING] = Variant(count, lambda: torch.from_numpy(row_ids(tokens())), embedded)
    return rows_a_second(variants, rounds, seed=threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=8.0, help="size of the table")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="writes what is claimed to this file")
    options = parser.parse_args()
    where = machine(Path(tempfile.gettempdir()))
    print(" | ".join(f"{key} {value}" for key, value in where.items()))

    table = huge(int(options.gib * 2**30))
    some = np.random.default_rng(0).standard_normal(1 << 24, np.float32).view(np.uint8)
    for first in range(0, len(table), len(some)):
        part = table[first : first + len(some)]
        part[:] = some[: len(part)]
    table[::4096].max()  # the first reads after writing so much are slow
    out = huge(GATHERED * 512)
    out[:] = 0
    probe = Probe()
    claims: list[Claim] = []
    with torch.inference_mode():
        for threads in options.threads:
            use_threads(threads)
            print(f"\nRows as they are, millions a second, {threads_in_words(threads)}\n")
            print(f"| bytes | {GATHER} | {LIMIT} | of it |\n|---|---|---|---|")
            claims += gathers(probe, table, out, threads, options.rounds)
            print(f"\nIds to rows, millions of rows a second, {threads_in_words(threads)}\n")
            print(f"| bytes | {LOOKUP} | {EMBEDDING} | {LIMIT} | times | limit |")
            print("|---|---|---|---|---|---|")
            claims += lookups(probe, table, out, threads, options.rounds)
    write(options.json, "lookup", where, claims)


if __name__ == "__main__":
    main()
