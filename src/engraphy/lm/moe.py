"""Feed-forward layers of the reference model: SwiGLU, and a mixture of experts with one shared
expert.

No token is ever dropped, and no loss term balances the experts: a bias on the choice does
(auxiliary-loss-free balancing, arXiv 2408.15664), moved in proportion to the load error, since its
sign alone lets single experts run away in models this small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BALANCE_RATE = 0.02


class SwiGLU(nn.Module):
    """down(silu(gate) * up) for x [..., D], with gate and up as one matrix [D -> 2 * width]."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class MoE(nn.Module):
    """shared(x) + sum over the top_k chosen experts of weight * expert(x), for x [B, T, D].

    Scores are sigmoids of a linear router; `balance` f32 [experts] is added for the choice alone,
    the weights are the plain scores of the chosen experts, normalised to one. Forwards in training
    mode with gradients enabled add up the tokens of each expert; `rebalance` moves `balance` (a
    buffer, so a checkpoint keeps it) once an optimiser step: a forward that is run again for
    activation checkpointing has to route as it did. shared_width 0: no shared expert.
    """

    balance: Tensor

    def __init__(
        self, hidden_size: int, experts: int, top_k: int, expert_width: int, shared_width: int
    ):
        super().__init__()
        self.experts, self.top_k = experts, top_k
        self.router = nn.Linear(hidden_size, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, hidden_size, 2 * expert_width))
        self.down = nn.Parameter(torch.empty(experts, expert_width, hidden_size))
        self.shared = SwiGLU(hidden_size, shared_width) if shared_width else None
        self.register_buffer("balance", torch.zeros(experts))
        self.load: Tensor | None = None  # tokens of each expert, int64 [experts], in the last step
        self._counted: Tensor | None = None
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    @property
    def unused_parameters(self) -> int:
        """Parameters of routed experts that a single token does not use."""
        return (self.experts - self.top_k) * (self.gate_up[0].numel() + self.down[0].numel())

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        chosen_NK, weight_NK = self._route(x_ND)
        # Sorted by expert, each expert's tokens lie side by side: one small matmul each, no
        # padding, no drop.
        expert_M, order_M = chosen_NK.flatten().sort(stable=True)
        token_M = order_M // self.top_k
        load = torch.bincount(expert_M, minlength=self.experts)
        if self.training and torch.is_grad_enabled():
            self._counted = load if self._counted is None else self._counted + load
        sizes, dtype = load.tolist(), compute_dtype(x_ND)
        rows_MD = x_ND.to(dtype).index_select(0, token_M)
        hidden_MH = swiglu(grouped_matmul(rows_MD, self.gate_up.to(dtype), sizes))
        hidden_MH = hidden_MH * weight_NK.flatten().index_select(0, order_M).to(dtype)[:, None]
        out_MD = grouped_matmul(hidden_MH, self.down.to(dtype), sizes)
        out_ND = torch.zeros_like(x_ND) if self.shared is None else self.shared(x_ND)
        return out_ND.to(dtype).index_add(0, token_M, out_MD).view_as(x_BTD)

    def _route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts int64 [N, K] and their weights f32 [N, K]."""
        score_NE = torch.sigmoid(self.router(x_ND).float())
        chosen_NK = (
            (score_NE.detach() + self.balance).topk(self.top_k, dim=-1, sorted=False).indices
        )
        weight_NK = score_NE.gather(1, chosen_NK)
        return chosen_NK, weight_NK / weight_NK.sum(-1, keepdim=True).clamp_min(1e-20)

    def rebalance(self) -> None:
        """Move `balance` by the load error of the forwards since the last call, and leave their
        tokens in `load`."""
        if self._counted is None:
            return
        self.load, self._counted = self._counted, None
        error = 1 - self.load / self.load.sum() * self.experts
        self.balance.add_(error.clamp_(-3, 1), alpha=BALANCE_RATE)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half, along the last axis."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_matmul(x_MK: Tensor, weight_EKN: Tensor, sizes: list[int]) -> Tensor:
    """Rows of x in consecutive groups of `sizes`, group e times weight[e]: [M, N]. Groups may be
    empty.

    One autograd node over a loop of matmuls. On one core it took 13 ms where padding to the longest
    group for bmm took 20, a loop that autograd records 26 and torch's own grouped_mm (which older
    releases lack for float32) 12: 4,096 rows, 32 experts, both layers of an expert, forward and
    backward.
    """
    return _GroupedMatmul.apply(x_MK, weight_EKN, sizes)  # type: ignore[no-any-return]


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MK: Tensor, weight_EKN: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_MK, weight_EKN)
        ctx.sizes = sizes
        out_MN = x_MK.new_empty(x_MK.shape[0], weight_EKN.shape[2])
        for x, weight, out in zip(x_MK.split(sizes), weight_EKN, out_MN.split(sizes), strict=True):
            torch.mm(x, weight, out=out)
        return out_MN

    @staticmethod
    def backward(ctx, grad_MN: Tensor):  # type: ignore[override]
        x_MK, weight_EKN = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x_MK), torch.empty_like(weight_EKN)
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
    """What autocast would compute in: it does not reach into autograd functions of one's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
