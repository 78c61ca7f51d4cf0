"""Feed-forward layers of the reference model: SwiGLU, and a mixture of experts with one shared
expert (several shared experts are one that is as wide as all of them).

No token is ever dropped. No loss term balances the experts, but a bias on the choice
(auxiliary-loss-free balancing, arXiv 2408.15664). There the bias moves by the sign of the load
error. Here it moves in proportion to the error: by its sign alone, single experts run away in
models this small.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BALANCE_RATE = 0.02
"""Step of the bias at a load error of 1."""


class SwiGLU(nn.Module):
    """down(silu(gate) * up) for x [..., D], with gate and up as one matrix [D -> 2 * width]."""

    matrices: ClassVar = {"gate_up": 2}

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class MoE(nn.Module):
    """shared(x) + sum over the top_k chosen experts of weight * expert(x), for x [B, T, D].

    Scores are sigmoids of a linear router. `balance` is added for the choice alone; the weights are
    the plain scores of the chosen experts, normalised to a sum of one. Forwards in training mode
    with gradients enabled add up the tokens of each expert. `rebalance` moves `balance` once an
    optimiser step, not in the forward: a forward that activation checkpointing repeats has to route
    as it did.

    Args:
        hidden_size: D.
        experts: Number of routed experts.
        top_k: Experts of a token.
        expert_width: Width of a routed expert.
        shared_width: Width of the shared expert; 0 = none.

    Attributes:
        balance: f32 [experts], a buffer, so checkpoints keep it.
        load: int64 [experts], tokens of each expert in the last step; None before the first.
    """

    matrices: ClassVar = {"gate_up": 2, "router": 0}
    balance: Tensor

    def __init__(
        self, hidden_size: int, experts: int, top_k: int, expert_width: int, shared_width: int
    ):
        super().__init__()
        self.experts = experts
        self.top_k = top_k
        self.router = nn.Linear(hidden_size, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, hidden_size, 2 * expert_width))
        self.down = nn.Parameter(torch.empty(experts, expert_width, hidden_size))
        self.shared = SwiGLU(hidden_size, shared_width) if shared_width else None
        self.register_buffer("balance", torch.zeros(experts))
        self.load: Tensor | None = None
        self._counted: Tensor | None = None  # as load, since the last rebalance
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    @property
    def unused_parameters(self) -> int:
        """Parameters of routed experts that a single token does not use."""
        return (self.experts - self.top_k) * (self.gate_up[0].numel() + self.down[0].numel())

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        chosen_NK, weight_NK = self._route(x_ND)
        # Sorted by expert, the tokens of an expert lie side by side: one small matmul an expert, no
        # padding, no drop.
        expert_M, order_M = chosen_NK.flatten().sort(stable=True)
        token_M = order_M // self.top_k
        load = torch.bincount(expert_M, minlength=self.experts)
        if self.training and torch.is_grad_enabled():
            self._counted = load if self._counted is None else self._counted + load
        sizes = load.tolist()
        dtype = compute_dtype(x_ND)
        rows_MD = x_ND.to(dtype).index_select(0, token_M)
        hidden_MH = swiglu(grouped_matmul(rows_MD, self.gate_up.to(dtype), sizes))
        hidden_MH = hidden_MH * weight_NK.flatten().index_select(0, order_M).to(dtype)[:, None]
        out_MD = grouped_matmul(hidden_MH, self.down.to(dtype), sizes)
        out_ND = torch.zeros_like(x_ND) if self.shared is None else self.shared(x_ND)
        return out_ND.to(dtype).index_add(0, token_M, out_MD).view_as(x_BTD)

    def _route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts int64 [N, K] and their weights [N, K], in f32, or f64 if x is f64."""
        logits_NE = self.router(x_ND)
        wide = torch.promote_types(logits_NE.dtype, torch.float32)
        score_NE = torch.sigmoid(logits_NE.to(wide))
        balanced_NE = score_NE.detach() + self.balance
        chosen_NK = balanced_NE.topk(self.top_k, dim=-1, sorted=False).indices
        weight_NK = score_NE.gather(1, chosen_NK)
        return chosen_NK, weight_NK / weight_NK.sum(-1, keepdim=True).clamp_min(1e-20)

    def rebalance(self) -> None:
        """Moves `balance` by the load error of the forwards since the last call, and leaves the
        tokens of each expert in `load`."""
        if self._counted is None:
            return
        self.load = self._counted
        self._counted = None
        error = 1 - self.load / self.load.sum() * self.experts
        self.balance.add_(error.clamp_(-3, 1), alpha=BALANCE_RATE)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half, along the last axis.

    The backward pass writes both halves of the gradient where they belong, which torch would join
    by a copy. The numbers are torch's, bit for bit.
    """
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:  # type: ignore[override]
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, active, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


def grouped_matmul(x_MK: Tensor, weight_EKN: Tensor, sizes: list[int]) -> Tensor:
    """Rows of x in consecutive groups, group e times weight[e].

    It is one autograd node over a loop of matmuls. On one core it took 13 ms for 4,096 rows, 32
    experts, both layers of an expert, forward and backward. Padding to the longest group for bmm
    took 20 ms, a loop that autograd records 26, and torch's own grouped_mm 12 (older releases lack
    it for float32).

    Args:
        x_MK: The rows.
        weight_EKN: A matrix a group.
        sizes: Rows of each group; may be 0.

    Returns:
        [M, N].
    """
    return _GroupedMatmul.apply(x_MK, weight_EKN, sizes)  # type: ignore[no-any-return]


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_MK: Tensor, weight_EKN: Tensor, sizes: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x_MK, weight_EKN)
        ctx.sizes = sizes
        out_MN = x_MK.new_empty(x_MK.shape[0], weight_EKN.shape[2])
        for x, weight, out in zip(x_MK.split(sizes), weight_EKN, out_MN.split(sizes), strict=True):
            torch.mm(x, weight, out=out)
        return out_MN

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor):  # type: ignore[override]
        x_MK, weight_EKN = ctx.saved_tensors
        grad_x = torch.empty_like(x_MK)
        grad_weight = torch.empty_like(weight_EKN)
        groups = zip(
            x_MK.split(ctx.sizes),
            weight_EKN,
            grad_MN.split(ctx.sizes),
            grad_x.split(ctx.sizes),
            grad_weight,
            strict=True,
        )
        for x, weight, grad, to_x, to_weight in groups:
            torch.mm(grad, weight.t(), out=to_x)
            torch.mm(x.t(), grad, out=to_weight)  # an empty group has a zero gradient
        return grad_x, grad_weight, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast would compute in. Autocast does not reach into custom autograd
    functions."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
