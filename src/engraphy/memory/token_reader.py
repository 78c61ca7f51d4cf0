"""TokenReader: one native call looks up one token of each of a few sequences, for all layers.

A decoded token needs a few dozen rows. Reading these takes far less time than the separate steps of
a look-up in Python. Those steps are the specification of the call: SequenceState.history,
Addresser.all_rows, SequenceState.extend, rows.read.

Between two tokens of a model its weights drive all else out of the caches. What then counts is how
much is touched, not how long it takes in a loop: so this path makes no tensor, no array and no
context manager, and takes no lock.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .. import _native
from ..addresses.addresser import Addresser
from ..errors import StoreError, TableError
from ..fusion.tensors import introduce_tensors
from ..rows.read import addresses
from ..store.base import ReadingAll
from ..store.group import StoreGroup
from ..store.mapped import MappedStore
from ..store.mapping import ends_of
from .lookup import TokenLookup
from .prefetch import FEW_ROWS, Prefetcher
from .state import SequenceState

if TYPE_CHECKING:
    from .._native._core import Cursor
    from .._native._core import TokenReader as NativeReader


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
        self._layers = addresser.spec.layer_ids
        self._stores = [stores[layer] for layer in addresser.spec.layer_ids]
        self._layer_rows = addresser.spec.columns
        self._most = FEW_ROWS // (len(self._stores) * self._layer_rows)  # sequences
        # For the shards of the last call; keeps none of them alive.
        self._known: _Native | None = None

    def read(self, ids_B1: Tensor, state: SequenceState) -> TokenLookup | None:
        """Reads the rows of one token of each sequence, and extends `state` by the ids.

        Returns:
            The rows of all layers. None, without any change, if the caller has to take the separate
            steps: rows are not in memory now, an id has no token or is out of range, a document
            begins within the look-back, there are many sequences, or there is an error.
        """
        if not 0 < state.batch <= self._most or self._prefetcher.closed:
            return None
        cursor = state.cursor()
        if cursor is None:
            return None
        try:
            values = self._read_pinned(ids_B1, cursor)
            if values is None:
                values = self._read_scoped(ids_B1, cursor)
        except (StoreError, TableError):
            return None  # if a store is closed or damaged, the separate steps raise the error
        if values is None:
            return None
        self._prefetcher.count_inline(state.batch * self._layer_rows * len(self._stores))
        return TokenLookup(self._layers, values, state, cursor)

    def _read_pinned(self, ids_B1: Tensor, cursor: Cursor) -> bytearray | None:
        """Rows from the shards of the last call. None if they are others now.

        The native call checks the files that it has read from. If it is not sure, the stores check
        all of theirs, before anything is handed out.
        """
        native = self._known
        if native is None:
            return None
        begun = time.perf_counter_ns()
        values = native.reader.read_pinned(ids_B1, cursor)
        if values is not None:
            taken = time.perf_counter_ns() - begun
            rows = cursor.batch * self._layer_rows
            for store in native.stores:
                store.count_token(rows, taken)
        return values

    def _read_scoped(self, ids_B1: Tensor, cursor: Cursor) -> bytearray | None:
        """Rows in the scopes of the stores, whatever they are. Leaving them checks all files."""
        try:
            with ReadingAll(self._stores, cursor.batch * self._layer_rows) as shards:
                native = self._reader_of(shards)
                values = None if native is None else native.reader.read_scoped(ids_B1, cursor)
                if native is None or values is None:
                    raise _StepByStep
                damages = _native.compiled().damage_count()
        except _StepByStep:
            return None
        native.reader.trust(damages)
        cursor.advance()
        return values

    def _reader_of(self, shards: list[Any]) -> _Native | None:
        """The native reader for these shards.

        None unless every store is in memory, or mapped with a system that reports which rows are.
        """
        if _native.core is None or not all(shards):
            return None
        # Lists here and below: for a few layers they are faster than generators.
        if not all([store.in_memory or store.tells_residency for store in self._stores]):
            return None
        known = self._known
        if known is None or not known.reads(shards):
            known = self._known = self._new_reader(_native.core, shards)
        return known

    def _new_reader(self, core: Any, shards: list[Any]) -> _Native:
        stores = self._stores
        fmt = self._format
        places = [addresses(shard, store.info) for shard, store in zip(shards, stores, strict=True)]
        # Shards of plain stores alone: the scopes of others do more, and check all of their files.
        plain = [store for store in stores if isinstance(store, MappedStore) and store.is_plain]
        is_plain = len(plain) == len(stores)
        introduce_tensors()
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
            [ends_of(shard) if is_plain else [] for shard in shards],
            [(store, place.first) for store, place in zip(stores, places, strict=True)]
            if is_plain
            else [],
        )
        return _Native(reader, places, plain if is_plain else [])


class _StepByStep(Exception):
    """Raised to leave the scope of a read that one native call cannot do."""


class _Native(NamedTuple):
    """A native reader, and the shards of each layer that it was made for.

    Attributes:
        reader: The native reader.
        places: Of the shards; they keep none of them alive.
        stores: The store of each layer if all are plain, else none.
    """

    reader: NativeReader
    places: list[Any]
    stores: list[MappedStore]

    def reads(self, shards: list[Any]) -> bool:
        """Whether it was made for these shards."""
        pairs = zip(self.places, shards, strict=True)
        return all([place.first() is shard[0] for place, shard in pairs])
