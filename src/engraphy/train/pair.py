"""A dense optimiser and a row optimiser that step together: one schedule, one gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from ..errors import ConfigError, InputError
from ..memory.summed import SummedGrad
from .optimizer import RowOptimizer, check_finite
from .replicated import drain_mean

Schedule = Callable[[float], float]


def warmup_cosine(warmup: float = 0.03, final: float = 0.1) -> Schedule:
    """A schedule: linear warm-up, then a cosine.

    Args:
        warmup: share of the run that warms up, in [0, 1).
        final: share of the base learning rate at the end, in [0, 1].

    Returns:
        A function from progress, 0..1, to the share of the base learning rate.

    Raises:
        ConfigError: an argument is out of range.
    """
    if not (0 <= warmup < 1 and 0 <= final <= 1):
        raise ConfigError(
            f"warmup_cosine: expected warmup in [0, 1) and final in [0, 1], found {warmup}, {final}"
        )

    def share(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        along = min((progress - warmup) / (1 - warmup), 1.0)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))

    return share


def warmup_steps(warmup: float = 0.03) -> Schedule:
    """A schedule: linear warm-up, then the base rate until 80 % of the run, 0.316 of it until 90 %,
    and 0.1 of it to the end.

    It is the multi-step decay of DeepSeek LLM (arXiv 2401.02954, section 2.3), whose factor is
    the square root of 0.1.

    Args:
        warmup: share of the run that warms up, in [0, 0.8].

    Returns:
        A function from progress, 0..1, to the share of the base learning rate.

    Raises:
        ConfigError: the argument is out of range.
    """
    if not 0 <= warmup <= 0.8:
        raise ConfigError(f"warmup_steps: expected warmup in [0, 0.8], found {warmup}")

    def share(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        if progress <= 0.8:
            return 1.0
        return 0.316 if progress <= 0.9 else 0.1

    return share


class DenseOptimizer(Protocol):
    """What `OptimizerPair` needs of the optimiser of `parameters()`: any of torch has it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class OptimizerPair:
    """A dense step, then a step of the rows, at base rate x schedule(progress), clipped by their
    common norm."""

    def __init__(
        self,
        dense: DenseOptimizer,
        rows: RowOptimizer | None,
        schedule: Schedule,
        clip: float | None,
        replicas: dist.ProcessGroup | None = None,
    ):
        """The learning rates that the optimisers have now are the base rates.

        Args:
            dense: an optimiser over `parameters()`, any of torch or one like it.
            rows: a RowOptimizer, or None for a model without memory.
            schedule: progress -> share of the base rates, as from `warmup_cosine` or
                `warmup_steps`.
            clip: largest allowed norm over dense and summed row gradients together; None = no
                clipping.
            replicas: the group of `replica_group`, if several processes train copies of the table
                together. The dense parameters are then those of a DistributedDataParallel model.
        """
        self.dense = dense
        self.rows = rows
        self.schedule = schedule
        self.clip = clip
        self.replicas = replicas
        self._dense_rates = [group["lr"] for group in dense.param_groups]
        self._row_rate = rows.lr if rows is not None else 0.0

    def step(self, progress: float) -> float:
        """Makes one update from the gradients that have accumulated, and clears them.

        Args:
            progress: share of the run that is done, 0..1.

        Returns:
            The common norm of the gradients, before clipping.

        Raises:
            InputError: a gradient is not finite. Nothing is updated, and all gradients of the step
                are dropped.
        """
        parameters = [p for group in self.dense.param_groups for p in group["params"]]
        summed = {} if self.rows is None else drain_mean(self.rows.memory, self.replicas)
        norm, summed = clip_together(parameters, summed, self.clip)
        share = self.schedule(progress)
        for group, rate in zip(self.dense.param_groups, self._dense_rates, strict=True):
            group["lr"] = rate * share
        self.dense.step()
        self.dense.zero_grad(set_to_none=False)
        if self.rows is not None:
            self.rows.lr = self._row_rate * share
            self.rows.step(summed)
        return norm


def clip_together(
    parameters: Iterable[nn.Parameter], summed: dict[int, SummedGrad], clip: float | None
) -> tuple[float, dict[int, SummedGrad]]:
    """Clips dense and row gradients by their common norm. Dense ones are scaled in place.

    Args:
        parameters: their gradients are the dense ones.
        summed: row gradients by layer.
        clip: largest allowed norm; None = no clipping.

    Returns:
        The norm before clipping, and the row gradients to step with.

    Raises:
        InputError: a gradient is not finite. Dense gradients are dropped.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(parameters, summed)
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
        check_finite(summed)
        raise InputError(f"the dense gradients are not finite: the norm of all gradients is {norm}")
    if clip is None or norm <= clip:
        return norm, summed
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_(clip / norm)
    return norm, {layer: grad.scaled(clip / norm) for layer, grad in summed.items()}


def gradient_norm(parameters: Iterable[nn.Parameter], summed: dict[int, SummedGrad]) -> float:
    """Euclidean norm over dense gradients and row gradients whose duplicates are summed."""
    grads = [p.grad for p in parameters if p.grad is not None]
    squares = [float(nn.utils.get_total_norm(grads)) ** 2] if grads else []
    squares += [grad.square_sum() for grad in summed.values()]
    return math.sqrt(sum(squares))


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices decay, norms, convs and biases do not.

    Rows never decay, since they are no parameters.
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and "norm" not in name and "conv" not in name
            (decayed if is_matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
