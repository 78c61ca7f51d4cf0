"""The fusion as a torch operation: rows and hidden states to an update, with a gradient.

`torch.ops.engraphy.fuse` is one node of a graph that torch.compile makes. On the CPU it is two
matrix products and one native pass (chunk.py); elsewhere, and without the compiled core, it is the
plain formula (plain.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunk, plain
from .plain import Formula, Norms, Past

_INPUTS = 13  # tensors; numbers follow


@torch.library.custom_op("engraphy::fuse", mutates_args=())
def fuse(
    x: Tensor,
    rows: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    value: Tensor,
    value_bias: Tensor | None,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv: Tensor | None,
    window: Tensor | None,
    live: Tensor | None,
    starts: Tensor | None,
    dtype: torch.dtype,
    dilation: int,
    eps: float,
    conv_eps: float,
    unit_offset: bool,
    conv_inputs: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a fusion layer computes.

    Args:
        x, rows, window, live, starts, conv_inputs: As `EngramLayer.forward` takes them, checked.
        key, key_bias, value, value_bias, query_norm, key_norm, conv_norm, conv: As EngramLayer has
            them.
        dtype: Of the projections.
        dilation, eps, conv_eps, unit_offset, residual: As in `plain.Formula`.

    Returns:
        The update [B, T, S, D] (or x + update), the gate [B, T, S], conv inputs (of no columns
        without a conv), and for the backward pass the projections [B, T, S, D] and [B, T, D], and
        numbers [B, T, S, 4], or none if the plain formula ran.
    """
    norms = Norms(query_norm, key_norm, conv_norm, conv)
    past = Past(window, live, starts)
    formula = Formula(dilation, eps, conv_eps, unit_offset, conv_inputs, residual)
    key_BTSD = plain.project(rows, key, key_bias, dtype).view(x.shape)
    value_BTD = plain.project(rows, value, value_bias, dtype)
    if chunk.runs(x, dtype, _taps(conv)):
        fused = chunk.forward(x, key_BTSD, value_BTD, norms, past, formula)
        return fused.out_BTSD, fused.gate_BTS, fused.inputs_BnSD, key_BTSD, value_BTD, fused[3]
    out, gate, inputs = plain.fuse(x, key_BTSD, value_BTD, norms, past, formula)
    if inputs is None:
        inputs = gate.new_empty(len(x), 0, *x.shape[2:])
    return out, gate, inputs.contiguous(), key_BTSD, value_BTD, gate.new_empty(0)


@fuse.register_fake
def _(
    x: Tensor,
    rows: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    value: Tensor,
    value_bias: Tensor | None,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv: Tensor | None,
    window: Tensor | None,
    live: Tensor | None,
    starts: Tensor | None,
    dtype: torch.dtype,
    dilation: int,
    eps: float,
    conv_eps: float,
    unit_offset: bool,
    conv_inputs: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    norms = Norms(query_norm, key_norm, conv_norm, conv)
    formula = Formula(dilation, eps, conv_eps, unit_offset, conv_inputs, residual)
    columns = chunk.columns(x, norms, formula)
    stats = (*x.shape[:3], 4) if chunk.runs(x, dtype, _taps(conv)) else (0,)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:3], dtype=wide),
        x.new_empty((x.shape[0], columns, *x.shape[2:]), dtype=wide),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((*x.shape[:2], x.shape[3]), dtype=dtype),
        x.new_empty(stats, dtype=wide),
    )


@torch.library.custom_op("engraphy::fuse_backward", mutates_args=())
def fuse_backward(
    out_grad: Tensor,
    gate_grad: Tensor | None,
    inputs_grad: Tensor | None,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv: Tensor | None,
    window: Tensor | None,
    live: Tensor | None,
    starts: Tensor | None,
    gate: Tensor,
    stats: Tensor,
    dilation: int,
    eps: float,
    conv_eps: float,
    unit_offset: bool,
    conv_inputs: bool,
    residual: bool,
    needs_x: bool,
    needs_window: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `fuse` down to those of the projections `key` and `value`, by the native pass.

    Returns the gradients of x, key, value, query_norm, key_norm, conv_norm, conv and window, empty
    if they do not exist or are not needed.
    """
    return chunk.backward(
        out_grad,
        gate_grad,
        inputs_grad,
        x,
        key,
        value,
        Norms(query_norm, key_norm, conv_norm, conv),
        Past(window, live, starts),
        Formula(dilation, eps, conv_eps, unit_offset, conv_inputs, residual),
        gate,
        stats,
        needs_x,
        needs_window,
    )


@fuse_backward.register_fake
def _(
    out_grad: Tensor,
    gate_grad: Tensor | None,
    inputs_grad: Tensor | None,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv: Tensor | None,
    window: Tensor | None,
    live: Tensor | None,
    starts: Tensor | None,
    gate: Tensor,
    stats: Tensor,
    dilation: int,
    eps: float,
    conv_eps: float,
    unit_offset: bool,
    conv_inputs: bool,
    residual: bool,
    needs_x: bool,
    needs_window: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if tensor is None:
            return torch.empty(0)
        return tensor.new_empty(tensor.shape, dtype=dtype)

    wide = torch.promote_types(x.dtype, torch.float32)
    needs_window = needs_window and window is not None and window.numel() > 0
    return (
        like(x if needs_x else None),
        like(key),
        like(value),
        like(query_norm),
        like(key_norm),
        like(conv_norm),
        like(conv),
        like(window if needs_window else None, wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate, _, key_BTSD, value_BTD, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(key_BTSD, value_BTD, stats)
    ctx.save_for_backward(*inputs[:_INPUTS], gate, key_BTSD, value_BTD, stats)
    ctx.numbers = inputs[_INPUTS:]


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, gate, key_BTSD, value_BTD, stats = ctx.saved_tensors
    needed = ctx.needs_input_grad[:_INPUTS]
    numbers = ctx.numbers
    if all(grad is None for grad in grads[:3]):
        return (None,) * (_INPUTS + len(numbers))
    if torch.is_grad_enabled() or not stats.numel():
        found = _through_plain(inputs, numbers, grads[:3], needed)
    else:
        found = _natively(inputs, numbers, grads[:3], needed, gate, key_BTSD, value_BTD, stats)
    return (*found, *[None] * len(numbers))


def _natively(
    inputs: list[Any],
    numbers: tuple[Any, ...],
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    gate: Tensor,
    key_BTSD: Tensor,
    value_BTD: Tensor,
    stats: Tensor,
) -> list[Tensor | None]:
    x, rows, key, key_bias, value, value_bias, *others = inputs
    dtype = numbers[0]
    out_grad = torch.zeros_like(x) if grads[0] is None else grads[0]
    parts = fuse_backward(
        out_grad,
        *grads[1:],
        x,
        key_BTSD,
        value_BTD,
        *others,
        gate,
        stats,
        *numbers[1:],
        needed[0],
        needed[10],
    )
    key_grad = parts[1].flatten(0, 1).flatten(1)
    value_grad = parts[2].flatten(0, 1)
    found: list[Tensor | None] = [None] * _INPUTS
    if needed[1]:
        rows_grad = (key_grad @ key.to(dtype)).addmm_(value_grad, value.to(dtype))
        found[1] = rows_grad.view(rows.shape).to(rows.dtype)
    rows_NE = rows.to(dtype).flatten(0, 1)
    for place, weight, grad in ((2, key, key_grad), (4, value, value_grad)):
        if needed[place]:
            found[place] = (grad.T @ rows_NE).to(weight.dtype)
    for place, bias, grad in ((3, key_bias, key_grad), (5, value_bias, value_grad)):
        if needed[place]:
            found[place] = grad.sum(0).to(bias.dtype)
    for place, part in ((0, 0), (6, 3), (7, 4), (8, 5), (9, 6), (10, 7)):
        if needed[place]:
            found[place] = parts[part].to(inputs[place].dtype).view(inputs[place].shape)
    return found


def _through_plain(
    inputs: list[Any],
    numbers: tuple[Any, ...],
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients by torch's differentiation of the plain formula, which runs once more. They can be
    differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one input may depend on another, and each gets its own share.
        aliases = [
            tensor.view_as(tensor) if need else tensor
            for tensor, need in zip(inputs, needed, strict=True)
        ]
        x, rows, key, key_bias, value, value_bias, *others = aliases
        dtype = numbers[0]
        outputs = plain.fuse(
            x,
            plain.project(rows, key, key_bias, dtype).view(x.shape),
            plain.project(rows, value, value_bias, dtype),
            Norms(*others[:4]),
            Past(*others[4:]),
            Formula(*numbers[1:]),
        )
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output is not None and output.requires_grad
        ]
        wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
    return [next(found) if need else None for need in needed]


fuse.register_autograd(_differentiate, setup_context=_save)


def _taps(conv: Tensor | None) -> int:
    return 0 if conv is None else conv.shape[2]
