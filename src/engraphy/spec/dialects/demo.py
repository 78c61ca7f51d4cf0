"""demo: the paper's public demo (arXiv 2601.07372)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..layer import LayerSpec
from .primes import primes_from
from .record import Dialect

if TYPE_CHECKING:
    from ..hash import HashSpec

INT64_MAX = 2**63 - 1
LAYER_PRIME = 10007  # what a layer adds to the seed


def multipliers(spec: HashSpec, index: int) -> tuple[int, ...]:
    """numpy's PCG64, seeded by the model's layer."""
    bound = max(1, INT64_MAX // spec.vocab_size // 2)
    rng = np.random.default_rng(spec.seed + LAYER_PRIME * spec.layer_ids[index])
    values = rng.integers(0, bound, size=spec.order, dtype=np.int64)
    return tuple(int(value) * 2 + 1 for value in values)


def primes(spec: HashSpec) -> tuple[tuple[int, ...], ...]:
    """Layers in list order, then orders, then heads: the next prime that is not taken yet."""
    taken: set[int] = set()
    layers: list[tuple[int, ...]] = []
    for _ in spec.layer_ids:
        row: list[int] = []
        for least in spec.rows_per_head:
            row += _free_primes(least, spec.heads, taken)
        layers.append(tuple(row))
    return tuple(layers)


def _free_primes(least: int, count: int, taken: set[int]) -> list[int]:
    """The first `count` primes from `least` on that are not in `taken`, which gets them."""
    primes = primes_from(least)
    free: list[int] = []
    while len(free) < count:
        prime = next(primes)
        if prime not in taken:
            taken.add(prime)
            free.append(prime)
    return free


DEMO = Dialect("demo", multipliers, primes, LayerSpec.demo)
