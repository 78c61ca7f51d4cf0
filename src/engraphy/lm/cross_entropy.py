"""Cross entropy of a linear head, a few hundred tokens at a time.

Whole logits [N, V] are by far the largest buffers of a step in a small model; on a CPU the page
faults of writing them, their log-softmax and its gradient cost more than the arithmetic. In chunks
they stay in the cache and are never kept: the gradients are made in the forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.packing import IGNORED

_CHUNK = 256


def mean_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Mean nats over the targets that are not IGNORED, of logits x @ weight.T: f32 scalar, NaN
    where all are IGNORED.

    Equals F.cross_entropy over whole logits up to rounding. Logits are computed in x's dtype, the
    rest in f32.
    """
    return _MeanCrossEntropy.apply(x_ND, weight_VD, target_N)  # type: ignore[no-any-return]


@torch.no_grad()
def token_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """Nats of each target: f32 [N], 0 where it is IGNORED. Has no gradient."""
    chunks = zip(x_ND.split(_CHUNK), target_N.split(_CHUNK), strict=True)
    return torch.cat(
        [
            F.cross_entropy(
                F.linear(x, weight_VD).float(), target, ignore_index=IGNORED, reduction="none"
            )
            for x, target in chunks
        ]
    )


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:  # type: ignore[override]
        kept_N = target_N != IGNORED
        share_N = kept_N / kept_N.sum()
        index_N = target_N.where(kept_N, 0)
        loss = torch.zeros((), device=x_ND.device)
        grad_x, grad_weight = torch.empty_like(x_ND), None
        if ctx.needs_input_grad[1]:  # a frozen head costs a third less
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        logits_NV = x_ND.new_empty(min(_CHUNK, len(x_ND)), len(weight_VD))
        parts = (values.split(_CHUNK) for values in (x_ND, index_N, share_N, grad_x))
        for x, index, share, to_x in zip(*parts, strict=True):
            log_p = torch.mm(x, weight_VD.t(), out=logits_NV[: len(x)]).log_softmax(
                -1, dtype=torch.float32
            )
            loss -= log_p.gather(1, index[:, None]).squeeze(1).dot(share)
            grad = log_p.exp_()
            grad[torch.arange(len(x), device=x.device), index] -= 1
            grad = grad.mul_(share[:, None]).to(x.dtype)
            torch.mm(grad, weight_VD, out=to_x)
            if grad_weight is None:
                continue
            if x.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), x)
            else:  # a sum over all chunks in bfloat16 would lose more with every one
                grad_weight += grad.t() @ x
        ctx.save_for_backward(
            grad_x, None if grad_weight is None else grad_weight.to(weight_VD.dtype)
        )
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, None if grad_weight is None else grad_weight * grad, None
