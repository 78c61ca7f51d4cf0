"""TokenReader: one native call looks up one token of each of a few sequences, for all layers.

A decoded token needs a few dozen rows. Reading these takes far less time than the separate steps of
a look-up in Python. Those steps are the specification of the call: SequenceState.history,
Addresser.all_rows, SequenceState.extend, rows.read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..addresses.addresser import Addresser
from ..errors import StoreError, TableError
from ..rows.read import addresses
from ..store.base import ReadingAll
from ..store.group import StoreGroup
from .prefetch import FEW_ROWS, Prefetcher
from .state import SequenceState


class TokenReader:
    """Rows of all layers for one token of each sequence.

    Safe for many threads, if they share no state. The prefetcher counts a call as one ticket; each
    store counts its own rows and the time of the whole call.
    """

    def __init__(
        self,
        addresser: Addresser,
        stores: StoreGroup,
        prefetcher: Prefetcher,
    ) -> None:
        self._addresser = addresser
        self._format = stores.format
        self._prefetcher = prefetcher
        self._stores = {layer: stores[layer] for layer in addresser.spec.layer_ids}
        # For the shards of the last call; keeps none of them alive.
        self._known: _Native | None = None

    def read(self, ids_B1: Tensor, state: SequenceState) -> dict[int, Tensor] | None:
        """Reads the rows of one token of each sequence, and extends `state` by the ids.

        Returns:
            layer -> f32 [B, 1, E]. None, without any change, if the caller has to take the separate
            steps: rows are not in memory now, an id has no token or is out of range, a document
            begins within the look-back, there are many sequences, or there is an error.
        """
        stores = self._stores
        batch = len(ids_B1)
        layers = len(stores)
        width = self._addresser.spec.columns
        count = batch * layers * width
        if not 0 < count <= FEW_ROWS:
            return None
        if ids_B1.dtype is not torch.int64 or not ids_B1.is_cpu or not ids_B1.is_contiguous():
            return None
        try:
            with ReadingAll(stores.values(), batch * width) as shards:
                native = self._reader_of(shards)
                columns = None if native is None else state.next_ids()
                if native is None or columns is None:
                    raise _StepByStep
                rows_LB1E = torch.empty(
                    layers, batch, 1, width * self._format.d, dtype=torch.float32, device="cpu"
                )
                if not native.reader.read(ids_B1.data_ptr(), batch, *columns, rows_LB1E.data_ptr()):
                    raise _StepByStep
            self._prefetcher.count_inline(count)
        except (_StepByStep, StoreError, TableError):
            return None  # if a store is closed or damaged, the separate steps raise the error
        state.advance_ids()
        return dict(zip(stores, rows_LB1E.unbind(), strict=True))

    def _reader_of(self, shards: list[Any]) -> _Native | None:
        """The native reader for these shards.

        None unless every store is in memory, or mapped with a system that reports which rows are.
        """
        if _native.core is None or not all(shards):
            return None
        # Lists here and below: for a few layers they are faster than generators.
        if not all([store.in_memory or store.tells_residency for store in self._stores.values()]):
            return None
        known = self._known
        if known is None or not known.reads(shards):
            known = self._known = self._new_reader(_native.core, shards)
        return known

    def _new_reader(self, core: Any, shards: list[Any]) -> _Native:
        stores = self._stores.values()
        fmt = self._format
        places = [addresses(shard, store.info) for shard, store in zip(shards, stores, strict=True)]
        reader = core.TokenReader(
            self._addresser.plan,
            fmt.kind,
            fmt.d,
            fmt.scale or 1.0,
            fmt.row_bytes,
            [place.address for place in places],
            [place.shard_rows for place in places],
            [place.rows for place in places],
            [not store.in_memory for store in stores],
        )
        return _Native(reader, places)


class _StepByStep(Exception):
    """Raised to leave the scope of a read that one native call cannot do."""


class _Native(NamedTuple):
    """A native reader, and the addresses of the shards of each layer that it was made for."""

    reader: Any
    places: list[Any]

    def reads(self, shards: list[Any]) -> bool:
        """Whether it was made for these shards."""
        pairs = zip(self.places, shards, strict=True)
        return all([place.first() is shard[0] for place, shard in pairs])
