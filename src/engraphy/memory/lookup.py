"""Lookup: the rows of one chunk, on their way from `EngramMemory.lookup` to the blocks; and Trace,
what was let in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..addresses.addresser import Addresser
from ..addresses.vocab import VocabMap
from ..errors import InputError
from .state import SequenceState


@dataclass
class Trace:
    """What a forward did, for looking inside: filled by `lookup` and `fuse` when handed to
    `lookup`.

    row_ids: layer -> int64 [B, T, C]. gates: layer -> f32 [B, T, S], 0 at dead positions.
    """

    row_ids: dict[int, np.ndarray] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """Rows of one chunk for every memory layer. rows: layer -> [B, T, E], leaves that require grad
    while training; a layer that is still being read is waited for when it is first asked for.

    present: bool [B, T], False = no token of the sequence stands here. order: int64 [B, T],
    positions in the order in which convs see them, absent ones last; None = as they stand. off: the
    memory was disabled; there are no rows, and `fuse` adds nothing.
    """

    rows: Mapping[int, Tensor]
    live: Tensor | None
    starts: Tensor | None
    state: SequenceState | None
    trace: Trace | None
    present: Tensor | None = None
    order: Tensor | None = None
    off: bool = False


class Rows(Mapping[int, Tensor]):
    """Rows by layer, each of them waited for once."""

    def __init__(self, asked: dict[int, Callable[[], Tensor]]) -> None:
        self._asked = asked
        self._here: dict[int, Tensor] = {}

    @torch.compiler.disable
    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._here:
            self._here[layer] = self._asked[layer]()
        return self._here[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._asked

    def __iter__(self) -> Iterator[int]:
        return iter(self._asked)

    def __len__(self) -> int:
        return len(self._asked)


def check_present(present_BT: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The flags as they are. Raises InputError unless they are bool of this shape."""
    if present_BT.dtype != np.bool_ or present_BT.shape != shape:
        raise InputError(
            f"present: expected bool {list(shape)}, "
            f"found {present_BT.dtype} {list(present_BT.shape)}"
        )
    return present_BT


def row_ids_of(
    addresser: Addresser,
    ids_BT: np.ndarray,
    state: SequenceState | None,
    live: np.ndarray | None,
    starts: np.ndarray | None,
    present: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Row ids int64 [L, B, T, C] of a chunk that follows `state`, and the order of its positions
    (`Lookup.order`)."""
    history = None if state is None else state.history
    if present is None:
        return addresser.all_rows(ids_BT, history, live, starts), None
    live = present if live is None else live & present
    starts = None if starts is None else starts & present
    order = _gap_order(present, first=state is None or state.length == 0)
    if order is None:
        return addresser.all_rows(ids_BT, history, live, starts), None
    ids_BT, live = (
        np.take_along_axis(ids_BT, order, axis=1),
        np.take_along_axis(live, order, axis=1),
    )
    if starts is not None:
        starts = np.take_along_axis(starts, order, axis=1)
    rows_LBTC = addresser.all_rows(ids_BT, history, live, starts)
    back = np.argsort(order, axis=1)[None, :, :, None]
    return np.take_along_axis(rows_LBTC, back, axis=2), order


def alive_in(
    vocab: VocabMap, ids_BT: np.ndarray, live: np.ndarray | None, present: np.ndarray | None
) -> np.ndarray | None:
    """Which positions are live, present and have a token in the vocabulary map, bool [B, T]; None =
    all."""
    if present is not None:
        live = present if live is None else live & present
    if not vocab.has_dead_ids:
        return live
    valid = np.ones(ids_BT.shape, dtype=bool) if live is None else live
    alive = valid & (vocab.table[np.where(valid, ids_BT, 0)] >= 0)
    return None if alive.all() else alive


def _gap_order(present_BT: np.ndarray, first: bool) -> np.ndarray | None:
    """int64 [B, T]: the positions of each sequence, those that are present first, both in their
    order.

    None if they can stay as they are: no token follows an absent position. Nor do absent positions
    before the first token of all (first: nothing came before this chunk) matter, since nothing is
    there to look back to.
    """
    seen_BT = present_BT.cumsum(1) > 0 if first else np.ones_like(present_BT)
    followed_BT = present_BT[:, ::-1].cumsum(1)[:, ::-1] > 0
    if not (~present_BT & seen_BT & followed_BT).any():
        return None
    return np.argsort(~present_BT, axis=1, kind="stable")


def reordered(values_BT: Tensor, order_BT: Tensor) -> Tensor:
    """[B, T, ...] with the positions of each sequence in another order."""
    sequence = torch.arange(len(order_BT), device=order_BT.device)[:, None]
    return values_BT[sequence, order_BT]
