"""Training a memory: row optimisers, and a dense and a row optimiser that step together."""

from .pair import OptimizerPair, gradient_norm, warmup_cosine, weight_decay_groups
from .rows import RowAdagrad, RowAdam, RowOptimizer, SummedGrad, coalesce

__all__ = ["OptimizerPair", "RowAdagrad", "RowAdam", "RowOptimizer", "SummedGrad", "coalesce", "gradient_norm",
           "warmup_cosine", "weight_decay_groups"]
