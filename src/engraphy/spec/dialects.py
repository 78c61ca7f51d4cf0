"""What the published dialects differ in: how multipliers are drawn and which primes the heads take.

demo: the paper's public demo (arXiv 2601.07372). deepseek_v41: the same rules with one size for all
orders. qwen4: `qwen4_exp` in transformers 5.23, where the layer's index is its position among the
memory layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .hash import HashSpec

_INT64_MAX = 2**63 - 1
_LAYER_PRIME = 10007


def multipliers(spec: HashSpec, index: int) -> tuple[int, ...]:
    """N odd multipliers of the layer at position `index` of spec.layer_ids."""
    return _MULTIPLIERS[spec.dialect](spec, index)


@functools.lru_cache(maxsize=64)
def all_primes(spec: HashSpec) -> tuple[tuple[int, ...], ...]:
    """Moduli of all layers: L tuples of C primes."""
    return _PRIMES[spec.dialect](spec)


def is_prime(value: int) -> bool:
    """Exact for every value below 3.3e24 (Miller-Rabin with the first 13 primes as bases)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if value < 2:
        return False
    for base in bases:
        if value % base == 0:
            return value == base
    odd, twos = value - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        power = pow(base, odd, value)
        if power in (1, value - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % value
            if power == value - 1:
                break
        else:
            return False
    return True


def _primes_above(start: int) -> Iterator[int]:
    value = start
    while True:
        value += 1
        if is_prime(value):
            yield value


def _primes_by_layer(spec: HashSpec) -> tuple[tuple[int, ...], ...]:
    """Layers in list order, then orders, then heads: the next prime above the last one that nobody
    has taken."""
    taken: set[int] = set()
    layers = []
    for _ in spec.layer_ids:
        row: list[int] = []
        for base in spec.rows_per_head:
            found = []
            for prime in _primes_above(base - 1):
                if prime not in taken:
                    taken.add(prime)
                    found.append(prime)
                    if len(found) == spec.heads:
                        break
            row += found
        layers.append(tuple(row))
    return tuple(layers)


def _primes_by_head(spec: HashSpec) -> tuple[tuple[int, ...], ...]:
    """The (global head index + 1)-th prime from `base` on, heads counted through all layers."""
    primes = _primes_above(spec.rows_per_head[0] - 1)
    return tuple(tuple(next(primes) for _ in range(spec.columns)) for _ in spec.layer_ids)


def _multipliers_numpy(spec: HashSpec, index: int) -> tuple[int, ...]:
    bound = max(1, _INT64_MAX // spec.vocab_size // 2)
    rng = np.random.default_rng(spec.seed + _LAYER_PRIME * spec.layer_ids[index])
    return tuple(
        int(value) * 2 + 1 for value in rng.integers(0, bound, size=spec.order, dtype=np.int64)
    )


def _multipliers_splitmix(spec: HashSpec, index: int) -> tuple[int, ...]:
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    bound = max(1, _INT64_MAX // spec.vocab_size // 2)
    values = []
    for i in range(spec.order):
        z = (spec.seed + _LAYER_PRIME * index + gamma * (i + 2)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append((z ^ (z >> 31)) % bound * 2 + 1)
    return tuple(values)


_MULTIPLIERS = {
    "demo": _multipliers_numpy,
    "deepseek_v41": _multipliers_numpy,
    "qwen4": _multipliers_splitmix,
}
_PRIMES = {"demo": _primes_by_layer, "deepseek_v41": _primes_by_layer, "qwen4": _primes_by_head}
DIALECTS = tuple(_PRIMES)
