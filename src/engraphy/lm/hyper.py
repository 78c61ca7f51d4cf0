"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): M residual streams in place of
one.

A sublayer F (attention or feed-forward) reads a weighted sum of the streams and writes to all of
them, while the streams are mixed:

    x_{l+1} = H_res x_l + H_post F(H_pre x_l)
    H_pre = sigmoid(a_1 x' W_pre + b_pre)
    H_post = 2 sigmoid(a_2 x' W_post + b_post)
    H_res = Sinkhorn(a_3 x' W_res + b_res)

with x' the RMS-normalised concatenation of a token's streams, so each part has a dynamic share,
which depends on the token, and a static one. H_res is doubly stochastic: it can neither blow up nor
lose what the streams hold together. Hyper-connections (arXiv 2409.19606) leave it free.

From mHC (section 4): the four formulas, M = 4, 20 iterations, scales a that start at 0.01. From
DeepSeek-V4's public code, which computes the same: the norm has no weight, one matrix holds the
three projections, H_res is used with its transpose, Sinkhorn begins with a softmax along the rows
plus 1e-6 and ends with the columns (mHC writes exp, and ends with the rows). Inferred, because
neither prints it: the static parts start so that a sublayer reads the mean of the streams and
writes to each with weight 1, and each stream mostly stays itself. The streams start as copies of
the embedding, as in hyper-connections, and end in their mean (hyper-connections sum them, which is
the same before a norm; DeepSeek-V4 learns the weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ITERATIONS = 20
_FLOOR = 1e-6
_START = 0.01  # of the scales of the dynamic parts
_STAY = 4.0  # logit of a stream's share in itself at the start


class HyperConnection(nn.Module):
    """The residual connection around one sublayer.

    With one stream it is x + F(x), without parameters.

    Args:
        hidden_size: D.
        streams: M.
        eps: Epsilon of the norm.
        iterations: Of Sinkhorn.

    Attributes:
        mix: [M * (M + 2), M * D]: rows of pre, post and res, in this order.
        bias: [M * (M + 2)], in the same order.
        scale: [3]: of the dynamic parts of pre, post and res.
    """

    def __init__(self, hidden_size: int, streams: int, eps: float, iterations: int = ITERATIONS):
        super().__init__()
        self.streams = streams
        self.eps = eps
        self.iterations = iterations
        if streams > 1:
            size = streams * (streams + 2)
            self.mix = nn.Parameter(torch.empty(size, streams * hidden_size))
            self.bias = nn.Parameter(torch.empty(size))
            self.scale = nn.Parameter(torch.empty(3))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts close to a plain residual connection of equal streams."""
        streams = self.streams
        nn.init.normal_(self.mix, std=self.mix.shape[1] ** -0.5)
        nn.init.constant_(self.scale, _START)
        with torch.no_grad():
            pre, post, res = self.bias.split(self._sizes)
            pre.fill_(-math.log(streams - 1))  # its sigmoid is 1 / M
            post.zero_()
            res.copy_(_STAY * torch.eye(streams, device=res.device).flatten())

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The streams after a sublayer.

        Args:
            x: [B, T, M, D]; with one stream any shape that the sublayer takes.
            sublayer: From [B, T, D] to [B, T, D].

        Returns:
            As x.
        """
        if self.streams == 1:
            return x + sublayer(x)
        pre_BTM, post_BTM, res_BTMM = self.weights(x)
        # Not in bfloat16 under autocast: the streams are what all layers add to.
        with torch.autocast(x.device.type, enabled=False):
            read_BTD = (pre_BTM[..., None, :] @ x).squeeze(-2)
            kept_BTMD = res_BTMM.mT @ x
        written_BTD = sublayer(read_BTD)
        return torch.addcmul(kept_BTMD, post_BTM[..., None], written_BTD[..., None, :])

    def weights(self, x_BTMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre [B, T, M], H_post [B, T, M] and H_res [B, T, M, M] of each token, in x's dtype.

        H_res[i, j] is what stream i gives to the next stream j.
        """
        streams = self.streams
        flat = x_BTMD.flatten(2)
        normed = F.rms_norm(flat, flat.shape[-1:], eps=self.eps)
        pre, post, res = F.linear(normed, self.mix).to(x_BTMD.dtype).split(self._sizes, -1)
        pre_bias, post_bias, res_bias = self.bias.split(self._sizes)
        a_pre, a_post, a_res = self.scale.unbind()
        logits = (a_res * res + res_bias).unflatten(-1, (streams, streams))
        return (
            torch.sigmoid(a_pre * pre + pre_bias),
            2 * torch.sigmoid(a_post * post + post_bias),
            sinkhorn(logits, self.iterations),
        )

    @property
    def _sizes(self) -> list[int]:
        return [self.streams, self.streams, self.streams**2]


def sinkhorn(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """A matrix close to the doubly stochastic ones, [..., M, M].

    Rows and columns are divided by their sums in turn. The last are the columns, which therefore
    sum to 1 up to rounding; how far the rows are from it, `row_error` says.

    Args:
        logits: [..., M, M].
        iterations: Of both divisions, at least 1.
    """
    matrix = logits.softmax(-1) + _FLOOR  # no column may vanish
    matrix = matrix / matrix.sum(-2, keepdim=True)
    for _ in range(iterations - 1):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    return matrix


def row_error(logits: Tensor, iterations: int = ITERATIONS) -> float:
    """Largest distance of a row's sum from 1 after `sinkhorn`, over all matrices of `logits`."""
    with torch.no_grad():
        return float((sinkhorn(logits, iterations).sum(-1) - 1).abs().max())
