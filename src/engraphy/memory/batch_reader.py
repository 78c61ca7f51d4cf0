"""BatchReader: the rows of a chunk of tokens, by one native call for all layers.

Addresses and rows are made a tile of tokens at a time, so row ids are written to memory only if
they are wanted. The separate steps are the specification of the call, and do whatever it cannot do:
Addresser.all_rows, rows.read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _native
from ..addresses.addresser import Addresser, Chunk
from ..rows.read import addresses, read
from ..store.base import ReadingAll
from ..store.group import StoreGroup
from .ticket import TakeBuffer


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
    def columns(self) -> int:
        """C."""
        return self._addresser.spec.columns

    @property
    def dim(self) -> int:
        """d."""
        return self._format.d

    def read(
        self,
        chunk: Chunk,
        layers: tuple[int, ...],
        outs_BTE: Sequence[np.ndarray],
        row_ids_LBTC: np.ndarray | None,
    ) -> None:
        """Reads the rows of a chunk.

        Args:
            chunk: Made by the addresser.
            layers: Layers that follow each other in the memory.
            outs_BTE: An array a layer: float32, or uint16 for bf16 bits; all of one dtype.
            row_ids_LBTC: int64, gets the row ids; None = they are not wanted.

        Raises:
            StoreError: A store is closed or cannot be read.
            ShardTruncated: A file of a store was truncated.
        """
        try:
            self._read_at_once(chunk, layers, outs_BTE, row_ids_LBTC)
        except _StepByStep:
            self._read_in_steps(chunk, layers, outs_BTE, row_ids_LBTC)

    def _read_at_once(
        self,
        chunk: Chunk,
        layers: tuple[int, ...],
        outs_BTE: Sequence[np.ndarray],
        row_ids_LBTC: np.ndarray | None,
    ) -> None:
        core = _native.core
        if core is None:
            raise _StepByStep
        stores = [self._stores[layer] for layer in layers]
        with ReadingAll(stores, chunk.ids_BT.size * self.columns) as shards:
            mapped = [shard for shard in shards if shard]
            if len(mapped) < len(stores):
                raise _StepByStep
            places = [
                addresses(shard, store.info) for shard, store in zip(mapped, stores, strict=True)
            ]
            known = self._known.get(layers)
            if known is None or not known.is_for(places):
                known = _Native(self._new_reader(core, layers, places), places)
                self._known[layers] = known
            known.reader.read(
                core.address(chunk.ids_BT),
                *chunk.ids_BT.shape,
                _address(core, chunk.history),
                _address(core, chunk.live),
                _address(core, chunk.starts),
                [core.address(out_BTE) for out_BTE in outs_BTE],
                outs_BTE[0].dtype == np.uint16,
                _address(core, row_ids_LBTC),
                not self.in_memory,
            )

    def _new_reader(self, core: Any, layers: tuple[int, ...], places: list[Any]) -> Any:
        fmt = self._format
        return core.BatchReader(
            self._addresser.plan,
            self._addresser.spec.layer_index(layers[0]),
            fmt.kind,
            fmt.d,
            fmt.scale or 1.0,
            [place.address for place in places],
            [place.shard_rows for place in places],
            [place.rows for place in places],
        )

    def _read_in_steps(
        self,
        chunk: Chunk,
        layers: tuple[int, ...],
        outs_BTE: Sequence[np.ndarray],
        row_ids_LBTC: np.ndarray | None,
    ) -> None:
        for index, layer in enumerate(layers):
            ids_BTC = self._addresser.rows(
                chunk.ids_BT, layer, chunk.history, chunk.live, chunk.starts
            )
            read(self._stores[layer], ids_BTC, self._format, outs_BTE[index])
            if row_ids_LBTC is not None:
                row_ids_LBTC[index] = ids_BTC


class BatchRequest:
    """The rows of a chunk in some layers, for `Prefetcher.read`.

    Attributes:
        rows, bytes: How many rows, and their bytes as numbers.
    """

    def __init__(
        self,
        reader: BatchReader,
        chunk: Chunk,
        layers: tuple[int, ...],
        dtype: torch.dtype,
        row_ids: dict[int, np.ndarray] | None,
    ) -> None:
        """Args:
        reader, chunk, layers: What to read, see `BatchReader.read`.
        dtype: float32 or bfloat16.
        row_ids: gets the row ids by layer, int64 [B, T, C]; None = they are not wanted.
        """
        self._reader = reader
        self._chunk = chunk
        self._layers = layers
        self._dtype = dtype
        self._row_ids = row_ids
        self.rows = chunk.ids_BT.size * reader.columns * len(layers)
        self.bytes = self.rows * reader.dim * dtype.itemsize

    def read(self, take: TakeBuffer) -> dict[int, Tensor]:
        """Reads the rows into buffers of `take`: layer -> [B, T, E]."""
        layers = self._layers
        kind = np.uint16 if self._dtype is torch.bfloat16 else np.float32
        batch, tokens = self._chunk.ids_BT.shape
        columns = self._reader.columns
        outs_BTE = [take((batch, tokens, columns * self._reader.dim), kind) for _ in layers]
        row_ids_LBTC = None
        if self._row_ids is not None:
            row_ids_LBTC = np.empty((len(layers), batch, tokens, columns), np.int64)
        self._reader.read(self._chunk, layers, outs_BTE, row_ids_LBTC)
        if self._row_ids is not None and row_ids_LBTC is not None:
            self._row_ids.update(zip(layers, row_ids_LBTC, strict=True))
        rows = [torch.from_numpy(out_BTE).view(self._dtype) for out_BTE in outs_BTE]
        return dict(zip(layers, rows, strict=True))


class _StepByStep(Exception):
    """Raised to leave the scope of a read that one native call cannot do."""


class _Native(NamedTuple):
    """A native reader, and the places of the shards of each layer that it was made for."""

    reader: Any
    places: list[Any]

    def is_for(self, places: list[Any]) -> bool:
        return all([ours is asked for ours, asked in zip(self.places, places, strict=True)])


def _address(core: Any, values: np.ndarray | None) -> int:
    return 0 if values is None else core.address(values)
