"""Row-wise Adagrad."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..memory.memory import EngramMemory
from ..memory.summed import folded, in_lanes
from .fused import Rule
from .optimizer import RowOptimizer


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad: one accumulator a row, the mean of the squared gradient over its d values.

    It is the form that recommenders use for embedding tables. Beside f32 rows it takes 1/d of
    their memory; Adam takes twice their memory.
    """

    name = "row_adagrad"

    def __init__(
        self,
        memory: EngramMemory,
        lr: float = 2e-2,
        eps: float = 1e-8,
        moments: str | os.PathLike[str] = "ram:",
        *,
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        """Starts with accumulators of zero.

        Args:
            memory: the memory whose rows learn.
            lr: learning rate.
            eps: is added to the root of the accumulator.
            moments: "ram:", "file:DIR" or a folder as a Path, see RowOptimizer.
            rounding: "stochastic" or "nearest", of bf16 rows; see RowOptimizer.
            seed: of stochastic rounding.

        Raises:
            ConfigError: a setting is out of range.
        """
        if not (lr >= 0 and eps > 0):
            raise ConfigError(f"RowAdagrad: expected lr >= 0 and eps > 0, found {lr}, {eps}")
        self.eps = eps
        super().__init__(memory, lr, moments, rounding=rounding, seed=seed)

    def moment_width(self, dim: int) -> int:
        """One value a row."""
        return 1

    def hyper(self) -> dict[str, Any]:
        """eps."""
        return {"eps": self.eps}

    def update(self, rows_Ud: np.ndarray, grad_Ud: np.ndarray, moments_Um: np.ndarray) -> None:
        """Adds to the accumulators, then moves the rows."""
        moments_Um += mean_square(grad_Ud)[:, None]
        rates_U1 = np.float32(self.lr) / (np.sqrt(moments_Um) + np.float32(self.eps))
        rows_Ud -= rates_U1 * grad_Ud

    def _rule(self) -> Rule:
        return Rule("adagrad", (self.lr, self.eps))


def mean_square(grad_Ud: np.ndarray) -> np.ndarray:
    """f32 [U]: mean of the squares of each row.

    Column c belongs to running sum c % 16. The 16 sums are folded in halves (memory/summed.py).
    """
    squares_Uk16 = np.square(in_lanes(grad_Ud))
    sums_U16 = squares_Uk16[:, 0].copy()
    for block in range(1, squares_Uk16.shape[1]):
        sums_U16 += squares_Uk16[:, block]
    return folded(sums_U16) / np.float32(grad_Ud.shape[1])
