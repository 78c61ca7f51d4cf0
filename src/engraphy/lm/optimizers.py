"""Dense optimisers and schedules of the training loop, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..train import DenseOptimizer, warmup_cosine, warmup_steps, weight_decay_groups
from ..train.pair import Schedule
from .muon import Muon, matrices_of

BETAS = (0.9, 0.95)
"""Of AdamW."""


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over a model's parameters; norms, convs and biases do not decay."""
    groups = weight_decay_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


class MuonAdamW:
    """Muon for a model's matrices and AdamW for its other parameters, as one dense optimiser.

    Args:
        model: What to train.
        lr: Learning rate of both.
        weight_decay: Of both; norms, convs and biases do not decay.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float):
        matrices = matrices_of(model)
        if not matrices:
            raise ConfigError("muon: expected a model with matrices to train, found none")
        taken = {id(item.parameter) for item in matrices}
        groups = weight_decay_groups(model, weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
        self.muon = Muon(matrices, lr, weight_decay)
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, Muon's first."""
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        """Makes one update of all parameters."""
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients."""
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with what `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


OPTIMIZERS: Mapping[str, Callable[[nn.Module, float, float], DenseOptimizer]] = {
    "adamw": adamw,
    "muon": MuonAdamW,
}
"""Dense optimisers by name: of a model, a learning rate and a weight decay."""
SCHEDULES: Mapping[str, Callable[[float], Schedule]] = {
    "cosine": warmup_cosine,
    "step": warmup_steps,
}
"""Schedules by name: of the share that warms up."""
