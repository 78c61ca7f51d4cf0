"""The projections of a fusion layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """y = x W^T + b; weight [out, in], bias [out] or None. An nn.Linear in all but its type.

    What rewrites a model by type (adapters on "all-linear", quantisation) leaves a memory's
    projections alone.
    """

    def __init__(self, width: int, out: int, bias: bool) -> None:
        super().__init__()
        linear = nn.Linear(width, out, bias=bias)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
