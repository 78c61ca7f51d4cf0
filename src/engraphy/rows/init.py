"""Initial rows: each value is a pure function of (seed, layer, row, column).

It does not depend on the chunk, shard or rank that makes it.
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def normal_rows(seed: int, layer: int, ids_N: np.ndarray, dim: int, std: float) -> np.ndarray:
    """Initial rows of a table, normally distributed.

    The classic sum of twelve uniforms (16 bits each, from splitmix64 over the counter): integer
    arithmetic and one multiplication, so the bits are the same on every machine. Values end at six
    standard deviations.

    Args:
        seed: Seed of the whole memory, from 0 to 2**64 - 1.
        layer: The model's layer.
        ids_N: Row ids, integers [N].
        dim: Width of a row, d.
        std: Standard deviation.

    Returns:
        float32 [N, dim] ~ N(0, std**2).
    """
    key = splitmix64(splitmix64(np.array([seed], dtype=np.uint64)) ^ np.uint64(layer))
    counter = ids_N.astype(np.uint64)[:, None] * np.uint64(dim) + np.arange(dim, dtype=np.uint64)
    total = np.zeros(counter.shape, dtype=np.int64)
    for word in range(3):
        bits = splitmix64((counter * np.uint64(3) + np.uint64(word)) ^ key)
        for shift in (0, 16, 32, 48):
            total += ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    return ((total - 6 * 0xFFFF) * (std / 65536.0)).astype(np.float32)


def splitmix64(value: np.ndarray) -> np.ndarray:
    """A hash of uint64 values: splitmix64, with wrap-around arithmetic."""
    value = value + _GAMMA
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
