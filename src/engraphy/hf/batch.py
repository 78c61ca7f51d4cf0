"""Which tokens a call to a decoder brings: their ids, which positions are holes, and where
documents begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError


@dataclass(frozen=True)
class Batch:
    """The tokens of a call.

    Attributes:
        ids: Token ids, int [B, T].
        present: bool [B, T]. False means that the mask has no token of the sequence at this
            position. None means that all positions have one.
        starts: bool [B, T]. True where a document begins. None means nowhere.
    """

    ids: Tensor
    present: Tensor | None
    starts: Tensor | None


def read_batch(arguments: Mapping[str, Any], cache: Cache | None, seen: int) -> Batch:
    """The tokens of a call to a decoder.

    `present` comes from the mask. The columns of a mask [B, columns] are positions in the cache. In
    a mask [B, heads, T, columns], which transformers makes for a static cache, a token that is
    there sees itself. `starts` is True where position ids are 0. Ids of more dimensions (multiple
    choice) are flattened to sequences, as decoders do.

    Args:
        arguments: Arguments of the call, by name.
        cache: Its cache.
        seen: Number of tokens in the cache.

    Raises:
        InputError: The call does not say which token is where: it has embeddings without ids, or a
            mask that is not 2-D without position ids that go up by one or begin again at 0.
    """
    token = _read_token(arguments, seen)
    if token is not None:
        return token
    ids_BT = _read_ids(arguments.get("input_ids"))
    mask = _flattened(arguments.get("attention_mask"), arguments["input_ids"].ndim)
    positions = _flattened(arguments.get("position_ids"), arguments["input_ids"].ndim)
    starts_BT = None
    if positions is not None:
        positions = _check_shape(positions, *ids_BT.shape)
        if not bool(positions.all()):
            starts_BT = positions == 0
    present_BT = None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        present_BT = _present_in(mask, seen, *ids_BT.shape)
    elif mask is not None:
        present_BT = _seen_by_themselves(mask, ids_BT, cache, seen)
        _check_positions(mask, positions, present_BT, seen)
    if present_BT is None or bool(present_BT.all()):
        return Batch(ids_BT, None, starts_BT)
    if starts_BT is not None:
        starts_BT = starts_BT & present_BT
    return Batch(ids_BT, present_BT, starts_BT)


def _read_token(arguments: Mapping[str, Any], seen: int) -> Batch | None:
    """`read_batch` for one token of one sequence that is there and begins no document.

    None for anything else. Each operation of torch that it saves takes longer than reading a row.
    """
    ids = arguments.get("input_ids")
    if type(ids) is not Tensor or ids.shape != (1, 1) or not ids.is_cpu:
        return None
    positions = arguments.get("position_ids")
    if positions is not None and (positions.numel() != 1 or not positions.item()):
        return None
    mask = arguments.get("attention_mask")
    if mask is not None:
        is_plain = type(mask) is Tensor and mask.ndim == 2 and mask.shape[0] == 1
        if not is_plain or mask.shape[1] <= seen or not mask[0, seen].item():
            return None
    return Batch(ids, None, None)


def _read_ids(ids: Tensor | None) -> Tensor:
    if ids is None:
        raise InputError(
            "the memory looks up token ids: expected input_ids, found inputs_embeds alone; "
            "detach the memory to run the model on embeddings"
        )
    if ids.ndim < 2:
        raise InputError(f"input_ids: expected [B, T], found {list(ids.shape)}")
    return ids.flatten(0, -2)


def _flattened(values: Any, dimensions: int) -> Any:
    """`values` as [B, T] if it has as many dimensions as the ids of the call."""
    if isinstance(values, Tensor) and values.ndim == dimensions:
        return values.flatten(0, -2)
    return values


def _check_shape(positions: Tensor, batch: int, tokens: int) -> Tensor:
    """Position ids as [batch, tokens]. Raises InputError for another shape."""
    if positions.ndim == 2 and positions.shape[1] == tokens and positions.shape[0] in (1, batch):
        return positions.expand(batch, tokens)
    raise InputError(
        f"position_ids: expected [{batch} or 1, {tokens}], found {list(positions.shape)}"
    )


def _present_in(mask: Tensor, seen: int, batch: int, tokens: int) -> Tensor:
    """Which tokens of the call a mask [B, columns] has. Raises InputError for another shape."""
    if mask.shape[0] != batch or mask.shape[1] < seen + tokens:
        raise InputError(
            f"attention_mask: expected [{batch}, at least {seen + tokens}], "
            f"found {list(mask.shape)}"
        )
    return mask[:, seen : seen + tokens] != 0


def _seen_by_themselves(mask: Any, ids_BT: Tensor, cache: Cache | None, seen: int) -> Tensor | None:
    """Which tokens see themselves in a mask [B, heads, T, columns]; None if no mask says so.

    mask: one mask, or one for each type of layer.
    """
    batch, tokens = ids_BT.shape
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    for layer_mask in masks:
        if not isinstance(layer_mask, Tensor) or layer_mask.ndim != 4:
            continue
        if layer_mask.shape[2] != tokens:
            continue
        for columns, offset in _column_sizes(cache, seen, tokens):
            first = seen - offset  # the column of the call's first token
            if columns != layer_mask.shape[3] or not 0 <= first <= columns - tokens:
                continue
            own = layer_mask[..., first : first + tokens].diagonal(dim1=2, dim2=3)  # [B, heads, T]
            if own.dtype != torch.bool:
                own = own > torch.finfo(own.dtype).min / 2
            return own.any(1).expand(batch, tokens)
    return None


def _column_sizes(cache: Cache | None, seen: int, tokens: int) -> Iterator[tuple[int, int]]:
    """For each kind of layer: its mask's number of columns, and the position of the first one."""
    yield seen + tokens, 0
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if cache is not None and isinstance(layer, CacheLayerMixin):
            yield cache.get_mask_sizes(tokens, index)


def _check_positions(
    mask: Any, positions: Tensor | None, present: Tensor | None, seen: int
) -> None:
    """Raises InputError unless the positions of present tokens go up by one or restart at 0."""
    if positions is not None and _follow_each_other(positions, present, seen):
        return
    found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise InputError(
        "attention_mask: expected [B, T], or position_ids that go up by one and begin at 0 in each "
        f"document, found {found} and {'no' if positions is None else 'other'} position_ids"
    )


def _follow_each_other(positions: Tensor, present: Tensor | None, seen: int) -> bool:
    if present is None:
        present = torch.ones_like(positions, dtype=torch.bool)
    order = (~present).to(torch.uint8).argsort(dim=1, stable=True)  # present tokens come first
    positions = positions.gather(1, order)
    present = present.gather(1, order)
    jumps = (positions.diff() != 1) & (positions[:, 1:] != 0) & present[:, 1:]
    late = present[:, :1] & (positions[:, :1] != 0) & (seen == 0)
    return not bool(jumps.any()) and not bool(late.any())
