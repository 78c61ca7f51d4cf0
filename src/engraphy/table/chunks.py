"""The rows of a table in order, a chunk at a time, and how progress is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .safetensors import StoredTensor, read_rows
from .shards import HEADER_BYTES
from .table import Table

CHUNK_VALUES = 1 << 18  # decoded at a time: 1 MiB of float32, which stays in the cache


Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done, bytes in all."""


def row_chunks(table: Table, layer: int) -> Iterator[tuple[int, np.ndarray]]:
    """First row and rows, uint8 [n, row_bytes], of all chunks of a layer, in an array that the next
    chunk overwrites.

    Read in order, past the mapping, which is made for rows here and there.
    """
    rows, step = table.rows(layer), max(1, CHUNK_VALUES // table.fmt.d)
    shards = [
        StoredTensor(
            shard.path,
            "rows",
            "U8",
            (shard.rows, shard.row_bytes),
            HEADER_BYTES,
            shard.rows * shard.row_bytes,
        )
        for shard in table.shards(layer)
    ]
    buffer_nR = np.empty((min(step, rows), table.row_bytes), np.uint8)
    for first in range(0, rows, step):
        raw_nR = buffer_nR[: min(step, rows - first)]
        read_rows(shards, first, raw_nR)
        yield first, raw_nR
