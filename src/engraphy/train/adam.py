"""Adam on rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ConfigError
from ..memory.memory import EngramMemory
from .optimizer import RowOptimizer


class RowAdam(RowOptimizer):
    """Adam on rows, lazily: moments of rows that a step does not touch rest.

    Equal to torch.optim.SparseAdam (bias correction by the common step count), and to dense Adam
    where every row is touched in every step. Keeps 2d f32 values a row. Raises ConfigError for
    settings outside their range.
    """

    name = "row_adam"

    def __init__(
        self,
        memory: EngramMemory,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moments: str = "ram:",
    ):
        if not (lr >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
            raise ConfigError(
                f"RowAdam: expected lr >= 0, betas in [0, 1), eps > 0, found {lr}, {betas}, {eps}"
            )
        self.betas, self.eps = betas, eps
        super().__init__(memory, lr, moments)

    def moment_width(self, dim: int) -> int:
        return 2 * dim

    def hyper(self) -> dict[str, Any]:
        return {"betas": list(self.betas), "eps": self.eps}

    def update(self, rows_Ud: np.ndarray, grad_Ud: np.ndarray, moments_Um: np.ndarray) -> None:
        (beta1, beta2), dim = self.betas, rows_Ud.shape[1]
        mean, square = moments_Um[:, :dim], moments_Um[:, dim:]
        mean += (1 - beta1) * (grad_Ud - mean)
        square += (1 - beta2) * (grad_Ud * grad_Ud - square)
        size = self.lr * np.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        rows_Ud -= np.float32(size) * mean / (np.sqrt(square) + np.float32(self.eps))
