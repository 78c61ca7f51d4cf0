"""Training a memory: row optimisers, and a dense and a row optimiser that step together."""

from ..memory.grads import coalesce
from ..memory.summed import SummedGrad
from .adagrad import RowAdagrad
from .adam import RowAdam
from .nesterov import RowNesterov
from .optimizer import RowOptimizer
from .pair import (
    DenseOptimizer,
    OptimizerPair,
    clip_together,
    gradient_norm,
    warmup_cosine,
    warmup_steps,
    weight_decay_groups,
)
from .replicated import drain_mean, replica_group

__all__ = [
    "DenseOptimizer",
    "OptimizerPair",
    "RowAdagrad",
    "RowAdam",
    "RowNesterov",
    "RowOptimizer",
    "SummedGrad",
    "clip_together",
    "coalesce",
    "drain_mean",
    "gradient_norm",
    "replica_group",
    "warmup_cosine",
    "warmup_steps",
    "weight_decay_groups",
]
