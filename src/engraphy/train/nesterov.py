"""Nesterov momentum on rows."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..memory.memory import EngramMemory
from .fused import Rule
from .optimizer import RowOptimizer


class RowNesterov(RowOptimizer):
    """SGD with Nesterov momentum on rows, lazily: a velocity rests until its row is read again.

    Equal to torch.optim.SGD(nesterov=True) if every step touches every row. Keeps d values per row
    and no second moment. DeepSeek-V4.1 trains its tables with momentum 0.95 in this way. Its
    Sinkhorn balancing of the update is left out, for want of a source that gives the equations.
    """

    name = "row_nesterov"

    def __init__(
        self,
        memory: EngramMemory,
        lr: float = 2e-2,
        momentum: float = 0.95,
        moments: str | os.PathLike[str] = "ram:",
        *,
        moment_dtype: str = "f32",
        rounding: str = "stochastic",
        seed: int = 0,
    ):
        """Starts with velocities of zero.

        Args:
            memory: the memory whose rows learn.
            lr: learning rate.
            momentum: the share of a velocity that stays, in [0, 1).
            moments: "ram:", "file:DIR" or a folder as a Path, see RowOptimizer.
            moment_dtype: "f32" or "bf16"; see RowOptimizer, also for the next two.
            rounding: "stochastic" or "nearest".
            seed: of stochastic rounding.

        Raises:
            ConfigError: a setting is out of range.
        """
        if not (lr >= 0 and 0 <= momentum < 1):
            raise ConfigError(
                f"RowNesterov: expected lr >= 0 and momentum in [0, 1), found {lr}, {momentum}"
            )
        self.momentum = momentum
        super().__init__(
            memory, lr, moments, moment_dtype=moment_dtype, rounding=rounding, seed=seed
        )

    def moment_width(self, dim: int) -> int:
        """The velocity of d values."""
        return dim

    def hyper(self) -> dict[str, Any]:
        """momentum."""
        return {"momentum": self.momentum}

    def update(self, rows_Ud: np.ndarray, grad_Ud: np.ndarray, moments_Um: np.ndarray) -> None:
        """Moves the velocities, then the rows by the gradient and the velocity of the next step."""
        momentum = np.float32(self.momentum)
        moments_Um *= momentum
        moments_Um += grad_Ud
        rows_Ud -= np.float32(self.lr) * (grad_Ud + momentum * moments_Um)

    def _rule(self) -> Rule:
        return Rule("nesterov", (self.momentum, self.lr))
