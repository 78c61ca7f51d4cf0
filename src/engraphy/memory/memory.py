"""EngramMemory: addresses, stores, and one fusion layer per memory layer, joined for a model.

The table is not a Parameter. The rows of each batch become a new leaf tensor. After backward, the
gradient of the leaf goes to `row_grads`, which a row optimiser drains. The state of a request (last
ids, conv window) is a SequenceState, which the caller keeps; a forward without one has no past.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, overload

import numpy as np
from torch import Tensor, is_grad_enabled, nn

from ..addresses.addresser import Addresser
from ..addresses.hot import HotIndex
from ..addresses.ngrams import Ngrams
from ..addresses.vocab import VocabMap
from ..errors import ConfigError, InputError, StoreError
from ..fusion.layer import EngramLayer
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..store.base import RowStore
from ..store.group import StoreGroup
from ..table.table import Table
from . import identity, saved, switch, tables
from .batch_reader import BatchReader
from .fusing import fuse_chunk, fuse_next, fuse_token
from .grads import RowGrad, Waiting
from .hot import index_of, naming
from .lookup import Lookup, TokenLookup, Trace, check_chunk, lookup_chunk, lookup_nothing
from .prefetch import Prefetcher
from .state import SequenceState
from .token_reader import TokenReader
from .tracing import refuse_tracing, uncompiled

__all__ = ["EngramMemory", "Lookup", "RowGrad", "Trace"]


class _Place(NamedTuple):
    """A layer's number among the memory's layers, and the name of its fusion layer in `blocks`."""

    number: int
    name: str


class EngramMemory(nn.Module):
    """A memory for a model: `lookup` before the blocks run, `fuse` in each block that has a memory.

    `close`, or the end of `with memory:`, closes the stores that were opened for the memory.

    Attributes:
        config: the sizes of the memory.
        vocab: the vocabulary map.
        addresser: token ids -> row ids.
        address_digest: what the rows' addresses depend on; tables carry it.
        stores: the stores of all layers, by layer.
        format: the format of the rows.
        prefetcher: reads rows ahead.
        batches: reads the rows of a chunk of tokens.
        blocks: the fusion layers, by layer.
        row_grads: gradients of rows that no optimiser has drained yet.
        rows_require_grad: None = rows learn if any parameter of their layer does, so
            `requires_grad_` on the memory, or on a model around it, applies to them too. True or
            False = rows learn or do not, regardless of the parameters.
        follows_adapters: whether PEFT's `disable_adapter` disables an attached memory, too.
    """

    def __init__(
        self,
        config: EngramConfig,
        vocab: VocabMap,
        store: str | os.PathLike[str] | Table | Mapping[int, RowStore] = "ram:",
        row_format: RowFormat | str | None = None,
        *,
        hot: HotIndex | None = None,
    ):
        """Opens the stores and makes fresh fusion layers.

        Args:
            config: the sizes of the memory.
            vocab: the vocabulary map of the model's tokenizer.
            store: "ram:" for a new table of `row_format`, all zeros until `init_rows`; the URL of
                a table ("file:DIR"), whose format is read from it, or its folder as a Path; an
                open Table (mode "w" to train it in place); or {layer: RowStore}. A Table or stores
                that are passed in stay open when the memory is closed.
            row_format: needed if the stores do not know it.
            hot: the index of n-grams that get rows of their own; the config then names it. None =
                the index that the config names already, from the table's folder, if any.

        Raises:
            ConfigError: sizes, layers or formats differ, or the index is not known.
            DigestMismatch: the table was made for other addresses, or the config names another
                index.
            TableError: the table's index is missing or damaged.
        """
        super().__init__()
        config = naming(config, hot)
        self.config = config
        self.vocab = vocab
        self.address_digest = config.address_digest(vocab.digest)
        self.stores = StoreGroup.open(config, store, row_format, address_digest=self.address_digest)
        try:
            index = index_of(config, vocab, self.stores.info) if hot is None else hot
            self.addresser = Addresser(config.hash, vocab, index)
        except BaseException:
            self.stores.close()
            raise
        self.format = self.stores.format
        self._closed = False
        self.prefetcher = Prefetcher(self.stores)
        self._tokens = TokenReader(self.addresser, self.stores, self.prefetcher)
        self.batches = BatchReader(self.addresser, self.stores)
        self.blocks = nn.ModuleDict(
            {str(layer): EngramLayer(config.layer) for layer in self.layers}
        )
        self._places = {layer: _Place(i, str(layer)) for i, layer in enumerate(self.layers)}
        self._order = config.hash.order
        self._windows = dict.fromkeys(self.layers, config.layer.window)
        self.row_grads: list[RowGrad] = []
        self._waiting = Waiting()
        self.rows_require_grad: bool | None = None
        self.follows_adapters = True
        self._made_for: dict[str, Any] | None = None
        self._identify_model: Callable[[], dict[str, Any]] | None = None
        logging.getLogger("engraphy").info("serving %s", self.stores.describe())

    @property
    def made_for(self) -> dict[str, Any] | None:
        """The identity of the model that the memory is or was attached to; None = not known.

        It is saved with the memory, and compared when the memory is attached again.
        """
        return self._made_for if self._identify_model is None else self._identify_model()

    @made_for.setter
    def made_for(self, value: dict[str, Any] | None) -> None:
        self._made_for = value
        self._identify_model = None

    def follow_model(self, identify: Callable[[], dict[str, Any]]) -> None:
        """Makes `made_for` call `identify` at each access, until `made_for` is set.

        For a host that attaches the memory: the model's vocabulary may be resized later.
        """
        self._identify_model = identify

    @property
    def hot(self) -> HotIndex | None:
        """The index of n-grams that have rows of their own; None = all are hashed."""
        return self.addresser.hot

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

        This applies to this thread or task alone, and to forwards that begin inside the `with`:
        `lookup` returns a Lookup that is `off`, for which `fuse` returns x. No state sees the
        tokens of such forwards. So `lookup` with a state raises InputError. An attached model whose
        cache has seen such tokens raises it too, once the memory is enabled again. Compiled blocks
        stay compiled.
        """
        return switch.disabled(self)

    def widen(self, raw_size: int) -> None:
        """Accepts token ids below `raw_size`: those beyond the vocabulary map are dead.

        No address changes. For a model whose vocabulary has grown; the host of an attached memory
        calls it.
        """
        if raw_size > self.vocab.raw_size:
            self.vocab = self.vocab.widened(raw_size)
            self.addresser = Addresser(self.config.hash, self.vocab, self.hot)
            self._tokens = TokenReader(self.addresser, self.stores, self.prefetcher)
            self.batches = BatchReader(self.addresser, self.stores)

    def close(self) -> None:
        """Waits for reads under way, and closes the stores that were opened for this memory.

        Rows that were looked up stay valid. May be called again. Any other use raises StoreError
        afterwards. So does a model that the memory is still attached to: detach it first.
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
        return self.bind(SequenceState(batch, margin))

    def bind(self, state: SequenceState) -> SequenceState:
        """Gives a new state the sizes of this memory; returns the state.

        Raises ConfigError if the state belongs to a memory of other sizes.
        """
        return state.bind(self._order, self._windows)

    @uncompiled
    def lookup(
        self,
        ids_BT: Tensor,
        state: SequenceState | None = None,
        live: Tensor | None = None,
        starts: Tensor | None = None,
        trace: Trace | None = None,
        *,
        present: Tensor | None = None,
        history: np.ndarray | None = None,
    ) -> Lookup:
        """Starts to read the rows of every layer.

        Rows in memory are read now, by one native call for all layers. Others are read in the order
        of the layers, while the caller goes on (see prefetch.py). Until the caller has taken the
        rows of a layer, nothing may write to its store.

        Args:
            ids_BT: raw token ids, int [B, T], that follow `state`.
            state: the past of the sequences, which is extended by the ids. None = no past.
            live: bool [B, T] as in `Addresser.all_rows`: False = takes part in no n-gram.
            starts: bool [B, T] as in `Addresser.all_rows`: True = a document begins here.
            trace: filled with row ids now, and with gates by `fuse`.
            present: bool [B, T], False = the sequence has no token here (a hole in a mask). Later
                tokens are looked up and fused as if the position did not exist; at the position
                itself nothing is added.
            history: raw ids before the chunk, int [B, N-1] as in `Addresser.all_rows`, for a caller
                that keeps the past of its sequences itself. None = that of the state.

        Returns:
            The Lookup. Its rows are f32, or bf16 if the layer's dense weights are and the rows do
            not learn, on the device of these weights. (Those of one token of each sequence may be
            f32 and on the CPU: `fuse` converts them.) With gradients enabled, in training mode and
            if `rows_require_grad` allows it, they are leaves whose gradients go to `row_grads`.
            `rows[layer]` waits for the rows of a layer, and raises the error if reading failed.

        Raises:
            InputError: ids, shapes or the state do not fit, history and state are both given, or
                the call is traced, exported or captured (tracing.py). The state is then
                unchanged.
            StoreError: the memory is closed.
        """
        if switch.is_disabled(self):
            return self._lookup_nothing(state, trace)
        refuse_tracing(ids_BT)
        return self._lookup(ids_BT, state, live, starts, trace, present, history)

    def lookup_eagerly(
        self,
        ids_BT: Tensor,
        state: SequenceState | None = None,
        live: Tensor | None = None,
        starts: Tensor | None = None,
        trace: Trace | None = None,
        *,
        present: Tensor | None = None,
    ) -> Lookup:
        """`lookup` for a host that has refused to be traced, and is not compiled itself."""
        if switch.is_disabled(self):
            return self._lookup_nothing(state, trace)
        return self._lookup(ids_BT, state, live, starts, trace, present)

    def _lookup(
        self,
        ids_BT: Tensor,
        state: SequenceState | None,
        live: Tensor | None,
        starts: Tensor | None,
        trace: Trace | None,
        present: Tensor | None,
        history: np.ndarray | None = None,
    ) -> Lookup:
        plain = live is None and starts is None and trace is None and present is None
        plain = plain and type(ids_BT) is Tensor and ids_BT.shape[1:] == (1,)
        if plain and state is not None and not is_grad_enabled():
            # Refuses whatever the steps below refuse.
            found = self._tokens.read(ids_BT, state.bind(self._order, self._windows))
            if found is not None:
                return found
        self._check_open()
        check_chunk(self, ids_BT, state)
        if history is not None and state is not None:
            raise InputError("lookup: expected a history or a state, found both")
        return lookup_chunk(self, ids_BT, state, live, starts, trace, present, history)

    def _lookup_nothing(self, state: SequenceState | None, trace: Trace | None) -> Lookup:
        self._check_open()
        return lookup_nothing(state, trace)

    def add_row_grad(self, entry: RowGrad) -> None:
        """Appends a gradient to `row_grads`, and warns if nothing drains them (grads.py)."""
        value: Any = self.blocks[str(entry.layer)].value
        table_rows = self.stores[entry.layer].info.rows
        self._waiting.join(self.row_grads, entry, value.weight, table_rows)

    def fuse(self, layer: int, x_BTSD: Tensor, lookup: Lookup) -> Tensor:
        """x plus what the memory of `layer` adds to it, for the chunk that `lookup` was made for.

        Args:
            layer: one of `layers`.
            x_BTSD: the hidden state before the block, [B, T, S, D]; with one stream also [B, T, D].
            lookup: what `lookup` returned for these tokens.

        Returns:
            A tensor of the shape of x. x itself if the lookup is `off`.

        Raises:
            ConfigError: the layer has no memory.
        """
        place = self._places.get(layer)
        if place is None:
            raise ConfigError(f"layer {layer!r} has no memory; expected one of {list(self.layers)}")
        if lookup.off:
            return x_BTSD
        # Not `self.blocks[name]`, which takes longer than all else here.
        blocks: Any = self._modules["blocks"]
        block: nn.Module = blocks._modules[place.name]
        if type(lookup) is TokenLookup:
            out = fuse_next(block, place.number, x_BTSD, lookup)
            if out is not None:
                return out
        out = fuse_token(block, layer, x_BTSD, lookup)
        if out is not None:
            return out
        if x_BTSD.ndim == 3:
            return fuse_chunk(block, layer, x_BTSD[:, :, None], lookup)[:, :, 0]
        return fuse_chunk(block, layer, x_BTSD, lookup)

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
        """The old name of `fuse`.

        With one callable argument it is nn.Module.apply, so that `apply` still works on a model
        that has the memory as a module. Raises InputError if x or lookup is missing.
        """
        if x_BTSD is None and callable(layer):
            return super().apply(layer)
        if x_BTSD is None or lookup is None or callable(layer):
            raise InputError("apply: expected layer, x and lookup (or one callable), found less")
        return self.fuse(layer, x_BTSD, lookup)

    def init_rows(self, std: float, seed: int, chunk: int = 1 << 18) -> None:
        """Fills the table with N(0, std**2). A value depends on (seed, layer, row, column) alone.

        Args:
            std: standard deviation.
            seed: a uint64.
            chunk: rows that are made at a time.

        Raises:
            ConfigError: std is negative or not finite, or the seed is no uint64.
            StoreError: a store cannot be written.
        """
        self._check_open()
        tables.init_rows(self, std, seed, chunk)

    def drain_row_grads(self) -> list[RowGrad]:
        """Pending gradients, oldest first; the list is empty afterwards.

        While the gradients of a layer wait, they are summed as soon as they are many more than the
        distinct rows (grads.py). So accumulation over any number of batches takes bounded memory.
        """
        pending = self.row_grads
        self.row_grads = []
        return pending

    def write_table(self, path: str | os.PathLike[str], parent: str | None = None) -> str:
        """Copies the rows to a new sealed table.

        Args:
            path: the folder of the table.
            parent: the table_id that the new table names as its parent; None = no parent.

        Returns:
            The table_id.

        Raises:
            TableError: `path` is taken.
            WriteFailed: the system refuses.
        """
        self._check_open()
        return tables.write_table(self, path, parent)

    def extended(self, ngrams: Ngrams, path: str | os.PathLike[str]) -> EngramMemory:
        """A memory in which these n-grams have rows of their own, over a new table.

        It computes what this one computes: the new rows are copies of those that their n-grams read
        here, and the dense weights are the same. Nothing of this memory changes.

        Args:
            ngrams: those that get rows; n-grams that have some are passed over.
            path: the folder of the new table, whose parent is this memory's table.

        Returns:
            The memory, not attached to a model. Its rows are served from the sealed table.

        Raises:
            TableError: `path` is taken.
            ConfigError: the memory's index keeps fingerprints, an order is not hashed, or there is
                no n-gram.
            DigestMismatch: the n-grams have ids of another vocabulary map.
            WriteFailed: the system refuses.
        """
        self._check_open()
        return tables.extended(self, ngrams, path)

    def read_table(self, path: str | os.PathLike[str], table_id: str | None = None) -> None:
        """Copies the rows of a table into the stores, which must be writable.

        Args:
            path: the folder of the table.
            table_id: the expected table_id; None = any.

        Raises:
            DigestMismatch: the table has other addresses or another table_id.
            ConfigError: the table has another row format.
        """
        self._check_open()
        tables.read_table(self, path, table_id)

    def save(self, path: str | os.PathLike[str], table: str = "copy") -> None:
        """Writes the memory to a new folder: config, vocabulary map, dense weights, and the table.

        The folder appears complete or not at all.

        Args:
            path: new or empty; it may be a link to an empty folder, or an empty mount point.
            table: "copy" copies the rows into `path`/table; "link" notes the path of the sealed
                table that the stores serve; "skip" notes nothing (`load` then needs `store`).
                "link" and "skip" need a table on disk; the dense weights keep its table_id.

        Raises:
            ConfigError: `path` is taken, or the table cannot be linked or skipped.
            WriteFailed: the system refuses. Missing permission and too little free disk are found
                before anything is written.
        """
        self._check_open()
        saved.save(self, path, table)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], store: str | os.PathLike[str] | None = None
    ) -> EngramMemory:
        """Reads what `save` wrote.

        Args:
            path: the folder.
            store: the URL, or the table's folder as a Path, to serve the rows from. None = the
                saved table; "ram:" copies the saved table into memory.

        Raises:
            ConfigError: there is no saved memory, or `store` is needed.
            DigestMismatch: table and dense weights do not belong together.
        """
        return saved.load(cls, path, store)

    def extra_repr(self) -> str:
        """Sizes and identities, for `repr`. Reads no row."""
        return identity.summary(self)

    def get_extra_state(self) -> Tensor:
        """Which rows the weights belong to (identity.py), a uint8 tensor.

        `state_dict` has it as `_extra_state`.
        """
        return identity.extra_state(self)

    def set_extra_state(self, state: Any) -> None:
        """For `load_state_dict`. Raises DigestMismatch if the weights belong to other rows."""
        identity.check_extra_state(self, state)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        identity.warn_if_unnamed(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> EngramMemory:
        raise ConfigError(
            "a memory is not copied with its model, nor by PEFT as one of modules_to_save: detach "
            "it first; memory.save and EngramMemory.load make another one"
        )

    def __getstate__(self) -> Any:
        raise ConfigError(
            "a memory is not pickled or copied: its rows lie in stores; save it with memory.save, "
            "or with its model by hf.save_pretrained"
        )
