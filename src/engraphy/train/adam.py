"""Adam on rows."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..memory.memory import EngramMemory
from .fused import Rule
from .optimizer import RowOptimizer


class RowAdam(RowOptimizer):
    """Adam on rows, lazily: a step leaves the moments of rows that it does not touch.

    Equal to torch.optim.SparseAdam (bias correction by the common step count), and to dense Adam
    if every step touches every row. Keeps 2d values per row: beside f32 rows, moments in f32 take
    twice the memory of the rows, those in bf16 as much as the rows.
    """

    name = "row_adam"

    def __init__(
        self,
        memory: EngramMemory,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moments: str | os.PathLike[str] = "ram:",
        *,
        moment_dtype: str = "f32",
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        """Starts with moments of zero.

        Args:
            memory: the memory whose rows learn.
            lr: learning rate.
            betas: decay of the mean and of the mean square, each in [0, 1).
            eps: is added to the root of the mean square.
            moments: "ram:", "file:DIR" or a folder as a Path, see RowOptimizer.
            moment_dtype: "f32" or "bf16"; see RowOptimizer, also for the next two.
            rounding: "stochastic" or "nearest".
            seed: of stochastic rounding.

        Raises:
            ConfigError: a setting is out of range.
        """
        if not (lr >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
            raise ConfigError(
                f"RowAdam: expected lr >= 0, betas in [0, 1), eps > 0, found {lr}, {betas}, {eps}"
            )
        self.betas = betas
        self.eps = eps
        super().__init__(
            memory, lr, moments, moment_dtype=moment_dtype, rounding=rounding, seed=seed
        )

    def moment_width(self, dim: int) -> int:
        """Mean and mean square of d values."""
        return 2 * dim

    def hyper(self) -> dict[str, Any]:
        """betas and eps."""
        return {"betas": list(self.betas), "eps": self.eps}

    def update(self, rows_Ud: np.ndarray, grad_Ud: np.ndarray, moments_Um: np.ndarray) -> None:
        """Moves the moments towards the gradient, then the rows."""
        decay, square_decay, size, eps = map(np.float32, self._factors())
        dim = rows_Ud.shape[1]
        mean, square = moments_Um[:, :dim], moments_Um[:, dim:]
        mean += decay * (grad_Ud - mean)
        square += square_decay * (grad_Ud * grad_Ud - square)
        rows_Ud -= size * mean / (np.sqrt(square) + eps)

    def _rule(self) -> Rule:
        return Rule("adam", self._factors())

    def _factors(self) -> tuple[float, ...]:
        """1 - beta1, 1 - beta2, the step's size with its bias correction, eps."""
        beta1, beta2 = self.betas
        size = self.lr * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        return 1 - beta1, 1 - beta2, size, self.eps
