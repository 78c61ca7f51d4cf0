"""Which tokens a call to a decoder brings: their ids, where nothing stands, and where documents
begin."""

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
    """ids [B, T]. present: bool [B, T], False = the mask says that no token of the sequence stands
    here; None = all. starts: bool [B, T], a document begins here; None = nowhere."""

    ids: Tensor
    present: Tensor | None
    starts: Tensor | None


def read_batch(arguments: Mapping[str, Any], cache: Cache | None, seen: int) -> Batch:
    """The tokens of a call to a decoder. seen: tokens in its cache.

    present comes from the mask: of a 2-D one the columns are positions in the cache; in one of four
    dimensions, which transformers makes for a static cache, a token that stands there sees itself.
    starts: where position ids are 0. Ids of more dimensions (multiple choice) are flattened to
    sequences, as decoders do. Raises InputError where it cannot be told what stands where:
    embeddings without ids, a mask that is not 2-D without position ids that go up by one or begin
    again at 0.
    """
    ids, mask, positions = (
        arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids")
    )
    if ids is None:
        raise InputError(
            "the memory looks up token ids: expected input_ids, found inputs_embeds alone; "
            "detach the memory to run the model on embeddings"
        )
    if ids.ndim < 2:
        raise InputError(f"input_ids: expected [B, T], found {list(ids.shape)}")
    if isinstance(mask, Tensor) and mask.ndim == ids.ndim:
        mask = mask.flatten(0, -2)
    if positions is not None and positions.ndim == ids.ndim:
        positions = positions.flatten(0, -2)
    ids = ids.flatten(0, -2)
    batch, tokens = ids.shape
    starts = None
    if positions is not None:
        if (
            positions.ndim != 2
            or positions.shape[1] != tokens
            or positions.shape[0] not in (1, batch)
        ):
            raise InputError(
                f"position_ids: expected [{batch} or 1, {tokens}], found {list(positions.shape)}"
            )
        positions = positions.expand(batch, tokens)
        if not bool(positions.all()):
            starts = positions == 0
    if mask is None:
        return Batch(ids, None, starts)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.shape[0] != batch or mask.shape[1] < seen + tokens:
            raise InputError(
                f"attention_mask: expected [{batch}, at least {seen + tokens}], found {list(mask.shape)}"
            )
        present = mask[:, seen : seen + tokens] != 0
    else:
        present = _seen_by_themselves(mask, ids, cache, seen)
        _check_positions(mask, positions, present, seen)
    if present is None or bool(present.all()):
        return Batch(ids, None, starts)
    if starts is not None:
        starts = starts & present
    return Batch(ids, present, starts)


def _seen_by_themselves(mask: Any, ids: Tensor, cache: Cache | None, seen: int) -> Tensor | None:
    """Which tokens a mask [B, heads, T, columns] lets see themselves; None if no mask tells. mask:
    one, or one for each type of layer."""
    batch, tokens = ids.shape
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    for each in masks:
        if not isinstance(each, Tensor) or each.ndim != 4 or each.shape[2] != tokens:
            continue
        for columns, offset in _column_sizes(cache, seen, tokens):
            first = seen - offset
            if columns == each.shape[3] and 0 <= first <= columns - tokens:
                own = each[..., first : first + tokens].diagonal(dim1=2, dim2=3)  # [B, heads, T]
                allowed = own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2
                return allowed.any(1).expand(batch, tokens)
    return None


def _column_sizes(cache: Cache | None, seen: int, tokens: int) -> Iterator[tuple[int, int]]:
    """For each kind of layer, how many columns its mask has, and the place in the sequence of the
    first of them."""
    yield seen + tokens, 0
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if cache is not None and isinstance(layer, CacheLayerMixin):
            yield cache.get_mask_sizes(tokens, index)


def _check_positions(
    mask: Any, positions: Tensor | None, present: Tensor | None, seen: int
) -> None:
    """Raise InputError unless the positions of what is present go up by one or begin again at 0."""
    if positions is not None:
        there = torch.ones_like(positions, dtype=torch.bool) if present is None else present
        order = (~there).to(torch.uint8).argsort(dim=1, stable=True)  # what is present comes first
        positions, there = positions.gather(1, order), there.gather(1, order)
        jumps = (positions.diff() != 1) & (positions[:, 1:] != 0) & there[:, 1:]
        late = there[:, :1] & (positions[:, :1] != 0) & (seen == 0)
        if not bool(jumps.any()) and not bool(late.any()):
            return
    found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise InputError(
        f"attention_mask: expected [B, T], or position_ids that go up by one and begin at 0 in each "
        f"document, found {found} and {'no' if positions is None else 'other'} position_ids"
    )
