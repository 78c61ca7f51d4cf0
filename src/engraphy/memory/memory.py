"""EngramMemory: the three ideas joined for a model: addresses, stores, and one fusion layer per
memory layer.

The table is not a Parameter. The rows of a batch become a leaf tensor each time; after backward its
gradient is handed to `row_grads`, which a row optimiser drains. Request state (last ids, conv
window) is a SequenceState in the caller's hands; a forward without one starts from nothing.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..addresses.addresser import Addresser
from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch, InputError, StoreError
from ..fusion.layer import EngramLayer
from ..rows.format import RowFormat
from ..rows.init import normal_rows
from ..spec.config import EngramConfig
from ..store.base import RowStore
from ..store.group import StoreGroup
from ..store.names import follow
from ..table.table import Table
from . import identity, saved, switch
from .grads import RowGrad, Waiting
from .lookup import Lookup, Rows, Trace, alive_in, check_present, reordered, row_ids_of
from .prefetch import Prefetcher, Ticket
from .state import SequenceState
from .token_reader import TokenReader
from .tracing import REASON, refuse_tracing

__all__ = ["EngramMemory", "Lookup", "RowGrad", "Trace"]


class EngramMemory(nn.Module):
    """A memory for a model: `lookup` before the blocks run, `fuse` in each block that has a
    memory.

    config, vocab: what is addressed. store: "ram:" (a new table of `row_format`, all zeros until
    `init_rows`), the URL of a table ("file:DIR"; the format is read from it) or its folder as a
    Path, an open Table (mode "w" to train it in place), or {layer: RowStore} with `row_format`
    given where the stores do not know it. `close`, or the end of `with memory:`, closes the stores
    of a URL or path; a Table, or stores that were handed in, stay open. made_for: the model that it
    belongs to, as `hf.attach` tells it; saved with it, and checked where it is attached again. None
    = not known, nothing is checked. follows_adapters: whether PEFT's `disable_adapter` disables it
    too, where it is attached. rows_require_grad: None = rows learn where any parameter of their
    layer does, so `requires_grad_` on the memory or on a model around it reaches them; True or
    False = whatever the parameters do. Raises DigestMismatch where the table was made for other
    addresses, ConfigError where sizes differ.
    """

    def __init__(
        self,
        config: EngramConfig,
        vocab: VocabMap,
        store: str | os.PathLike[str] | Table | Mapping[int, RowStore] = "ram:",
        row_format: RowFormat | str | None = None,
    ):
        super().__init__()
        self.config, self.vocab = config, vocab
        self.addresser = Addresser(config.hash, vocab)
        self.address_digest = config.address_digest(vocab.digest)
        self.stores = StoreGroup.open(config, store, row_format, address_digest=self.address_digest)
        self.format = self.stores.format
        self._closed = False
        self.prefetcher = Prefetcher(self.stores)
        self._tokens = TokenReader(self.addresser, self.stores, self.prefetcher)
        self.blocks = nn.ModuleDict(
            {str(layer): EngramLayer(config.layer) for layer in self.layers}
        )
        self._windows = dict.fromkeys(self.layers, config.layer.window)
        self.row_grads: list[RowGrad] = []
        self._waiting = Waiting()
        self.rows_require_grad: bool | None = None
        self.follows_adapters = True
        self._model: Callable[[], dict[str, Any] | None] = lambda: None
        logging.getLogger("engraphy").info("serving %s", self.stores.describe())

    @property
    def made_for(self) -> dict[str, Any] | None:
        """What is known of the model that it is or was attached to; None = nothing."""
        return self._model()

    @made_for.setter
    def made_for(self, value: dict[str, Any] | None) -> None:
        self._model = lambda: value

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers (0-based) that have a memory."""
        return self.config.hash.layer_ids

    @property
    def enabled(self) -> bool:
        """Whether this thread or task runs with the memory; False inside `disabled`."""
        return not switch.is_disabled(self)

    def disabled(self) -> AbstractContextManager[None]:
        """`with memory.disabled():` runs the model without its memory, bit for bit the bare model.

        It holds for this thread or task alone, and for forwards that begin in it: `lookup` then
        gives a Lookup that is `off`, for which `fuse` gives x back. Tokens that pass meanwhile are
        in no state: `lookup` with one is an InputError, and so is an attached model's cache that
        has seen them once the memory is enabled again. Compiled blocks stay compiled.
        """
        return switch.disabled(self)

    def widen(self, raw_size: int) -> None:
        """Take token ids below `raw_size`: those beyond the vocabulary map are dead, and no address
        changes.

        For a model whose vocabulary has grown; where the memory is attached it is called for it.
        """
        if raw_size > self.vocab.raw_size:
            self.vocab = self.vocab.widened(raw_size)
            self.addresser = Addresser(self.config.hash, self.vocab)
            self._tokens = TokenReader(self.addresser, self.stores, self.prefetcher)

    def close(self) -> None:
        """Wait for what is being read, and close the stores that were opened for this memory.

        Rows that were looked up stay valid. May be called again; every other use raises StoreError
        afterwards, also in the model that the memory is attached to: detach it first.
        """
        self._closed = True
        self.prefetcher.close()
        self.stores.close()

    def __enter__(self) -> EngramMemory:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the memory is closed; load it again, or detach it from its model")

    def state(self, batch: int, margin: int = 64) -> SequenceState:
        """A fresh state for `batch` sequences that can be cropped by up to `margin` tokens."""
        return SequenceState(batch, margin).bind(self.config.hash.order, self._windows)

    @torch.compiler.disable(reason=REASON)
    def lookup(
        self,
        ids_BT: Tensor,
        state: SequenceState | None = None,
        live: Tensor | None = None,
        starts: Tensor | None = None,
        trace: Trace | None = None,
        *,
        present: Tensor | None = None,
    ) -> Lookup:
        """Ask for every layer's rows for raw ids [B, T] that follow `state`, which is extended by
        them.

        They are read from now on, in the order of the layers, while the caller goes on (see
        prefetch.py); until the rows of a layer were asked for, nothing may write to its store.
        live, starts: bool [B, T] as in `Addresser.all_rows`. present: bool [B, T], False = no token
        of the sequence stands here (a hole in a mask): what follows is looked up and fused as if
        the position were not there, and at the position itself nothing is added. Rows are f32, on
        the CPU, as gathered; with gradients enabled, in training mode and as `rows_require_grad`
        says, they are leaves whose gradients reach `row_grads`. Raises InputError for ids, shapes
        or a state that do not fit, and under tracing, export and capture (tracing.py), before the
        state changes. What goes wrong with reading is raised by `rows[layer]`.
        """
        self._check_open()
        if not self.enabled:
            if state is not None:
                raise InputError(
                    "state: expected none while the memory is disabled, since its tokens "
                    "would be missing in it afterwards; start a new one after `disabled`"
                )
            return Lookup({}, None, None, None, trace, off=True)
        refuse_tracing(ids_BT)
        if not isinstance(ids_BT, Tensor) or ids_BT.ndim != 2:
            raise InputError(
                f"ids: expected a tensor [B, T], found {getattr(ids_BT, 'shape', type(ids_BT).__name__)}"
            )
        if state is not None:
            state.bind(self.config.hash.order, self._windows)
            if state.batch != len(ids_BT):
                raise InputError(
                    f"state: expected one for {len(ids_BT)} sequences, found {state.batch}"
                )
            simple = live is starts is trace is present is None
            if ids_BT.shape[1] == 1 and simple and not torch.is_grad_enabled():
                rows_B1E = self._tokens.read(ids_BT, state)
                if rows_B1E is not None:
                    return Lookup(rows_B1E, None, None, state, None)
        ids, alive, begins, there = _numpy(ids_BT), _numpy(live), _numpy(starts), _numpy(present)
        if there is not None and check_present(there, ids.shape).all():
            present = there = None
        row_ids_LBTC, order = row_ids_of(self.addresser, ids, state, alive, begins, there)
        alive = alive_in(self.vocab, ids, alive, there)
        if state is not None:
            state.extend(ids, alive, begins, there)
        row_ids = dict(zip(self.layers, row_ids_LBTC, strict=True))
        if trace is not None:
            trace.row_ids.update(row_ids)
        tickets = {
            layer: self.prefetcher.submit({layer: ids_BTC}) for layer, ids_BTC in row_ids.items()
        }
        if state is not None:
            for ticket in tickets.values():
                if ticket.state == "waiting":
                    state.watch(ticket, ids.shape[1])
        rows = {
            layer: partial(self._rows, layer, row_ids[layer], ticket, self._learns(layer))
            for layer, ticket in tickets.items()
        }
        return Lookup(Rows(rows), _tensor(alive), starts, state, trace, present, _tensor(order))

    def fuse(self, layer: int, x_BTSD: Tensor, lookup: Lookup) -> Tensor:
        """x plus what the memory of `layer` adds to it, for the chunk that `lookup` was made for.

        Args:
            layer: one of `layers`.
            x_BTSD: the hidden state before the block, [B, T, S, D]; with one stream also [B, T, D].
            lookup: as `lookup` gave it for these tokens.

        Returns:
            A tensor of the shape and dtype of x. x itself if the lookup is `off`.

        Raises:
            ConfigError: the layer has no memory.
        """
        if layer not in self.layers:
            raise ConfigError(f"layer {layer!r} has no memory; expected one of {list(self.layers)}")
        if lookup.off:
            return x_BTSD
        decoded = self._decode(layer, x_BTSD, lookup)
        if decoded is not None:
            return decoded
        if x_BTSD.ndim == 3:
            return self._add(layer, x_BTSD[:, :, None], lookup)[:, :, 0]
        return self._add(layer, x_BTSD, lookup)

    @overload
    def apply(self, layer: Callable[[nn.Module], None], /) -> EngramMemory: ...
    @overload
    def apply(self, layer: int, x_BTSD: Tensor, lookup: Lookup) -> Tensor: ...
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        layer: int | Callable[[nn.Module], None],
        x_BTSD: Tensor | None = None,
        lookup: Lookup | None = None,
    ) -> Any:
        """The old spelling of `fuse`.

        With one callable argument it is nn.Module.apply, which walks over the modules of any model
        that the memory belongs to. Raises InputError if x or lookup is missing.
        """
        if x_BTSD is None and callable(layer):
            return super().apply(layer)
        if x_BTSD is None or lookup is None or callable(layer):
            raise InputError("apply: expected layer, x and lookup (or one callable), found less")
        return self.fuse(layer, x_BTSD, lookup)

    def _decode(self, layer: int, x: Tensor, lookup: Lookup) -> Tensor | None:
        """One token of each sequence by one native call; None where that is not possible."""
        state, block = lookup.state, self.blocks[str(layer)]
        if (
            state is None
            or lookup.starts is not None
            or lookup.present is not None
            or x.ndim not in (3, 4)
            or x.shape[1] != 1
            or not x.is_cpu
        ):
            return None
        assert isinstance(block, EngramLayer)
        columns = state.columns(layer, x)
        if columns is None:
            return None
        gate_B1S = None
        if lookup.trace is not None:
            gate_B1S = torch.empty(
                len(x),
                1,
                block.spec.streams,
                dtype=torch.promote_types(x.dtype, torch.float32),
                device=x.device,
            )
        out = block.decode(x, lookup.rows[layer], lookup.live, columns, gate_B1S)
        if out is not None:
            state.advance(layer)
            if gate_B1S is not None:
                _trace(lookup, layer, gate_B1S)
        return out

    def _add(self, layer: int, x_BTSD: Tensor, lookup: Lookup) -> Tensor:
        block, state, device = self.blocks[str(layer)], lookup.state, x_BTSD.device
        window = None if state is None else state.window(layer)
        live, starts, order = (
            None if part is None else part.to(device)
            for part in (lookup.live, lookup.starts, lookup.order)
        )
        if starts is not None and lookup.present is not None:
            starts = starts & lookup.present.to(device)
        hidden_BTSD, rows_BTE = x_BTSD, lookup.rows[layer].to(device)
        if order is not None:
            hidden_BTSD, rows_BTE, live, starts = (
                None if part is None else reordered(part, order)
                for part in (x_BTSD, rows_BTE, live, starts)
            )
        update_BTSD, gate_BTS, inputs_BTSD = block(
            hidden_BTSD, rows_BTE, window, live, starts, conv_inputs=state is not None
        )
        if order is not None:
            order = order.argsort(1)  # back to where they stood
            update_BTSD, gate_BTS = reordered(update_BTSD, order), reordered(gate_BTS, order)
        if state is not None and inputs_BTSD is not None:
            if order is not None:
                inputs_BTSD = reordered(inputs_BTSD, order)
            state.push(layer, inputs_BTSD, lookup.starts, lookup.present)
        _trace(lookup, layer, gate_BTS)
        return x_BTSD + update_BTSD

    def init_rows(self, std: float, seed: int, chunk: int = 1 << 18) -> None:
        """Fill the table with N(0, std**2). Each value depends on (seed, layer, row, column) alone.

        chunk: rows at a time. Raises ConfigError for a std that is negative or not finite, or a
        seed outside uint64.
        """
        if not (math.isfinite(std) and std >= 0 and 0 <= seed < 2**64):
            raise ConfigError(
                f"init_rows: expected a finite std from 0 on and a seed of 64 bits, found {std}, {seed}"
            )
        self._check_open()
        for layer, store in self.stores.items():
            for start in range(0, store.info.rows, chunk):
                ids_N = np.arange(start, min(start + chunk, store.info.rows))
                store.scatter(
                    ids_N, self.format.encode(normal_rows(seed, layer, ids_N, self.config.dim, std))
                )
            follow(store).set([f"normal, std {std!r}, seed {seed}"])

    def drain_row_grads(self) -> list[RowGrad]:
        """Pending gradients, oldest first; the list is empty afterwards.

        Those of one layer are summed while they wait, once they are many more than their distinct
        rows (grads.py), so that accumulation over any number of batches takes bounded memory.
        """
        pending, self.row_grads = self.row_grads, []
        return pending

    def get_extra_state(self) -> Tensor:
        """Which rows the weights belong to (identity.py): `state_dict` has it as `_extra_state`, a
        uint8 tensor."""
        return identity.extra_state(self)

    def set_extra_state(self, state: Any) -> None:
        """For `load_state_dict`. Raises DigestMismatch for weights that belong to other rows than
        these."""
        identity.check_extra_state(self, state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        identity.warn_if_unnamed(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __deepcopy__(self, memo: Any) -> EngramMemory:
        raise ConfigError(
            "a memory is not copied with its model, nor by PEFT as one of modules_to_save: detach it "
            "first; memory.save and EngramMemory.load make another one"
        )

    def __getstate__(self) -> Any:
        raise ConfigError(
            "a memory is not pickled or copied: its rows lie in stores; save it with memory.save, or "
            "with its model by hf.save_pretrained"
        )

    def _learns(self, layer: int) -> bool:
        if not (self.training and torch.is_grad_enabled()):
            return False
        follow = any(parameter.requires_grad for parameter in self.blocks[str(layer)].parameters())
        return follow if self.rows_require_grad is None else self.rows_require_grad

    def _rows(self, layer: int, ids_BTC: np.ndarray, ticket: Ticket, learn: bool) -> Tensor:
        """Rows [B, T, E], when they are read. learn: they are a leaf whose gradient reaches
        `row_grads`."""
        leaf_BTE = ticket.wait()[layer]
        if not learn:
            return leaf_BTE

        def hand_over(leaf: Tensor) -> None:
            assert leaf.grad is not None
            grad_Nd = leaf.grad.detach().reshape(-1, self.config.dim).numpy()
            entry = RowGrad(layer, ids_BTC.reshape(-1), grad_Nd)
            value: Any = self.blocks[str(layer)].value
            self._waiting.join(self.row_grads, entry, value.weight, self.stores[layer].info.rows)
            leaf.grad = None

        leaf_BTE.requires_grad_().register_post_accumulate_grad_hook(hand_over)
        return leaf_BTE

    def write_table(self, path: str | os.PathLike[str], parent: str | None = None) -> str:
        """Copy the rows to a new sealed table at `path`, as they are. Returns its table_id."""
        self._check_open()
        table = Table.create(path, self.config, self.format, self.vocab, parent=parent)
        try:
            self.stores.copy_to(table)
            table_id = table.seal()
        finally:
            table.close()
        self.stores.add_name(table_id)
        return table_id

    def read_table(self, path: str | os.PathLike[str], table_id: str | None = None) -> None:
        """Copy the rows of a table on disk, of the same addresses and row format, into the
        (writable) stores.

        Raises DigestMismatch for other addresses or a table_id other than the one given,
        ConfigError for another format.
        """
        self._check_open()
        table = Table.open(path)
        try:
            if table_id is not None and table.table_id != table_id:
                raise DigestMismatch(f"{path}: expected table {table_id}, found {table.table_id}")
            table.check_address(self.address_digest)
            if table.fmt != self.format:
                raise ConfigError(
                    f"{path}: expected rows of format {self.format.kind}, found {table.fmt.kind}"
                )
            with StoreGroup.of_table(table, self.layers) as rows:
                rows.copy_to(self.stores)
        finally:
            table.close()

    def save(self, path: str | os.PathLike[str], table: str = "copy") -> None:
        """Write the memory to a new directory: config, vocabulary map, dense weights, and the
        table.

        table: "copy" the rows into `path`/table; "link" to the sealed table that the stores serve,
        or "skip" it (it has to be given again to `load`): both need a table on disk, whose table_id
        the dense weights keep. The directory appears complete or not at all. `path` may be a link
        to an empty directory, or an empty mount point. Raises ConfigError for what cannot be and
        for a `path` that is taken; WriteFailed if the system refuses, before anything is written
        where that can be known (no permission, too little free disk).
        """
        self._check_open()
        saved.save(self, path, table)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], store: str | os.PathLike[str] | None = None
    ) -> EngramMemory:
        """Read what `save` wrote. store: the URL, or the table's folder as a Path, to serve the
        rows from; default: the saved table. "ram:" copies the saved table into memory.

        Raises ConfigError for what is no memory, DigestMismatch where table and dense weights do
        not belong together.
        """
        return saved.load(cls, path, store)


def _trace(lookup: Lookup, layer: int, gate_BTS: Tensor) -> None:
    if lookup.trace is not None:
        lookup.trace.gates[layer] = gate_BTS.detach().float().cpu()


def _numpy(values: Tensor | None) -> Any:
    return None if values is None else values.numpy(force=True)


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)
