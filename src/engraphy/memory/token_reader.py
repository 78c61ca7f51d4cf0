"""TokenReader: the look-up of one token of each of a few sequences, of all layers, by one native
call.

What a decoded token asks for is a few dozen rows; the steps of a look-up, one by one, take far
longer than reading them. They are its specification: SequenceState.history, Addresser.all_rows,
SequenceState.extend, rows.read.
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
    """Rows of all layers for one token of each sequence. stores: of the addresser's layers.
    prefetcher: counts what is read here as one ticket; each store counts its rows, and the time of
    the whole call.

    Safe for many threads, of which each has states of its own.
    """

    def __init__(
        self,
        addresser: Addresser,
        stores: StoreGroup,
        prefetcher: Prefetcher,
    ) -> None:
        self._addresser, self._format, self._prefetcher = addresser, stores.format, prefetcher
        self._stores = {layer: stores[layer] for layer in addresser.spec.layer_ids}
        self._known: _Native | None = (
            None  # of the shards that the stores had last; keeps none of them alive
        )

    def read(self, ids_B1: Tensor, state: SequenceState) -> dict[int, Tensor] | None:
        """Rows by layer, f32 [B, 1, E]; `state` is extended by the ids.

        None, and nothing is changed, where it takes the steps one by one: rows that are not in
        memory now, ids without a token or out of range, a document's beginning within the
        look-back, many sequences, something that is wrong.
        """
        stores = self._stores
        batch, layers, width = len(ids_B1), len(stores), self._addresser.spec.columns
        count = batch * layers * width
        if not (
            0 < count <= FEW_ROWS
            and ids_B1.dtype is torch.int64
            and ids_B1.is_cpu
            and ids_B1.is_contiguous()
        ):
            return None
        try:
            with ReadingAll(stores.values(), batch * width) as shards:
                native = self._reader_of(shards)
                if native is None or (columns := state.next_ids()) is None:
                    raise _StepByStep
                rows_LB1E = torch.empty(
                    layers, batch, 1, width * self._format.d, dtype=torch.float32, device="cpu"
                )
                if not native.reader.read(ids_B1.data_ptr(), batch, *columns, rows_LB1E.data_ptr()):
                    raise _StepByStep
            self._prefetcher.count_inline(count)
        except (
            _StepByStep,
            StoreError,
            TableError,
        ):  # closed or damaged: the steps say it where it is expected
            return None
        state.advance_ids()
        return dict(zip(stores, rows_LB1E.unbind(), strict=True))

    def _reader_of(self, shards: list[Any]) -> _Native | None:
        """The native reader of rows that are in memory, or mapped and the system tells whether they
        are; None for others."""
        stores, fmt, known = self._stores.values(), self._format, self._known
        if (
            _native.core is None
            or not all(shards)
            or not all([each.in_memory or each.tells_residency for each in stores])
        ):
            return None
        if known is None or not all(
            [at.first() is shard[0] for at, shard in zip(known.at, shards, strict=True)]
        ):
            at = [addresses(shard, store.info) for shard, store in zip(shards, stores, strict=True)]
            reader = _native.core.TokenReader(
                self._addresser.plan,
                fmt.kind,
                fmt.d,
                fmt.scale or 1.0,
                fmt.row_bytes,
                [each.address for each in at],
                [each.shard_rows for each in at],
                [each.rows for each in at],
                [not store.in_memory for store in stores],
            )
            self._known = known = _Native(reader, at)
        return known


class _StepByStep(Exception):
    """Leaves the scope of a read without one."""


class _Native(NamedTuple):
    """The native reader, and what it has addresses of."""

    reader: Any
    at: list[Any]
