"""Row-wise Adagrad."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..memory.memory import EngramMemory
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
    ):
        """Starts with accumulators of zero.

        Args:
            memory: the memory whose rows learn.
            lr: learning rate.
            eps: is added to the root of the accumulator.
            moments: "ram:", "file:DIR" or a folder as a Path, see RowOptimizer.

        Raises:
            ConfigError: a setting is out of range.
        """
        if not (lr >= 0 and eps > 0):
            raise ConfigError(f"RowAdagrad: expected lr >= 0 and eps > 0, found {lr}, {eps}")
        self.eps = eps
        super().__init__(memory, lr, moments)

    def moment_width(self, dim: int) -> int:
        """One value a row."""
        return 1

    def hyper(self) -> dict[str, Any]:
        """eps."""
        return {"eps": self.eps}

    def update(self, rows_Ud: np.ndarray, grad_Ud: np.ndarray, moments_Um: np.ndarray) -> None:
        """Adds to the accumulators, then moves the rows."""
        moments_Um += (grad_Ud * grad_Ud).mean(axis=1, keepdims=True)
        rows_Ud -= np.float32(self.lr) * grad_Ud / (np.sqrt(moments_Um) + np.float32(self.eps))
