"""The rows of one chunk (`Lookup`), and a record of what a forward did (`Trace`).

`EngramMemory.lookup` makes a Lookup, and the blocks use it. Below the two classes are the steps of
a look-up: row ids, prefetching, the state, and leaves for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..addresses.addresser import Addresser
from ..errors import InputError
from .grads import RowGrad
from .prefetch import Ticket
from .state import SequenceState
from .tracing import uncompiled

if TYPE_CHECKING:
    from .memory import EngramMemory


@dataclass
class Trace:
    """What a forward did. If it is passed to `lookup`, `lookup` and `fuse` fill it.

    Attributes:
        row_ids: layer -> int64 [B, T, C].
        gates: layer -> f32 [B, T, S], 0 at dead positions.
    """

    row_ids: dict[int, np.ndarray] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Lookup:
    """Rows of one chunk for every memory layer, and whatever else `fuse` needs to know about it.

    Attributes:
        rows: layer -> f32 [B, T, E], leaves that require grad while training. The first access to
            a layer waits for its rows.
        live: bool [B, T]. False: `fuse` adds nothing here. None = all positions are live.
        starts: bool [B, T]. True: a document begins here. None = no document begins.
        state: the state that the chunk has extended; None = no state.
        trace: the record that `fuse` adds gates to; None = no record.
        present: bool [B, T]. False: the sequence has no token here. None = all are present.
        order: int64 [B, T], positions in the order in which convs see them, absent ones last;
            None = in their own order.
        off: True if the memory was disabled: there are no rows, and `fuse` adds nothing.
    """

    rows: Mapping[int, Tensor]
    live: Tensor | None
    starts: Tensor | None
    state: SequenceState | None
    trace: Trace | None
    present: Tensor | None = None
    order: Tensor | None = None
    off: bool = False

    def finished(self) -> Lookup:
        """The same lookup, with the rows of every layer in a plain dict. Waits for them.

        A compiled block may be given it (`torch.compile(block, fullgraph=True)`): reading stays
        outside of the graph. Raises the error if reading failed.
        """
        return replace(self, rows={layer: self.rows[layer] for layer in self.rows})


class Rows(Mapping[int, Tensor]):
    """Rows by layer; the first access to a layer waits for them."""

    def __init__(self, pending: dict[int, Callable[[], Tensor]]) -> None:
        self._pending = pending
        self._ready: dict[int, Tensor] = {}

    @uncompiled
    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._ready:
            self._ready[layer] = self._pending[layer]()
        return self._ready[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._pending

    def __iter__(self) -> Iterator[int]:
        return iter(self._pending)

    def __len__(self) -> int:
        return len(self._pending)


def lookup_nothing(state: SequenceState | None, trace: Trace | None) -> Lookup:
    """The Lookup of a disabled memory. Raises InputError if a state is given."""
    if state is not None:
        raise InputError(
            "state: expected none while the memory is disabled, since the state would miss the "
            "tokens of this chunk; start a new one after `disabled`"
        )
    return Lookup({}, None, None, None, trace, off=True)


def check_chunk(memory: EngramMemory, ids_BT: Tensor, state: SequenceState | None) -> None:
    """Raises InputError unless the ids are a tensor [B, T] and the state is one of B sequences."""
    if not isinstance(ids_BT, Tensor) or ids_BT.ndim != 2:
        found = getattr(ids_BT, "shape", type(ids_BT).__name__)
        raise InputError(f"ids: expected a tensor [B, T], found {found}")
    if state is None:
        return
    memory.bind(state)
    if state.batch != len(ids_BT):
        raise InputError(f"state: expected one for {len(ids_BT)} sequences, found {state.batch}")


def lookup_chunk(
    memory: EngramMemory,
    ids_BT: Tensor,
    state: SequenceState | None,
    live: Tensor | None,
    starts: Tensor | None,
    trace: Trace | None,
    present: Tensor | None,
) -> Lookup:
    """`EngramMemory.lookup`, for arguments that `check_chunk` has checked."""
    ids = ids_BT.numpy(force=True)
    alive = _numpy(live)
    begins = _numpy(starts)
    there = _numpy(present)
    if there is not None and _check_present(there, ids.shape).all():
        present = there = None
    if there is not None:
        alive = there if alive is None else alive & there
        begins = None if begins is None else begins & there
    row_ids_LBTC, alive, order = _row_ids(memory.addresser, ids, state, alive, begins, there)
    row_ids = dict(zip(memory.layers, row_ids_LBTC, strict=True))
    tickets = {
        layer: memory.prefetcher.submit(
            {layer: ids_BTC}, device=_device(memory, layer), owned=trace is None
        )
        for layer, ids_BTC in row_ids.items()
    }
    if state is not None:
        state.extend_checked(ids, alive, begins, there)
        for ticket in tickets.values():
            if ticket.state == "waiting":
                state.watch(ticket, ids.shape[1])
    if trace is not None:
        trace.row_ids.update(row_ids)
    rows = {
        layer: partial(_wait_for_rows, memory, layer, row_ids[layer], ticket, _learn(memory, layer))
        for layer, ticket in tickets.items()
    }
    return Lookup(Rows(rows), _tensor(alive), starts, state, trace, present, _tensor(order))


def _device(memory: EngramMemory, layer: int) -> torch.device:
    """The device of the layer's dense weights, which is where its rows are needed."""
    parameters = memory.blocks[str(layer)].parameters()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _learn(memory: EngramMemory, layer: int) -> bool:
    """Whether rows of the layer collect gradients if they are looked up now."""
    if not (memory.training and torch.is_grad_enabled()):
        return False
    if memory.rows_require_grad is not None:
        return memory.rows_require_grad
    return any(parameter.requires_grad for parameter in memory.blocks[str(layer)].parameters())


def _wait_for_rows(
    memory: EngramMemory, layer: int, ids_BTC: np.ndarray, ticket: Ticket, learn: bool
) -> Tensor:
    """Rows f32 [B, T, E]. learn: make them a leaf, whose gradient goes to `memory.row_grads`."""
    leaf_BTE = ticket.wait()[layer]
    if not learn:
        return leaf_BTE

    def hand_over(leaf: Tensor) -> None:
        assert leaf.grad is not None
        grad_Nd = leaf.grad.reshape(-1, memory.config.dim).numpy(force=True)
        memory.add_row_grad(RowGrad(layer, ids_BTC.reshape(-1), grad_Nd))
        leaf.grad = None

    leaf_BTE.requires_grad_().register_post_accumulate_grad_hook(hand_over)
    return leaf_BTE


def _check_present(present_BT: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the flags. Raises InputError unless they are bool of this shape."""
    if present_BT.dtype != np.bool_ or present_BT.shape != shape:
        raise InputError(
            f"present: expected bool {list(shape)}, "
            f"found {present_BT.dtype} {list(present_BT.shape)}"
        )
    return present_BT


def _row_ids(
    addresser: Addresser,
    ids_BT: np.ndarray,
    state: SequenceState | None,
    live: np.ndarray | None,
    starts: np.ndarray | None,
    present: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Row ids int64 [L, B, T, C] of a chunk that follows `state`.

    Args:
        addresser, ids_BT, state, present: as in `EngramMemory.lookup`.
        live, starts: the same, False where no token is present.

    Returns:
        The row ids; bool [B, T], which positions are live and have a token in the vocabulary map,
        None = all; and `Lookup.order`.
    """
    history = None if state is None else state.history
    order = None
    if present is not None:
        order = _gap_order(present, first=state is None or state.length == 0)
    if order is not None:
        ids_BT = np.take_along_axis(ids_BT, order, axis=1)
        live = None if live is None else np.take_along_axis(live, order, axis=1)
        starts = None if starts is None else np.take_along_axis(starts, order, axis=1)
    alive = np.empty(ids_BT.shape, dtype=bool) if addresser.vocab.has_dead_ids else None
    rows_LBTC = addresser.all_rows(ids_BT, history, live, starts, alive_out=alive)
    if alive is None:
        alive = live
    elif alive.all():
        alive = None
    if order is not None:
        back = np.argsort(order, axis=1)
        rows_LBTC = np.take_along_axis(rows_LBTC, back[None, :, :, None], axis=2)
        alive = None if alive is None else np.take_along_axis(alive, back, axis=1)
    return rows_LBTC, alive, order


def _gap_order(present_BT: np.ndarray, first: bool) -> np.ndarray | None:
    """int64 [B, T]: the positions of each sequence, present ones first, otherwise in order.

    Returns None if no position has to move: no token follows an absent position. In the first chunk
    of a sequence (`first`), absent positions before its first token do not matter either, since
    look-back finds nothing there anyway.
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


def _numpy(values: Tensor | None) -> np.ndarray | None:
    return None if values is None else values.numpy(force=True)


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)
