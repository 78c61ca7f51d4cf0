"""The fusion as a torch operation: rows and hidden states to an update, with a gradient.

`torch.ops.engraphy.fuse` is one node of a graph that torch.compile makes. On the CPU it is two
matrix products and one native pass (chunk.py); elsewhere, and without the compiled core, it is the
plain formula (plain.py).

An operation takes tensors and numbers one by one, and torch reads its schema from the signature.
Everything behind it takes them as `Inputs` and `Formula`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunk, plain
from .plain import Formula, Norms, Past


class Inputs(NamedTuple):
    """The tensors that `fuse` takes, in its order. Numbers follow: a dtype and a Formula's."""

    x: Tensor
    rows: Tensor
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    query_norm: Tensor
    key_norm: Tensor
    conv_norm: Tensor | None
    conv: Tensor | None
    window: Tensor | None
    live: Tensor | None
    starts: Tensor | None

    @property
    def norms(self) -> Norms:
        return Norms(self.query_norm, self.key_norm, self.conv_norm, self.conv)

    @property
    def past(self) -> Past:
        return Past(self.window, self.live, self.starts)

    @property
    def taps(self) -> int:
        return 0 if self.conv is None else self.conv.shape[2]

    def project(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The projections of the rows, [B, T, S, D] and [B, T, D], in `dtype`."""
        key_BTSD = plain.project(self.rows, self.key, self.key_bias, dtype).view(self.x.shape)
        return key_BTSD, plain.project(self.rows, self.value, self.value_bias, dtype)


_INPUTS = len(Inputs._fields)


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
    inputs = Inputs(
        x,
        rows,
        key,
        key_bias,
        value,
        value_bias,
        query_norm,
        key_norm,
        conv_norm,
        conv,
        window,
        live,
        starts,
    )
    formula = Formula(dilation, eps, conv_eps, unit_offset, conv_inputs, residual)
    key_BTSD, value_BTD = inputs.project(dtype)
    projected = x, key_BTSD, value_BTD
    if chunk.runs(x, dtype, inputs.taps):
        out, gate, conv_inputs_BnSD, stats = chunk.forward(
            *projected, inputs.norms, inputs.past, formula
        )
        return out, gate, conv_inputs_BnSD, key_BTSD, value_BTD, stats
    out, gate, conv_inputs_BnSD = plain.fuse(*projected, inputs.norms, inputs.past, formula)
    if conv_inputs_BnSD is None:
        conv_inputs_BnSD = gate.new_empty(len(x), 0, *x.shape[2:])
    return out, gate, conv_inputs_BnSD.contiguous(), key_BTSD, value_BTD, gate.new_empty(0)


@fuse.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments[:_INPUTS])
    dtype, *numbers = arguments[_INPUTS:]
    x = inputs.x
    wide = torch.promote_types(x.dtype, torch.float32)
    columns = chunk.columns(x, inputs.norms, Formula(*numbers))
    stats = (*x.shape[:3], 4) if chunk.runs(x, dtype, inputs.taps) else (0,)
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
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_x, needs_window = others[-2:]

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


class _Kept(NamedTuple):
    """Outputs of `fuse` that its gradient is computed from."""

    gate_BTS: Tensor
    key_BTSD: Tensor
    value_BTD: Tensor
    stats_BTS4: Tensor


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate, _, key_BTSD, value_BTD, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(key_BTSD, value_BTD, stats)
    ctx.save_for_backward(*inputs[:_INPUTS], *_Kept(gate, key_BTSD, value_BTD, stats))
    ctx.numbers = inputs[_INPUTS:]


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """grads: of the outputs of `fuse`. Returns those of its arguments."""
    saved = ctx.saved_tensors
    inputs = Inputs(*saved[:_INPUTS])
    kept = _Kept(*saved[_INPUTS:])
    dtype, *numbers = ctx.numbers
    formula = Formula(*numbers)
    nothing = [None] * len(ctx.numbers)
    grads = grads[:3]  # the other outputs are not differentiable
    if all(grad is None for grad in grads):
        return *[None] * _INPUTS, *nothing
    needs = zip(Inputs._fields, ctx.needs_input_grad, strict=False)  # numbers have no gradient
    needed = [name for name, need in needs if need]
    if torch.is_grad_enabled() or not kept.stats_BTS4.numel():
        found = _through_plain(inputs, dtype, formula, grads, needed)
    else:
        found = _natively(inputs, dtype, formula, grads, needed, kept)
    return *[found.get(name) for name in Inputs._fields], *nothing


def _natively(
    inputs: Inputs,
    dtype: torch.dtype,
    formula: Formula,
    grads: Sequence[Tensor | None],
    needed: Sequence[str],
    kept: _Kept,
) -> dict[str, Tensor]:
    """Gradients of the needed inputs by name, from one native pass and matrix products."""
    out_grad, *other_grads = grads
    parts = chunk.Grads(
        *fuse_backward(
            torch.zeros_like(inputs.x) if out_grad is None else out_grad,
            *other_grads,
            inputs.x,
            kept.key_BTSD,
            kept.value_BTD,
            *inputs.norms,
            *inputs.past,
            kept.gate_BTS,
            kept.stats_BTS4,
            *formula,
            "x" in needed,
            "window" in needed,
        )
    )
    key_grad = parts.key_BTSD.flatten(0, 1).flatten(1)
    value_grad = parts.value_BTD.flatten(0, 1)
    found = {
        "x": parts.x_BTSD,
        "query_norm": parts.query_norm,
        "key_norm": parts.key_norm,
        "conv_norm": parts.conv_norm,
        "conv": parts.conv,
        "window": parts.window,
    }
    if "rows" in needed:
        found["rows"] = (key_grad @ inputs.key.to(dtype)).addmm_(value_grad, inputs.value.to(dtype))
    rows_NE = inputs.rows.to(dtype).flatten(0, 1)
    for name, grad in (("key", key_grad), ("value", value_grad)):
        if name in needed:
            found[name] = grad.T @ rows_NE
        if f"{name}_bias" in needed:
            found[f"{name}_bias"] = grad.sum(0)
    return {
        name: found[name].to(tensor.dtype).view(tensor.shape)
        for name, tensor in inputs._asdict().items()
        if name in needed
    }


def _through_plain(
    inputs: Inputs,
    dtype: torch.dtype,
    formula: Formula,
    grads: Sequence[Tensor | None],
    needed: Sequence[str],
) -> dict[str, Tensor]:
    """Gradients by torch's differentiation of the plain formula, which runs once more. They can be
    differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one input may depend on another, and each gets its own share.
        wanted = {name: getattr(inputs, name).view_as(getattr(inputs, name)) for name in needed}
        aliases = inputs._replace(**wanted)
        projections = aliases.project(dtype)
        outputs = plain.fuse(aliases.x, *projections, aliases.norms, aliases.past, formula)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output is not None and output.requires_grad
        ]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            list(wanted.values()),
            [grad for _, grad in pairs],
            create_graph=again,
            allow_unused=True,
        )
    return dict(zip(wanted, found, strict=True))


fuse.register_autograd(_differentiate, setup_context=_save)
