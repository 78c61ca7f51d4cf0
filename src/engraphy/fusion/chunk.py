"""The native pass over a chunk, forward and backward, on the projections of its rows.

`plain.fuse` is the specification. Threads: as many as torch uses for an operation
(`torch.set_num_threads`), at most those of the native core (ENGRAPHY_THREADS). Results do not
depend on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .plain import Formula, Norms, Past, scale

if TYPE_CHECKING:
    from .._native._core import ChunkFusion

MOST_TAPS = 16  # as most_taps in chunk.hpp
_KINDS = {
    (torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.bfloat16, torch.bfloat16): 2,
    (torch.bfloat16, torch.float32): 3,
    (torch.float64, torch.float64): 4,
}  # dtypes of x and of the projections, as ChunkKind in chunk.hpp


class Fused(NamedTuple):
    """What the forward pass gives.

    Attributes:
        out_BTSD: The update, or x + update.
        gate_BTS: The gate.
        inputs_BnSD: Conv inputs, of no columns without a conv.
        stats_BTS4: For the backward pass.
    """

    out_BTSD: Tensor
    gate_BTS: Tensor
    inputs_BnSD: Tensor
    stats_BTS4: Tensor


class Grads(NamedTuple):
    """Gradients of what the forward pass reads; empty if they are not needed."""

    x_BTSD: Tensor
    key_BTSD: Tensor
    value_BTD: Tensor
    query_norm: Tensor
    key_norm: Tensor
    conv_norm: Tensor
    conv: Tensor
    window: Tensor


def runs(x: Tensor, dtype: torch.dtype, taps: int) -> bool:
    """Whether the native pass takes such hidden states, projections in `dtype`, and a conv."""
    return (
        _native.core is not None
        and x.is_cpu
        and (x.dtype, dtype) in _KINDS
        and taps <= MOST_TAPS
        and x.numel() > 0
    )


def columns(x_BTSD: Tensor, norms: Norms, formula: Formula) -> int:
    """How many conv inputs of a sequence the forward pass gives."""
    if norms.conv is None:
        return 0
    if formula.conv_inputs:
        return x_BTSD.shape[1]
    return (norms.conv.shape[2] - 1) * formula.dilation


def forward(
    x_BTSD: Tensor, key_BTSD: Tensor, value_BTD: Tensor, norms: Norms, past: Past, formula: Formula
) -> Fused:
    """`plain.fuse` without gradients. Tensors may have any strides."""
    call = _Call(x_BTSD, key_BTSD, value_BTD, norms, past, formula)
    shape = x_BTSD.shape
    fused = Fused(
        torch.empty(shape, dtype=x_BTSD.dtype),
        torch.empty(shape[:3], dtype=call.wide),
        torch.empty(len(x_BTSD), call.columns, *shape[2:], dtype=call.wide),
        torch.empty(*shape[:3], 4, dtype=call.wide),
    )
    call.native(fused.gate_BTS, fused.stats_BTS4).forward(
        out=_address(fused.out_BTSD), inputs=_address(fused.inputs_BnSD)
    )
    return fused


def backward(
    out_grad: Tensor,
    gate_grad: Tensor | None,
    inputs_grad: Tensor | None,
    x_BTSD: Tensor,
    key_BTSD: Tensor,
    value_BTD: Tensor,
    norms: Norms,
    past: Past,
    formula: Formula,
    gate_BTS: Tensor,
    stats_BTS4: Tensor,
    needs_x: bool,
    needs_window: bool,
) -> Grads:
    """Gradients of `forward`.

    Args:
        out_grad, gate_grad, inputs_grad: Gradients of its outputs; None = zero.
        x_BTSD, key_BTSD, value_BTD, norms, past, formula: Its arguments.
        gate_BTS, stats_BTS4: Its outputs.
        needs_x, needs_window: Whether their gradients are wanted.
    """
    call = _Call(x_BTSD, key_BTSD, value_BTD, norms, past, formula)
    if inputs_grad is not None and not inputs_grad.numel():
        inputs_grad = None
    out_grad = out_grad.to(x_BTSD.dtype).contiguous()
    gate_grad, inputs_grad = _contiguous(gate_grad, call.wide), _contiguous(inputs_grad, call.wide)
    window = call.window
    x_grad = torch.empty_like(call.x) if needs_x else _nothing()
    key_grad, value_grad = torch.empty_like(call.key), torch.empty_like(call.value)
    window_grad = _nothing() if window is None or not needs_window else torch.empty_like(window)
    rows = 1 + call.taps * (1 if window is None else 2) + (inputs_grad is not None)
    sums_RSD = torch.empty(rows, *x_BTSD.shape[2:], dtype=call.wide)
    call.native(gate_BTS, stats_BTS4).backward(
        out_grad=_address(out_grad),
        gate_grad=_address(gate_grad),
        inputs_grad=_address(inputs_grad),
        x_grad=_address(x_grad),
        key_grad=_address(key_grad),
        value_grad=_address(value_grad),
        window_grad=_address(window_grad),
        sums=_address(sums_RSD),
    )
    return Grads(
        x_grad,
        key_grad,
        value_grad,
        (sums_RSD[0] * call.key_scale).to(norms.query_norm.dtype),
        (sums_RSD[0] * call.query_scale).to(norms.key_norm.dtype),
        *_conv_grads(call, norms, sums_RSD, inputs_grad is not None),
        window_grad,
    )


def _conv_grads(
    call: _Call, norms: Norms, sums_RSD: Tensor, returned: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the conv's norm and of the conv, from the sums of the native pass.

    returned: The conv inputs that were returned have gradients.
    """
    if call.conv is None or norms.conv is None or norms.conv_norm is None:
        return _nothing(), _nothing()
    taps = call.taps
    normed_KSD = sums_RSD[1 : 1 + taps]  # gradients of conv times norm
    conv_KSD = normed_KSD * call.conv.norm
    if call.window is not None:
        conv_KSD += sums_RSD[1 + taps : 1 + 2 * taps]
    norm_SD = (normed_KSD * call.conv.taps_KSD).sum(0)
    if returned:
        norm_SD += sums_RSD[-1]
    conv = conv_KSD.permute(1, 2, 0).to(norms.conv.dtype).contiguous()
    return norm_SD.to(norms.conv_norm.dtype), conv


class _Conv(NamedTuple):
    """Factors of the conv's norm [S, D], the conv [K, S, D], and their product."""

    norm: Tensor
    taps_KSD: Tensor
    normed_KSD: Tensor


class _Call:
    """What both passes read, in memory as the kernel expects it."""

    def __init__(
        self,
        x_BTSD: Tensor,
        key_BTSD: Tensor,
        value_BTD: Tensor,
        norms: Norms,
        past: Past,
        formula: Formula,
    ) -> None:
        self.x = x_BTSD.contiguous()
        self.key = key_BTSD.contiguous()
        self.value = value_BTD.contiguous()
        self.formula = formula
        self.wide = torch.promote_types(x_BTSD.dtype, torch.float32)
        self.query_scale = scale(norms.query_norm, self.wide, formula)
        self.key_scale = scale(norms.key_norm, self.wide, formula)
        self.scale = (self.query_scale * self.key_scale).contiguous()
        self.taps = 0
        self.columns = columns(x_BTSD, norms, formula)
        self.conv: _Conv | None = None
        self.window: Tensor | None = None
        if norms.conv is not None and norms.conv_norm is not None:
            self.taps = norms.conv.shape[2]
            norm_SD = scale(norms.conv_norm, self.wide, formula).contiguous()
            taps_KSD = norms.conv.to(self.wide).permute(2, 0, 1).contiguous()
            self.conv = _Conv(norm_SD, taps_KSD, taps_KSD * norm_SD)
            if past.window is not None and past.window.numel():
                self.window = _contiguous(past.window, self.wide)
        self.live = None if past.live is None else past.live.contiguous()
        self.starts = None if past.starts is None else past.starts.contiguous()

    def native(self, gate_BTS: Tensor, stats_BTS4: Tensor) -> ChunkFusion:
        """The native passes over these tensors, which have to stay alive. The forward pass writes
        the gate and the numbers, the backward pass reads them."""
        formula = self.formula
        batch, tokens, streams, hidden = self.x.shape
        conv = self.conv
        return _native.compiled().ChunkFusion(
            kind=_KINDS[self.x.dtype, self.key.dtype],
            batch=batch,
            tokens=tokens,
            streams=streams,
            hidden=hidden,
            taps=self.taps,
            dilation=formula.dilation,
            eps=formula.eps,
            conv_eps=formula.conv_eps,
            residual=formula.residual,
            columns=self.columns,
            masked=not formula.conv_inputs,
            scale=_address(self.scale),
            conv_norm=0 if conv is None else _address(conv.norm),
            conv=0 if conv is None else _address(conv.taps_KSD),
            normed_conv=0 if conv is None else _address(conv.normed_KSD),
            x=_address(self.x),
            key=_address(self.key),
            value=_address(self.value),
            window=_address(self.window),
            live=_address(self.live),
            starts=_address(self.starts),
            gate=_address(gate_BTS),
            stats=_address(stats_BTS4),
            threads=min(torch.get_num_threads(), _native.threads()),
        )


def _nothing() -> Tensor:
    """A tensor of its own: no two outputs of an operation may be one."""
    return torch.empty(0)


def _contiguous(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _address(tensor: Tensor | None) -> int:
    """0 if there is none, or no values."""
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()
