"""What a step of a row optimiser costs: beside torch's SparseAdam, fbgemm's row-wise Adagrad, and
beside touching the same memory at all.

    python bench/update.py [--rounds 7] [--json FILE]

262,144 gradients of width 64 for a table of 1 GB (4,194,304 rows of 64 f32), ids uniform or Zipf
(probability 1 / rank, ranks spread over the table). One thread on every side. All pages are touched
before, the variants take turns, figures are medians. Timed is what a training loop pays: `step()`
of a row optimiser on gradients that wait in `memory.row_grads`; `step()` of SparseAdam on a sparse
gradient, with its coalescing; `backward()` of fbgemm's fused embedding, if fbgemm_gpu can be
imported. The limit is a C program (probe.c) that adds to the same rows and moments in the order of
their ids, and reads each gradient once in that order. The ids are sorted before. A second one first
does what a step has to do before it writes: it sorts the ids, and reads all gradients in the order
of memory to see that they are finite.

Then RowAdam alone, on tables of 0.1 and 4 GB (12 GB with their moments).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claim, write
from probe import Probe, machine

import engraphy
from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.memory import RowGrad
from engraphy.store import RowStore
from engraphy.train import RowAdagrad, RowAdam, RowNesterov, RowOptimizer

ROWS, DIM, GRADS, BATCHES = 1 << 22, 64, 1 << 18, 3
SMALL, LARGE = ROWS // 10, 4 * ROWS
GIB = 1 << 30

OPTIMIZERS: dict[str, Callable[[EngramMemory], RowOptimizer]] = {
    "RowAdam": RowAdam,
    "RowAdam, moments bf16": partial(RowAdam, moment_dtype="bf16"),
    "RowAdagrad": RowAdagrad,
    "RowNesterov": RowNesterov,
}


def uniform(rows: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, rows, GRADS)


def zipf(rows: int, rng: np.random.Generator) -> np.ndarray:
    ranks_N = np.exp(rng.random(GRADS) * np.log(rows)).astype(np.int64)
    return ranks_N * 2_654_435_761 % rows  # a prime that divides no number of rows here


IDS = {"uniform": uniform, "Zipf": zipf}


def batches(draw: Callable[..., np.ndarray], rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Some pairs of ids [N] and gradients [N, d]."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    return [
        (draw(rows, rng), torch.randn(GRADS, DIM, generator=generator).mul_(1e-3).numpy())
        for _ in range(BATCHES)
    ]


def touch(store: RowStore) -> None:
    """Writes every row: the numbers 0.01 in f32, something small in bf16."""
    with store.updating() as shards:
        assert shards is not None
        for shard in shards:
            shard.reshape(-1).view(np.float32)[:] = 0.01


def new_optimizer(
    make: Callable[[EngramMemory], RowOptimizer], rows: int, memory: EngramMemory | None = None
) -> RowOptimizer:
    """A row optimiser whose rows and moments are all in memory."""
    if memory is None:
        spec = HashSpec.demo((0,), (2,), 1, rows, vocab_size=1000, pad_id=0)
        config = EngramConfig(spec, LayerSpec(8, DIM, order=2), DIM)
        memory = EngramMemory(config, VocabMap.identity(1000))
        touch(memory.stores[0])
    optimizer = make(memory)
    touch(optimizer.moments[0])
    return optimizer


class Ours:
    """Steps of a row optimiser. Filling `row_grads` is not timed."""

    def __init__(self, optimizer: RowOptimizer, given: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self._optimizer = optimizer
        self._given = itertools.cycle(given)

    def __call__(self) -> float:
        ids_N, grad_Nd = next(self._given)
        self._optimizer.memory.row_grads.append(RowGrad(0, ids_N, grad_Nd))
        return seconds(self._optimizer.step)


class Sparse:
    """Steps of SparseAdam. Making the sparse gradient is not timed."""

    def __init__(self, given: list[tuple[np.ndarray, np.ndarray]], shared: dict[str, Any]) -> None:
        if not shared:
            weight = torch.nn.Parameter(torch.full((ROWS, DIM), 0.01))
            shared |= {"weight": weight, "optimizer": torch.optim.SparseAdam([weight], lr=2e-3)}
        self._weight = shared["weight"]
        self._optimizer = shared["optimizer"]
        self._given = itertools.cycle(given)

    def __call__(self) -> float:
        ids_N, grad_Nd = next(self._given)
        self._weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(ids_N)[None],
            torch.from_numpy(grad_Nd),
            (ROWS, DIM),
            check_invariants=False,
        )
        return seconds(self._optimizer.step)


class Fbgemm:
    """Backward passes of fbgemm's embedding, which update its rows. The forward is not timed."""

    def __init__(self, given: list[tuple[np.ndarray, np.ndarray]], shared: dict[str, Any]) -> None:
        if not shared:
            ops = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
            common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
            shared["embedding"] = ops.SplitTableBatchedEmbeddingBagsCodegen(
                [(ROWS, DIM, common.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)],
                optimizer=ops.OptimType.EXACT_ROWWISE_ADAGRAD,
                learning_rate=2e-2,
            )
            for tensor in (*shared["embedding"].parameters(), *shared["embedding"].buffers()):
                tensor.data += 0
        self._embedding = shared["embedding"]
        self._given = itertools.cycle(given)
        self._offsets = torch.arange(GRADS + 1)

    def __call__(self) -> float:
        ids_N, grad_Nd = next(self._given)
        out = self._embedding(torch.from_numpy(ids_N), self._offsets)
        return seconds(partial(out.backward, torch.from_numpy(grad_Nd)))


class Limit:
    """Touching what a step has to touch, by a C program. `checked`: after it has sorted the ids and
    looked whether the gradients are finite."""

    def __init__(
        self,
        probe: Probe,
        optimizer: RowOptimizer,
        given: list[tuple[np.ndarray, np.ndarray]],
        checked: bool = False,
    ) -> None:
        self._probe = probe
        self._checked = checked
        self._stores = (optimizer.memory.stores[0], optimizer.moments[0])
        self._given = itertools.cycle(
            [
                (ids_N, np.unique(ids_N), np.argsort(ids_N, kind="stable"), grad)
                for ids_N, grad in given
            ]
        )
        self._keys = np.zeros((2, GRADS), np.uint64)
        self._out = aligned(1024 * DIM * 4)  # for 1024 gradients, again and again

    def __call__(self) -> float:
        ids_N, ids_U, order_N, grad_Nd = next(self._given)
        taken = 0.0
        if self._checked:
            taken += self._probe.sort(ids_N, self._keys)
            taken += self._probe.finite(grad_Nd)
        taken += self._probe.gather(
            grad_Nd.view(np.uint8), order_N, DIM * 4, self._out, 1, 32, False, 1024
        )
        with self._stores[0].updating() as rows, self._stores[1].updating() as moments:
            assert rows is not None and moments is not None
            return taken + self._probe.update(rows[0], moments[0], ids_U)


def aligned(size: int) -> np.ndarray:
    """uint8 [size] that begins with a cache line."""
    memory = np.zeros(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size]


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


Times = dict[str, tuple[float, float]]  # median, and the standard error of it


def measure(variants: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Each round runs every variant once; one round before is not counted."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            found[name].append(run())
    return {name: summary(values[1:]) for name, values in found.items()}


def summary(values: list[float]) -> tuple[float, float]:
    median = statistics.median(values)
    spread = statistics.median(abs(value - median) for value in values)
    return median, 1.86 * spread / max(len(values), 1) ** 0.5  # of normal errors


def ratio(times: Times, above: str, below: str) -> tuple[float, float]:
    """Of two medians, and its standard error."""
    (a, a_error), (b, b_error) = times[above], times[below]
    return a / b, a / b * ((a_error / a) ** 2 + (b_error / b) ** 2) ** 0.5


def against_others(probe: Probe, rounds: int) -> Iterator[Claim]:
    """The table of 1 GB."""
    memory = None
    optimizers: dict[str, RowOptimizer] = {}
    for name, make in OPTIMIZERS.items():
        optimizers[name] = new_optimizer(make, ROWS, memory)
        memory = optimizers[name].memory
    yield from bytes_beside_rows(optimizers)
    torch_adam: dict[str, Any] = {}
    embedding: dict[str, Any] = {}
    for kind, draw in IDS.items():
        given = batches(draw, ROWS)
        variants: dict[str, Callable[[], float]] = {"SparseAdam": Sparse(given, torch_adam)}
        for name, optimizer in optimizers.items():
            variants[name] = Ours(optimizer, given)
            variants[f"{name}: limit"] = Limit(probe, optimizer, given)
            variants[f"{name}: limit, checked"] = Limit(probe, optimizer, given, checked=True)
        try:
            variants["fbgemm row-wise Adagrad"] = Fbgemm(given, embedding)
        except ImportError as error:
            print(f"fbgemm row-wise Adagrad: not installed ({error})")
        times = measure(variants, rounds)
        distinct = statistics.mean(len(np.unique(ids_N)) for ids_N, _ in given)
        print(f"\n{kind} ids, {distinct / GRADS:.0%} of them distinct")
        for name, (median, error) in times.items():
            print(f"  {name:<36} {median * 1e3:8.1f} ms +- {error * 1e3:.1f}", end="")
            print(f" {times['SparseAdam'][0] / median:6.1f}x", end="")
            if name in optimizers:
                share = times[f"{name}: limit"][0] / median
                checked = times[f"{name}: limit, checked"][0] / median
                print(f"   {share:.0%} of the limit, {checked:.0%} of the checked one", end="")
            print()
        for name, goal in (("RowAdam", 15.0), ("RowAdagrad", 20.0), ("RowNesterov", None)):
            found, error = ratio(times, "SparseAdam", name)
            limit, _ = ratio(times, "SparseAdam", f"{name}: limit, checked")
            what = f"{name}, {kind} ids, beside SparseAdam"
            yield Claim(what, found, "x", goal, limit=limit, error=error)
        if "fbgemm row-wise Adagrad" in times:
            found, error = ratio(times, "fbgemm row-wise Adagrad", "RowAdagrad")
            what = f"RowAdagrad, {kind} ids, beside fbgemm row-wise Adagrad"
            yield Claim(what, found, "x", error=error)


def bytes_beside_rows(optimizers: dict[str, RowOptimizer]) -> Iterator[Claim]:
    for name, goal in (("RowAdagrad", 1.02), ("RowAdam, moments bf16", 2.0)):
        rows = optimizers[name].memory.stores.bytes
        share = (rows + optimizers[name].moment_bytes) / rows
        what = f"{name}: bytes of rows and moments beside f32 rows"
        yield Claim(what, share, "x", goal, "at most")


def growth(probe: Probe, rounds: int) -> Iterator[Claim]:
    """RowAdam on a small and a large table."""
    variants: dict[str, Callable[[], float]] = {}
    for name, rows in (("small", SMALL), ("large", LARGE)):
        optimizer = new_optimizer(RowAdam, rows)
        given = batches(uniform, rows)
        variants[name] = Ours(optimizer, given)
        variants[f"{name}: limit"] = Limit(probe, optimizer, given)
    times = measure(variants, 2 * rounds)
    print("\nRowAdam, uniform ids")
    for name, rows in (("small", SMALL), ("large", LARGE)):
        size = rows * DIM * 4 / GIB
        print(
            f"  {size:4.1f} GiB of rows {times[name][0] * 1e3:8.1f} ms, "
            f"limit {times[f'{name}: limit'][0] * 1e3:.1f} ms"
        )
    found, error = ratio(times, "large", "small")
    limit, _ = ratio(times, "large: limit", "small: limit")
    what = "RowAdam's step at 4 GB beside that at 0.1 GB"
    yield Claim(what, found, "x", 1.15, "at most", limit=limit, error=error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where the claims are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engraphy.set_threads(1)
    where = machine(Path.cwd())
    print(f"{where['cpu']}, {where['l3']} L3, huge pages {where['huge_pages']}; one thread")
    probe = Probe()
    claims = list(against_others(probe, options.rounds))
    gc.collect()
    claims += growth(probe, options.rounds)
    print()
    for claim in claims:
        goal = "" if claim.goal is None else f", goal {claim.sense} {claim.goal:g}"
        limit = "" if claim.limit is None else f", the C program {claim.limit:.2f}"
        print(f"{claim.what}: {claim.found:.2f}{claim.unit}{goal}{limit}")
    write(options.json, "update", where, claims)


if __name__ == "__main__":
    main()
