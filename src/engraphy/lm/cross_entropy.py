"""Cross entropy of a linear head, a few hundred tokens at a time.

Whole logits [N, V] are by far the largest buffers of a step in a small model. On a CPU the page
faults of writing them, their log-softmax and its gradient cost more than the arithmetic. In chunks
they stay in the cache, and they are never kept: the forward computes the gradients too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.packing import IGNORED

_CHUNK = 256


def mean_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Mean cross entropy of the logits x @ weight.T, in nats.

    Equals F.cross_entropy over whole logits up to rounding.

    Args:
        x_ND: What the head takes. Logits are computed in its dtype, the rest in f32.
        weight_VD: Weight of the head, in the same dtype.
        target_N: int64; those that are IGNORED do not count.

    Returns:
        f32 scalar; NaN if all targets are IGNORED.
    """
    return _MeanCrossEntropy.apply(x_ND, weight_VD, target_N)  # type: ignore[no-any-return]


@torch.no_grad()
def token_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Cross entropy of each target, in nats, without a gradient.

    Args: as for `mean_cross_entropy`.

    Returns:
        f32 [N]; 0 where the target is IGNORED.
    """
    losses = []
    for x, target in zip(x_ND.split(_CHUNK), target_N.split(_CHUNK), strict=True):
        logits = F.linear(x, weight_VD).float()
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none"))
    return torch.cat(losses)


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor
    ) -> Tensor:
        kept_N = target_N != IGNORED
        share_N = kept_N / kept_N.sum()
        index_N = target_N.where(kept_N, 0)
        loss = torch.zeros((), device=x_ND.device)
        grad_x = torch.empty_like(x_ND)
        grad_weight = None
        if ctx.needs_input_grad[1]:  # a frozen head costs a third less
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        logits_NV = x_ND.new_empty(min(_CHUNK, len(x_ND)), len(weight_VD))
        parts = (values.split(_CHUNK) for values in (x_ND, index_N, share_N, grad_x))
        for x, index, share, to_x in zip(*parts, strict=True):
            logits = torch.mm(x, weight_VD.t(), out=logits_NV[: len(x)])
            grad = _softmax_gradient(logits.float(), index, share, loss).to(x.dtype)
            torch.mm(grad, weight_VD, out=to_x)
            if grad_weight is None:
                continue
            if x.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), x)
            else:  # a sum over all chunks in bfloat16 would lose more with every one
                grad_weight += grad.t() @ x
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad
        return grad_x * grad, grad_weight, None


def _softmax_gradient(logits_nV: Tensor, index_n: Tensor, share_n: Tensor, loss: Tensor) -> Tensor:
    """Gradient of the weighted cross entropy to f32 logits, in their place; adds to `loss`.

    It takes three quarters of the time of torch's log-softmax and an exponential (2,048 logits).
    """
    largest = logits_nV.amax(-1, keepdim=True)
    target = logits_nV.gather(1, index_n[:, None]) - largest
    exponential = logits_nV.sub_(largest).exp_()
    total = exponential.sum(-1, keepdim=True)
    loss += (total.log() - target).squeeze(1).dot(share_n)
    grad = exponential.mul_(share_n[:, None] / total)
    grad[torch.arange(len(grad), device=grad.device), index_n] -= share_n
    return grad
