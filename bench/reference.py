"""Made-up text for the reference model; for the other benchmarks."""

from __future__ import annotations

import numpy as np

VOCAB = 2048


def documents(count: int) -> list[np.ndarray]:
    """Documents of 100 to 300 ids below VOCAB, distributed as words are; the same in each call."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 300, count)
    return [(rng.zipf(1.2, size) - 1).clip(0, VOCAB - 2) + 1 for size in sizes]
