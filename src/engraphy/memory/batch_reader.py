"""BatchReader: the rows of a chunk of tokens, by one native call for all layers.

Addresses and rows are made a tile of tokens at a time, so row ids are written to memory only if
they are wanted. The separate steps are the specification of the call, and do whatever it cannot do:
Addresser.all_rows, rows.read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _native
from ..addresses.addresser import Addresser, Chunk
from ..rows.read import Addresses, addresses, read
from ..store.base import ReadingAll
from ..store.group import StoreGroup
from .ticket import TakeBuffer

if TYPE_CHECKING:
    from .._native._core import BatchReader as NativeReader


class Batch(NamedTuple):
    """The rows of a chunk in some layers, and the arrays that get them.

    Attributes:
        chunk: Made by the addresser.
        layers: Layers that follow each other in the memory.
        outs_BTE: An array a layer: float32, or uint16 for bf16 bits; all of one dtype.
        row_ids_LBTC: int64, gets the row ids; None = they are not wanted.
        resident: True: the rows are read only if all of them are in memory now.
    """

    chunk: Chunk
    layers: tuple[int, ...]
    outs_BTE: Sequence[np.ndarray]
    row_ids_LBTC: np.ndarray | None
    resident: bool = False


class BatchReader:
    """Rows of chunks of tokens. Safe for many threads."""

    def __init__(self, addresser: Addresser, stores: StoreGroup) -> None:
        self._addresser = addresser
        self._format = stores.format
        self._stores = {layer: stores[layer] for layer in addresser.spec.layer_ids}
        # For the shards of the last call, by layers; keeps no shard alive.
        self._known: dict[tuple[int, ...], _Native] = {}

    @property
    def in_memory(self) -> bool:
        """Whether reading never waits for a disk or a network."""
        return all([store.in_memory for store in self._stores.values()])

    @property
    def tells_residency(self) -> bool:
        """Whether it is known of all rows if they are in memory now."""
        return _native.core is not None and all(
            [store.in_memory or store.tells_residency for store in self._stores.values()]
        )

    @property
    def columns(self) -> int:
        """C."""
        return self._addresser.spec.columns

    @property
    def dim(self) -> int:
        """d."""
        return self._format.d

    def read(self, batch: Batch) -> None:
        """Reads the rows of a chunk.

        Raises:
            StoreError: A store is closed or cannot be read.
            ShardTruncated: A file of a store was truncated.
            NotResident: Rows that were to be read only from memory are not there; they are neither
                read nor counted.
        """
        if _native.core is None:
            self._read_in_steps(batch)
            return
        try:
            self._read_at_once(batch)
        except _StepByStep:
            self._read_in_steps(batch)

    def _read_at_once(self, batch: Batch) -> None:
        """Raises _StepByStep unless the rows of every layer are mapped memory."""
        chunk = batch.chunk
        sequences, tokens = chunk.ids_BT.shape
        address = _native.compiled().address
        ids = (
            address(chunk.ids_BT),
            sequences,
            tokens,
            _address(chunk.history),
            _address(chunk.live),
            _address(chunk.starts),
        )
        stores = [self._stores[layer] for layer in batch.layers]
        with ReadingAll(stores, chunk.ids_BT.size * self.columns) as shards:
            mapped = [shard for shard in shards if shard]
            if len(mapped) < len(stores):
                raise _StepByStep
            places = [
                addresses(shard, store.info) for shard, store in zip(mapped, stores, strict=True)
            ]
            reader = self._reader_of(batch.layers, places)
            if batch.resident and not reader.resident(*ids, self._format.row_bytes):
                raise NotResident
            reader.read(
                *ids,
                outs=[address(out_BTE) for out_BTE in batch.outs_BTE],
                to_bf16=batch.outs_BTE[0].dtype == np.uint16,
                row_ids=_address(batch.row_ids_LBTC),
                waits=not (batch.resident or self.in_memory),
            )

    def _reader_of(self, layers: tuple[int, ...], places: list[Addresses]) -> NativeReader:
        """The native reader for these layers, whose shards lie there."""
        known = self._known.get(layers)
        if known is not None and known.is_for(places):
            return known.reader
        fmt = self._format
        reader = _native.compiled().BatchReader(
            plan=self._addresser.plan,
            first_layer=self._addresser.spec.layer_index(layers[0]),
            kind=fmt.kind,
            d=fmt.d,
            scale=fmt.scale or 1.0,
            shards=[place.address for place in places],
            shard_rows=[place.shard_rows for place in places],
            rows=[place.rows for place in places],
        )
        self._known[layers] = _Native(reader, places)
        return reader

    def _read_in_steps(self, batch: Batch) -> None:
        chunk = batch.chunk
        for index, layer in enumerate(batch.layers):
            ids_BTC = self._addresser.rows(
                chunk.ids_BT, layer, chunk.history, chunk.live, chunk.starts
            )
            read(self._stores[layer], ids_BTC, self._format, batch.outs_BTE[index])
            if batch.row_ids_LBTC is not None:
                batch.row_ids_LBTC[index] = ids_BTC


class BatchRequest(NamedTuple):
    """The rows of a chunk in some layers, for `Prefetcher.read`.

    Attributes:
        reader: Reads them.
        chunk, layers: As in `Batch`.
        dtype: float32 or bfloat16.
        row_ids: Gets the row ids by layer, int64 [B, T, C]; None = they are not wanted.
        resident: As in `Batch`.
    """

    reader: BatchReader
    chunk: Chunk
    layers: tuple[int, ...]
    dtype: torch.dtype
    row_ids: dict[int, np.ndarray] | None
    resident: bool = False

    @property
    def rows(self) -> int:
        """How many."""
        return self.chunk.ids_BT.size * self.reader.columns * len(self.layers)

    @property
    def bytes(self) -> int:
        """Their bytes as numbers of the dtype."""
        return self.rows * self.reader.dim * self.dtype.itemsize

    def read(self, take: TakeBuffer) -> dict[int, Tensor]:
        """Reads the rows into buffers of `take`: layer -> [B, T, E]."""
        kind = np.uint16 if self.dtype is torch.bfloat16 else np.float32
        shape = self.chunk.ids_BT.shape
        columns = self.reader.columns
        outs_BTE = [take((*shape, columns * self.reader.dim), kind) for _ in self.layers]
        row_ids_LBTC = None
        if self.row_ids is not None:
            row_ids_LBTC = np.empty((len(self.layers), *shape, columns), np.int64)
        self.reader.read(Batch(self.chunk, self.layers, outs_BTE, row_ids_LBTC, self.resident))
        if self.row_ids is not None and row_ids_LBTC is not None:
            self.row_ids.update(zip(self.layers, row_ids_LBTC, strict=True))
        rows = [torch.from_numpy(out_BTE).view(self.dtype) for out_BTE in outs_BTE]
        return dict(zip(self.layers, rows, strict=True))


class NotResident(Exception):
    """Raised to leave the scope of a read of rows that are not in memory."""


class _StepByStep(Exception):
    """Raised to leave the scope of a read that one native call cannot do: left so, it counts no
    rows."""


class _Native(NamedTuple):
    """A native reader, and the places of the shards of each layer that it was made for."""

    reader: NativeReader
    places: list[Addresses]

    def is_for(self, places: list[Addresses]) -> bool:
        return all([ours is asked for ours, asked in zip(self.places, places, strict=True)])


def _address(values: np.ndarray | None) -> int:
    return 0 if values is None else _native.compiled().address(values)
