"""Rows of DeepSeek-V4.1 from stores of ours, through SGLang's own stager. Not run: it needs a GPU.

SGLang's EngramRowStager knows the tokens of an extend batch before its forward. It hashes them on
the CPU, gathers the rows of each layer out of a table in shared host memory into page-locked
memory, and copies them to the GPU while the forward before is running. Only the gather is replaced
here: rows come from any store (a file, a pool, a cache, another host), everything else is SGLang's.

    stager = model_runner.ngram_embedding_manager.engram_stager
    url = "file:TABLE?cache=8GiB"
    read_from_stores(stager, [open_store(url, layer=layer) for layer in (1, 14)])

What stays: decoded tokens do not pass through the stager. SGLang reads their rows inside the
forward, from the host table, so that table has to be there all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...store.base import RowStore


class Records:
    """The records of one layer. Both parts of a record, values and scales, are read at once."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._ids: Tensor | None = None
        self._raw_NR = torch.empty(0)

    def read(self, ids_N: Tensor) -> Tensor:
        """uint8 [N, row_bytes]. Asked for the same tensor of ids again, it reads nothing."""
        if ids_N is not self._ids:
            self._raw_NR = torch.from_numpy(self._store.gather(ids_N.numpy()))
            self._ids = ids_N
        return self._raw_NR


class Part:
    """Some bytes of each record: what stands in for one tensor of the stager's tables.

    Attributes:
        shape: Rows, and bytes of each.
    """

    def __init__(self, records: Records, columns: slice, rows: int) -> None:
        self.shape = (rows, columns.stop - columns.start)
        self._records = records
        self._columns = columns

    def gather(self, ids_N: Tensor, pin_memory: bool = True) -> Tensor:
        """uint8 [N, shape[1]], as EngramRowStager._gather gives it."""
        raw_NR = self._records.read(ids_N)
        out = torch.empty((len(ids_N), self.shape[1]), dtype=torch.uint8, pin_memory=pin_memory)
        return out.copy_(raw_NR[:, self._columns])


def read_from_stores(stager: Any, stores: Sequence[RowStore], pin_memory: bool = True) -> None:
    """Makes a stager gather from stores.

    Args:
        stager: SGLang's EngramRowStager: `tables`, a pair of uint8 tensors (values, scales) for
            each layer, and `_gather(table, ids)`.
        stores: The store of each of its layers, of fp8 records (`RowFormat`).
        pin_memory: Whether rows are put into page-locked memory, which a copy to a GPU needs.

    Raises:
        ConfigError: The stores have other rows or records than the stager's tables.
    """
    if len(stores) != len(stager.tables):
        raise ConfigError(f"stager: expected {len(stager.tables)} stores, found {len(stores)}")
    tables = []
    for number, (store, (values, scales)) in enumerate(zip(stores, stager.tables, strict=True)):
        rows, width = values.shape
        expected = (rows, width + scales.shape[1])
        found = (store.info.rows, store.info.row_bytes)
        if found != expected:
            raise ConfigError(
                f"stager, layer {number}: expected a store of (rows, bytes) {expected}, "
                f"found {found}"
            )
        records = Records(store)
        parts = (slice(0, width), slice(width, expected[1]))
        tables.append(tuple(Part(records, columns, rows) for columns in parts))
    stager.tables = tables
    stager._gather = lambda part, ids_N: part.gather(ids_N, pin_memory)
