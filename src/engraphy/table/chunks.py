"""The rows of a table or a release in order, a chunk at a time, and how progress is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from ..errors import InputError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig

CHUNK_VALUES = 1 << 18  # decoded at a time: 1 MiB of float32, which stays in the cache

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, bytes done, and bytes in all."""


class RowSource(Protocol):
    """Rows of all layers of a memory: a `Table`, or the tables of a release.

    Attributes:
        table_id: Identity of the rows.
        parent: Identity of the rows that they were made from, or None.
        address_digest: Identity of their addresses.
        config: The memory that they belong to.
        fmt: Their format.
        layers: The model's layers that have rows.
    """

    @property
    def table_id(self) -> str: ...
    @property
    def parent(self) -> str | None: ...
    @property
    def address_digest(self) -> str: ...
    @property
    def config(self) -> EngramConfig: ...
    @property
    def fmt(self) -> RowFormat: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    def rows(self, layer: int) -> int: ...
    def read_rows(self, layer: int, first: int, out_nR: np.ndarray) -> None:
        """Reads rows from number `first` on into uint8 [n, row_bytes]."""
        ...


def row_chunks(source: RowSource, layer: int) -> Iterator[tuple[int, np.ndarray]]:
    """All rows of a layer in order, a chunk at a time.

    They are read from the files, not through the mapping, which is made for rows here and there.

    Yields:
        The first row of the chunk, and its rows, uint8 [n, row_bytes], in an array that the next
        chunk overwrites.
    """
    rows = source.rows(layer)
    step = max(1, CHUNK_VALUES // source.fmt.d)
    buffer_nR = np.empty((min(step, rows), source.fmt.row_bytes), np.uint8)
    for first in range(0, rows, step):
        raw_nR = buffer_nR[: min(step, rows - first)]
        source.read_rows(layer, first, raw_nR)
        yield first, raw_nR


def encode_rows(fmt: RowFormat, values_nd: np.ndarray, layer: int, first: int) -> np.ndarray:
    """Records of values. An InputError also names the layer, and the first of the rows."""
    try:
        return fmt.encode(values_nd)
    except InputError as error:
        raise InputError(f"layer {layer}, rows from {first} on: {error}") from None
