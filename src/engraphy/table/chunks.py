"""The rows of a table in order, a chunk at a time, and how progress is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from .safetensors import StoredTensor, read_rows
from .shards import HEADER_BYTES, Shard
from .table import Table

CHUNK_VALUES = 1 << 18  # decoded at a time: 1 MiB of float32, which stays in the cache

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, bytes done, and bytes in all."""


def row_chunks(table: Table, layer: int) -> Iterator[tuple[int, np.ndarray]]:
    """All rows of a layer in order, a chunk at a time.

    They are read from the files, not through the mapping, which is made for rows here and there.

    Yields:
        The first row of the chunk, and its rows, uint8 [n, row_bytes], in an array that the next
        chunk overwrites.
    """
    rows = table.rows(layer)
    step = max(1, CHUNK_VALUES // table.fmt.d)
    tensors = [_tensor(shard) for shard in table.shards(layer)]
    buffer_nR = np.empty((min(step, rows), table.row_bytes), np.uint8)
    for first in range(0, rows, step):
        raw_nR = buffer_nR[: min(step, rows - first)]
        read_rows(tensors, first, raw_nR)
        yield first, raw_nR


def _tensor(shard: Shard) -> StoredTensor:
    size = shard.rows * shard.row_bytes
    shape = (shard.rows, shard.row_bytes)
    return StoredTensor(shard.path, "rows", "U8", shape, HEADER_BYTES, size)
