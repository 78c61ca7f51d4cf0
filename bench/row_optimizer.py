"""Does a row optimiser's step grow with the table? Prints milliseconds and resident memory at 1x,
4x and 16x rows.

    python bench/row_optimizer.py [--rows 262144] [--dim 64] [--grads 65536]

Tables and moments are filled before the clock starts, the three sizes alternate, figures are
medians. The limit beside them, probed in the same run: reading and writing back the same bytes
(rows and moments of the distinct ids) at random positions of the largest table by plain fancy
indexing.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.memory import RowGrad
from engraphy.train import RowAdagrad, RowAdam, RowOptimizer

SCALES = (1, 4, 16)


def make(kind: type[RowAdam] | type[RowAdagrad], rows: int, dim: int) -> RowOptimizer:
    spec = HashSpec.demo((0,), (2,), 1, rows, vocab_size=1000, pad_id=0)
    memory = EngramMemory(
        EngramConfig(spec, LayerSpec(8, dim, order=2), dim), VocabMap.identity(1000)
    )
    memory.init_rows(std=0.02, seed=0)
    return kind(memory)


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=262_144, help="rows of the 1x table")
    parser.add_argument("--dim", type=int, default=64, help="values a row")
    parser.add_argument("--grads", type=int, default=65_536, help="row gradients a step")
    parser.add_argument("--steps", type=int, default=9)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    grad_Nd = rng.standard_normal((options.grads, options.dim), dtype=np.float32)
    for kind in (RowAdam, RowAdagrad):
        optimizers = {scale: make(kind, options.rows * scale, options.dim) for scale in SCALES}
        growth: dict[int, float] = {}
        times: dict[int, list[float]] = {scale: [] for scale in SCALES}
        for step in range(options.steps + 2):
            for scale, optimizer in optimizers.items():
                ids_N = rng.integers(0, options.rows * scale, options.grads)
                optimizer.memory.row_grads.append(RowGrad(0, ids_N, grad_Nd))
                before = resident_mib()
                began = time.perf_counter()
                optimizer.step()
                if step >= 2:
                    times[scale].append(time.perf_counter() - began)
                    growth[scale] = max(growth.get(scale, 0.0), resident_mib() - before)
        medians = {scale: statistics.median(values) * 1e3 for scale, values in times.items()}
        limit = probe(options.rows * SCALES[-1], options.dim, options.grads, rng)
        print(
            f"{kind.__name__}: {options.grads} row gradients of width {options.dim}; "
            f"copying as many rows at random takes {limit:.1f} ms"
        )
        for scale, value in medians.items():
            print(
                f"  {scale:>2}x  {options.rows * scale:>9} rows  {value:7.1f} ms  "
                f"({value / medians[1]:.2f} of 1x, {value / limit:.1f} of the copy)  "
                f"resident memory +{growth[scale]:.0f} MiB a step at most"
            )


def probe(rows: int, dim: int, count: int, rng: np.random.Generator) -> float:
    """Median milliseconds of reading and writing back `count` random rows."""
    table = np.ones((rows, dim), dtype=np.float32)
    times = []
    for _ in range(5):
        ids_N = rng.integers(0, rows, count)
        began = time.perf_counter()
        table[ids_N] = table[ids_N]
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    main()
