"""The rows of one chunk (`Lookup`), and a record of what a forward did (`Trace`).

`EngramMemory.lookup` makes a Lookup, and the blocks use it. Below the two classes are the steps of
a look-up: row ids, prefetching, the state, and leaves for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..addresses.addresser import Addresser, Chunk
from ..errors import InputError
from .batch_reader import BatchRequest
from .grads import RowGrad
from .prefetch import FEW_ROWS, Ticket
from .state import SequenceState
from .tracing import uncompiled

if TYPE_CHECKING:
    from .._native._core import Cursor
    from .memory import EngramMemory


@dataclass
class Trace:
    """What a forward did. If it is passed to `lookup`, `lookup` and `fuse` fill it.

    Attributes:
        row_ids: layer -> int64 [B, T, C].
        routes: order -> bool [B, T], True where the n-gram that ends there is hot: its rows are its
            own. The same in all layers.
        gates: layer -> f32 [B, T, S], 0 at dead positions.
        states: True: record the tensors below too, which are as large as the hidden states.
        inputs: layer -> f32 [B, T, S, D], the hidden states that the memory of the layer was given.
        updates: layer -> f32 [B, T, S, D], what it added to them, as rounded in their dtype.
        hidden: layer -> what the block of each layer returned, [B, T, ...]; recording.py fills it.
    """

    row_ids: dict[int, np.ndarray] = field(default_factory=dict)
    routes: dict[int, np.ndarray] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)
    states: bool = False
    inputs: dict[int, Tensor] = field(default_factory=dict)
    updates: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def add_fusion(self, layer: int, gate_BTS: Tensor, x_BTSD: Tensor, out_BTSD: Tensor) -> None:
        """Records what the memory of a layer did.

        Args:
            layer: The layer.
            gate_BTS: Its gates.
            x_BTSD: The hidden states that it was given; [B, T, D] is accepted for one stream.
            out_BTSD: The hidden states after it, of the same shape.
        """
        self.gates[layer] = gate_BTS.detach().float().cpu()
        if not self.states:
            return
        shape = (*gate_BTS.shape, -1)
        before_BTSD = x_BTSD.detach().float().cpu().reshape(shape)
        after_BTSD = out_BTSD.detach().float().cpu().reshape(shape)
        self.inputs[layer] = before_BTSD.clone()  # .float() and .cpu() may have copied nothing
        self.updates[layer] = after_BTSD - before_BTSD


@dataclass(frozen=True)
class Lookup:
    """Rows of one chunk for every memory layer, and whatever else `fuse` needs to know about it.

    Attributes:
        rows: layer -> [B, T, E], leaves that require grad while training. f32, or bf16 if the
            layer's weights are bf16 and the rows do not learn. The first access to a layer waits
            for its rows.
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


class TokenLookup(Lookup):
    """The Lookup of one token of each sequence, which one native call has read (TokenReader).

    The native fusion takes the values as they are; tensors are made if somebody asks for them.
    """

    layers: tuple[int, ...]
    values: bytearray
    state: SequenceState
    cursor: Cursor
    live = starts = trace = present = order = None

    def __init__(
        self,
        layers: tuple[int, ...],
        values: bytearray,
        state: SequenceState,
        cursor: Cursor,
    ) -> None:
        """values: f32 [layers, B, E]. cursor: of the state, through which it was extended."""
        set_once = object.__setattr__  # the class is frozen
        set_once(self, "layers", layers)
        set_once(self, "values", values)
        set_once(self, "state", state)
        set_once(self, "cursor", cursor)

    def finished(self) -> Lookup:
        """The same lookup, with tensors."""
        return Lookup(self.rows, None, None, self.state, None)

    @cached_property
    def rows(self) -> dict[int, Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Layer -> f32 [B, 1, E], on the CPU."""
        rows = torch.frombuffer(self.values, dtype=torch.float32)
        rows_LB1E = rows.view(len(self.layers), self.state.batch, 1, -1)
        return dict(zip(self.layers, rows_LB1E.unbind(), strict=True))


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
    if not (type(ids_BT) is Tensor or isinstance(ids_BT, Tensor)) or ids_BT.ndim != 2:
        found = getattr(ids_BT, "shape", type(ids_BT).__name__)
        raise InputError(f"ids: expected a tensor [B, T], found {found}")
    if state is None:
        return
    memory.bind(state)
    if state.batch != ids_BT.size(0):
        raise InputError(f"state: expected one for {len(ids_BT)} sequences, found {state.batch}")


def lookup_chunk(
    memory: EngramMemory,
    ids_BT: Tensor,
    state: SequenceState | None,
    live: Tensor | None,
    starts: Tensor | None,
    trace: Trace | None,
    present: Tensor | None,
    history: np.ndarray | None = None,
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
    if state is not None:
        history = state.history
    chunk = memory.addresser.chunk(ids, history, alive, begins)
    order = None
    if there is not None:
        order = _gap_order(there, first=state is None or state.length == 0)
    learn = {layer: _learn(memory, layer) for layer in memory.layers}
    if order is None:
        tickets, row_ids = _read_chunk(memory, chunk, learn)
    else:
        tickets, row_ids = _read_by_ids(memory, chunk, order)
    if state is not None:
        state.extend_checked(chunk.ids_BT, chunk.alive, begins, there)
        for ticket in dict.fromkeys(tickets.values()):
            if ticket.state == "waiting":
                state.watch(ticket, ids.shape[1])
    if trace is not None:
        ids_LBTC = _row_ids(memory.addresser, chunk, order)
        trace.row_ids.update(zip(memory.layers, ids_LBTC, strict=True))
        trace.routes.update(_routes(memory, ids_LBTC[0]))
    rows = {
        layer: partial(_wait_for_rows, memory, layer, row_ids, ticket, learn[layer])
        for layer, ticket in tickets.items()
    }
    live = _tensor(chunk.alive)
    return Lookup(Rows(rows), live, starts, state, trace, present, _tensor(order))


def _read_chunk(
    memory: EngramMemory, chunk: Chunk, learn: dict[int, bool]
) -> tuple[dict[int, Ticket], dict[int, np.ndarray]]:
    """Tickets by layer, and a dict that gets the row ids by layer, if any rows learn.

    If reading does not have to wait, and the model computes on the CPU, one call reads all layers
    now: it takes all cores, so nothing is gained by computing meanwhile. Of a few rows of a mapped
    file the system is asked: handing them to another thread would take longer.
    """
    devices = {layer: _device(memory, layer) for layer in memory.layers}
    batches = memory.batches
    rows = chunk.ids_BT.size * batches.columns * len(memory.layers)
    asks = not batches.in_memory and rows <= FEW_ROWS and batches.tells_residency
    now = batches.in_memory or asks
    now = now and all(device.type == "cpu" for device in devices.values())
    row_ids: dict[int, np.ndarray] = {}

    def read(layers: tuple[int, ...], now: bool, resident: bool = False) -> Ticket:
        wanted = row_ids if any(learn[layer] for layer in layers) else None
        dtype = _dtype(memory, layers, learn)
        request = BatchRequest(batches, chunk, layers, dtype, wanted, resident)
        return memory.prefetcher.read(request, device=devices[layers[0]], now=now)

    if now:
        ticket = read(memory.layers, True, resident=asks)
        if ticket.state != "failed":
            return dict.fromkeys(memory.layers, ticket), row_ids
    # One by one too if they failed together: an error is raised where its own rows are used.
    now = now and not asks
    return {layer: read((layer,), now) for layer in memory.layers}, row_ids


def _dtype(memory: EngramMemory, layers: tuple[int, ...], learn: dict[int, bool]) -> torch.dtype:
    """bfloat16 if rows would be converted to it anyway, else float32."""
    for layer in layers:
        value: Any = memory.blocks[str(layer)].value
        if learn[layer] or value.weight.dtype is not torch.bfloat16:
            return torch.float32
    return torch.bfloat16


def _read_by_ids(
    memory: EngramMemory, chunk: Chunk, order: np.ndarray
) -> tuple[dict[int, Ticket], dict[int, np.ndarray]]:
    """Tickets and row ids by layer, of a chunk whose tokens follow each other in `order`."""
    row_ids = dict(zip(memory.layers, _row_ids(memory.addresser, chunk, order), strict=True))
    tickets = {
        layer: memory.prefetcher.submit({layer: ids_BTC}, device=_device(memory, layer), owned=True)
        for layer, ids_BTC in row_ids.items()
    }
    return tickets, row_ids


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
    memory: EngramMemory,
    layer: int,
    row_ids: dict[int, np.ndarray],
    ticket: Ticket,
    learn: bool,
) -> Tensor:
    """Rows [B, T, E]. learn: make them a leaf, whose gradient goes to `memory.row_grads`."""
    leaf_BTE = ticket.wait()[layer]
    if not learn:
        return leaf_BTE
    ids_BTC = row_ids[layer]

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


def _row_ids(addresser: Addresser, chunk: Chunk, order: np.ndarray | None) -> np.ndarray:
    """Row ids int64 [L, B, T, C] of a chunk. order: `Lookup.order`."""
    if order is None:
        return addresser.all_rows(chunk.ids_BT, chunk.history, chunk.live, chunk.starts)
    ids_BT = np.take_along_axis(chunk.ids_BT, order, axis=1)
    live = None if chunk.live is None else np.take_along_axis(chunk.live, order, axis=1)
    starts = None if chunk.starts is None else np.take_along_axis(chunk.starts, order, axis=1)
    rows_LBTC = addresser.all_rows(ids_BT, chunk.history, live, starts)
    back = np.argsort(order, axis=1)[None, :, :, None]
    return np.take_along_axis(rows_LBTC, back, axis=2)


def _routes(memory: EngramMemory, ids_BTC: np.ndarray) -> dict[int, np.ndarray]:
    """`Trace.routes`, from the row ids of the first layer."""
    spec = memory.config.hash
    hot_BTO = ids_BTC[..., :: spec.heads] >= spec.row_count(memory.layers[0])
    return {order: hot_BTO[..., number] for number, order in enumerate(spec.orders)}


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
