"""The use of a Lookup in a block: its layer's rows update the hidden state."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import _native
from ..fusion.layer import EngramLayer
from .lookup import Lookup, TokenLookup, reordered


def fuse_next(block: nn.Module, index: int, x: Tensor, lookup: TokenLookup) -> Tensor | None:
    """`fuse_token` for a token that one native call has looked up.

    Args:
        block: the layer's fusion layer.
        index: the layer's place among the memory's layers.
        x: [B, 1, S, D] or [B, 1, D].
        lookup: of this token.
    """
    if type(block) is not EngramLayer or _native.core is None or is_compiling():
        return None
    return block.decode_next(x, lookup.values, lookup.cursor, index)


def fuse_token(block: nn.Module, layer: int, x: Tensor, lookup: Lookup) -> Tensor | None:
    """x [B, 1, S, D] or [B, 1, D] plus the update, by one native call.

    Returns None if that is not possible; `fuse_chunk` computes the same.
    """
    state = lookup.state
    if state is None or lookup.starts is not None or lookup.present is not None:
        return None
    if x.ndim not in (3, 4) or x.shape[1] != 1 or not x.is_cpu:
        return None
    if not isinstance(block, EngramLayer):
        return None
    columns = state.columns(layer, x)
    if columns is None:
        return None
    gate_B1S = None if lookup.trace is None else _empty_gate(x, block.spec.streams)
    out = block.decode(x, lookup.rows[layer], lookup.live, columns, gate_B1S)
    if out is None:
        return None
    state.advance(layer)
    if lookup.trace is not None and gate_B1S is not None:
        lookup.trace.add_fusion(layer, gate_B1S, x, out)
    return out


def fuse_chunk(block: nn.Module, layer: int, x_BTSD: Tensor, lookup: Lookup) -> Tensor:
    """x plus the update, for any chunk on any device. Pushes the conv inputs to the state."""
    state = lookup.state
    present = lookup.present
    device = x_BTSD.device
    window = None if state is None else state.window(layer)
    live = _to(lookup.live, device)
    starts = _to(lookup.starts, device)
    order = _to(lookup.order, device)
    if starts is not None and present is not None:
        starts = starts & present.to(device)
    # The layer adds the residual itself, which saves a pass, unless something else sees its update.
    residual = order is None and isinstance(block, EngramLayer) and block.is_bare
    options = {"residual": True} if residual else {}  # another module need not know it
    out_BTSD, gate_BTS, inputs_BTSD = block(
        _reordered(x_BTSD, order),
        _reordered(lookup.rows[layer].to(device), order),
        window,
        _reordered(live, order),
        _reordered(starts, order),
        conv_inputs=state is not None,
        **options,
    )
    back = None if order is None else order.argsort(1)  # to the original positions
    if state is not None and inputs_BTSD is not None:
        state.push(layer, _reordered(inputs_BTSD, back), lookup.starts, present)
    if not residual:
        out_BTSD = x_BTSD + _reordered(out_BTSD, back)
    if lookup.trace is not None:
        lookup.trace.add_fusion(layer, _reordered(gate_BTS, back), x_BTSD, out_BTSD)
    return out_BTSD


def _empty_gate(x: Tensor, streams: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(len(x), 1, streams, dtype=dtype, device=x.device)


def _to(values: Tensor | None, device: torch.device) -> Tensor | None:
    return None if values is None else values.to(device)


@overload
def _reordered(values_BT: Tensor, order_BT: Tensor | None) -> Tensor: ...
@overload
def _reordered(values_BT: None, order_BT: Tensor | None) -> None: ...
def _reordered(values_BT: Tensor | None, order_BT: Tensor | None) -> Tensor | None:
    if values_BT is None or order_BT is None:
        return values_BT
    return reordered(values_BT, order_BT)
