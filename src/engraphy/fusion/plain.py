"""The formula of a fusion layer in plain torch: the specification of the native pass.

It runs on any device, and torch differentiates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv import convolve

GATE_FLOOR = 1e-6


class Formula(NamedTuple):
    """What the formula knows beside tensors.

    Attributes:
        dilation: Positions between two taps of the conv.
        eps: Epsilon of the query and key norms.
        conv_eps: Epsilon of the conv's norm.
        unit_offset: Norms scale by 1 + weight.
        conv_inputs: Return the inputs of the whole chunk, not the next chunk's window.
        residual: Return x + update in place of the update.
    """

    dilation: int
    eps: float
    conv_eps: float
    unit_offset: bool
    conv_inputs: bool
    residual: bool


class Norms(NamedTuple):
    """The parameters of norms and conv: [S, D] each, conv [S, D, K]; the last two None without a
    conv."""

    query_norm: Tensor
    key_norm: Tensor
    conv_norm: Tensor | None
    conv: Tensor | None


class Past(NamedTuple):
    """What a chunk follows, and where it has tokens: as in `EngramLayer.forward`."""

    window: Tensor | None
    live: Tensor | None
    starts: Tensor | None


Gate = Callable[[Tensor], Tensor]
"""Takes u [B, T, S], the match of query and key, and returns the gate, from 0 to 1."""


def signed_sqrt(u_BTS: Tensor) -> Tensor:
    """The gate of all released code: sigmoid(sign(u) * sqrt(max(|u|, 1e-6)))."""
    return torch.sigmoid(u_BTS.sign() * u_BTS.abs().clamp_min(GATE_FLOOR).sqrt())


def project(rows_BTE: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows W^T + b, computed in `dtype`."""
    bias = None if bias is None else bias.to(dtype)
    return F.linear(rows_BTE.to(dtype), weight.to(dtype), bias)


def fuse(
    x_BTSD: Tensor,
    key_BTSD: Tensor,
    value_BTD: Tensor,
    norms: Norms,
    past: Past,
    formula: Formula,
    gate: Gate = signed_sqrt,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From the projections of the rows on, in f32, or in f64 if x is f64.

    Args:
        x_BTSD: Hidden states.
        key_BTSD, value_BTD: Projections of the rows.
        norms: Parameters.
        past: The window before the chunk, and flags of its positions.
        formula: Numbers and variants.
        gate: What the match of query and key opens.

    Returns:
        The update (or x + update) in x's dtype, the gate [B, T, S], and conv inputs: the chunk's
        [B, T, S, D] or the last W of them; None without a conv.
    """
    wide = torch.promote_types(x_BTSD.dtype, torch.float32)
    h_BTSD = x_BTSD.to(wide)
    live = past.live
    gate_BTS = gate(match(h_BTSD, key_BTSD.to(wide), norms, formula))
    if live is not None:
        gate_BTS = torch.where(live[:, :, None], gate_BTS, 0.0)
    update_BTSD = gate_BTS[..., None] * value_BTD.to(wide)[:, :, None]
    inputs = None
    if norms.conv is not None and norms.conv_norm is not None:
        inputs_BTSD = conv_inputs(update_BTSD, norms.conv_norm, formula)
        mixed_BTSD, window = convolve(
            norms.conv, formula.dilation, inputs_BTSD, past.window, past.starts
        )
        inputs = inputs_BTSD if formula.conv_inputs else window
        update_BTSD = update_BTSD + F.silu(mixed_BTSD)
        if live is not None:
            update_BTSD = torch.where(live[:, :, None, None], update_BTSD, 0.0)
    update_BTSD = update_BTSD.to(x_BTSD.dtype)
    return x_BTSD + update_BTSD if formula.residual else update_BTSD, gate_BTS, inputs


def scale(norm: Tensor, dtype: torch.dtype, formula: Formula) -> Tensor:
    """The factors of a norm."""
    return norm.to(dtype) + 1.0 if formula.unit_offset else norm.to(dtype)


def conv_inputs(gated: Tensor, norm_SD: Tensor, formula: Formula) -> Tensor:
    """The conv's norm of gated values [..., S, D]."""
    rstd = _rstd(gated, formula.conv_eps)
    return gated * rstd[..., None] * scale(norm_SD, gated.dtype, formula)


def match(h_BTSD: Tensor, key_BTSD: Tensor, norms: Norms, formula: Formula) -> Tensor:
    """How well query and key match: [..., S] of vectors [..., S, D]."""
    # A norm's factor is one number per vector, so it is applied after the dot product: this saves
    # passes over [B, T, S, D].
    wide = h_BTSD.dtype
    scale_SD = scale(norms.query_norm, wide, formula) * scale(norms.key_norm, wide, formula)
    dot_BTS = (h_BTSD * scale_SD * key_BTSD).sum(-1)
    return (
        dot_BTS
        * _rstd(h_BTSD, formula.eps)
        * _rstd(key_BTSD, formula.eps)
        / math.sqrt(h_BTSD.shape[-1])
    )


def _rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x**2) + eps) over the last dimension."""
    return torch.rsqrt(x.square().mean(-1) + eps)
