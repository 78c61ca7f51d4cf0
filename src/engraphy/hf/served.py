"""The rows of a served table, read while the blocks before their own compute.

A Qwen4-Exp block hashes its tokens to row ids and looks these up in one module, for which
ServedRows stands in. The tokens and their past are known before the first block, so the rows of all
layers are submitted there. A block then waits for the rows of its layer.

The block's request decides. It gets the rows that were read ahead only if it asks for exactly their
ids, and reads its own otherwise. So a call that goes another way (recomputed activations, a block
that is called by itself) is slower, and never wrong.

What was submitted belongs to one call of the decoder. It is kept in a context variable, which other
threads and tasks do not see, until the call returns or raises.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..addresses.addresser import Addresser
from ..addresses.vocab import VocabMap
from ..errors import InputError
from ..memory.prefetch import Prefetcher, PrefetchStats, Ticket
from ..rows.read import read
from ..spec.hash import HashSpec
from ..store.group import StoreGroup
from .versions import cache_argument

_uncompiled: Any = torch.compiler.disable  # its own type hides what it decorates
_PAST_IDS = 2  # which conv state of a cached layer holds the last token ids


class ServedTable:
    """The stores of a model's table, and the hooks of its decoder that read ahead.

    Attributes:
        stores: the stores of all layers.
    """

    def __init__(self, stores: StoreGroup, spec: HashSpec) -> None:
        """Args:
        stores: the stores of all layers.
        spec: the model's hash.
        """
        self.stores = stores
        self._addresser = Addresser(spec, VocabMap.identity(spec.vocab_size))
        self._prefetcher = Prefetcher(stores)
        self._served: dict[int, ServedRows] = {}
        self._handles: list[Any] = []

    def install(self, decoder: nn.Module, served: dict[int, ServedRows]) -> None:
        """Registers the hooks.

        Args:
            decoder: embeddings and blocks, in `layers`.
            served: the module of each layer that reads from this table.
        """
        torch.compiler.reset()  # a compiled model does not notice hooks that come or go
        self._served = served
        first: Any = decoder.layers[0]  # pyright: ignore[reportIndexIssue]
        self._handles = [
            decoder.register_forward_pre_hook(self._begin),
            first.register_forward_pre_hook(self._submit, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        """Removes the hooks, and closes the stores that were opened for the table."""
        for handle in self._handles:
            handle.remove()
        torch.compiler.reset()
        self._prefetcher.close()
        self.stores.close()

    @property
    def ahead(self) -> PrefetchStats:
        """Counters of the rows that were read ahead."""
        return self._prefetcher.stats

    def read(self, layer: int, ids: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The rows of these ids.

        Args:
            layer: one of the table's layers.
            ids: row ids int64, of any shape.
            dtype: bfloat16, or float32 for any other.

        Returns:
            [*ids.shape, d], on the CPU unless they were read ahead to another device.
        """
        call = _CALL.get()
        ahead = None
        if call is not None and call.table is self:
            ahead = call.take(layer, ids)
        if ahead is not None:
            return ahead.view(*ids.shape, self.stores.format.d)
        return self._read_now(layer, ids, dtype)

    def _read_now(self, layer: int, ids: np.ndarray, dtype: torch.dtype) -> Tensor:
        shape = (*ids.shape, self.stores.format.d)
        if dtype == torch.bfloat16:
            out = torch.empty(shape, dtype=torch.bfloat16)
            values = out.view(torch.uint16).numpy()  # numpy has no bf16: its bits
        else:
            out = torch.empty(shape, dtype=torch.float32)
            values = out.numpy()
        read(self.stores[layer], ids, self.stores.format, values)
        return out

    @_uncompiled
    def _begin(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of the decoder."""
        outer = _CALL.get()
        if outer is not None and outer.table is self:
            outer = outer.outer  # it was left behind: a decoder does not run within itself
        _CALL.set(_Call(self, outer))

    @_uncompiled
    def _submit(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the first block: the ids are now those that every block will hash."""
        call = _CALL.get()
        ids_BT = kwargs.get("ple_input_ids")
        if call is None or call.table is not self or not isinstance(ids_BT, Tensor):
            return
        name = cache_argument(kwargs)
        cache = None if name is None else kwargs[name]
        try:
            row_ids_LBTC = self._addresser.all_rows(ids_BT.cpu().numpy(), self._past(cache))
        except InputError:
            return  # an id beyond the vocabulary: the model has to say what it does with it
        for layer, ids_BTC in zip(self.stores, row_ids_LBTC, strict=True):
            device = self._served[layer].device
            ticket = self._prefetcher.submit({layer: ids_BTC}, device=device)
            call.submitted[layer] = _Submitted(ids_BTC, ticket)

    def _past(self, cache: Any) -> np.ndarray | None:
        """The ids before the chunk, int64 [B, N-1], from the cache; None if there are none."""
        layer = next(iter(self.stores))
        if cache is None or not cache.has_previous_state(layer, state_idx=_PAST_IDS):
            return None
        ids = cache.layers[layer].conv_states[_PAST_IDS]
        return ids[:, -(self._addresser.spec.order - 1) :].cpu().numpy()

    @_uncompiled
    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the decoder; also runs if its forward has raised."""
        call = _CALL.get()
        if call is not None and call.table is self:
            _CALL.set(call.outer)
            call.drop()


class _Submitted(NamedTuple):
    """Rows that are read ahead."""

    ids_BTC: np.ndarray
    ticket: Ticket


class _Call:
    """One call of a decoder.

    Attributes:
        table: the table of this decoder.
        outer: the call of another decoder within which this one runs, or None.
        submitted: by layer, what was read ahead and not asked for yet.
    """

    def __init__(self, table: ServedTable, outer: _Call | None) -> None:
        self.table = table
        self.outer = outer
        self.submitted: dict[int, _Submitted] = {}

    def take(self, layer: int, ids: np.ndarray) -> Tensor | None:
        """Waits for the rows that were read ahead; None if they are not those of `ids`."""
        submitted = self.submitted.pop(layer, None)
        if submitted is None:
            return None
        if not np.array_equal(submitted.ids_BTC, ids):
            submitted.ticket.cancel()
            return None
        return submitted.ticket.wait()[layer]

    def drop(self) -> None:
        """Cancels what nobody has asked for."""
        for submitted in self.submitted.values():
            submitted.ticket.cancel()
        self.submitted = {}


_CALL: ContextVar[_Call | None] = ContextVar("engraphy_served_call", default=None)


class ServedRows(nn.Module):
    """In the place of the table's nn.Embedding: int64 ids [...] -> rows [..., d].

    Rows have the model's dtype, and are on the device of the ids. They are constants and do not
    learn: the module has no parameters, and nothing in state_dict.
    """

    like: Tensor

    def __init__(self, table: ServedTable, layer: int, like: Tensor, replaced: nn.Module) -> None:
        """Args:
        table: where rows are read.
        layer: the module's layer.
        like: a tensor of the model's dtype and device.
        replaced: the module that stood here.
        """
        super().__init__()
        self.table = table
        self.layer = layer
        self.store = table.stores[layer]
        self._replaced = (replaced,)  # a module set as an attribute would be in state_dict
        # Holds no value: model.to() gives it the model's dtype and device.
        self.register_buffer("like", like.detach().new_empty(0), persistent=False)

    @property
    def replaced(self) -> nn.Module:
        """The module that stood here."""
        return self._replaced[0]

    @property
    def device(self) -> torch.device:
        """Where the model's layer computes; the CPU if its weights are offloaded."""
        device = self.like.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def weight(self) -> Tensor:
        """The table's shape and dtype on the meta device.

        The model looks here for the device to send row ids to.
        """
        shape = (self.store.info.rows, self.table.stores.format.d)
        return torch.empty(shape, dtype=self.like.dtype, device="meta")

    @torch.compiler.disable
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, ids: Tensor
    ) -> Tensor:
        """The rows, read ahead or now.

        Raises RowOutOfRange for an id beyond the table, StoreError once the store is closed.
        """
        dtype = self.like.dtype
        return self.table.read(self.layer, ids.cpu().numpy(), dtype).to(ids.device, dtype)
