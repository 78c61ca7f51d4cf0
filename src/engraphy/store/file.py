"""One layer of a table on disk, mapped: the page cache holds what is read, shared by all processes."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..errors import InputError
from ..table import Table
from .base import MappedStore, RowStore, StoreInfo


class FileStore(MappedStore):
    """Rows of `layer` of an open table; writable while the table is open for writing, until it is sealed or closed.

    A table has one writer: for several layers open it once and make a store of each. close_table: close the table
    with the store. Shards are sparse and take space as rows are written: on a full disk that is a SIGBUS, not an error.
    Raises ConfigError for a layer that the table does not have, and what `Table.open` raises for damaged shards.
    """

    def __init__(self, table: Table, layer: int, close_table: bool = False) -> None:
        super().__init__(table.shard_arrays(layer))
        self.table = table
        self._layer = layer
        self._close_table = close_table
        self._info = StoreInfo("file", table.rows(layer), table.row_bytes, False, None, layer, str(table.path),
                               table.fmt, table.address_digest)

    @property
    def info(self) -> StoreInfo:
        writable, table_id = self.table.mode == "w", self.table.table_id
        if (writable, table_id) != (self._info.writable, self._info.table_id):  # a seal changes both
            self._info = dataclasses.replace(self._info, writable=writable, table_id=table_id)
        return self._info

    def close(self) -> None:
        super().close()
        if self._close_table:
            self.table.close()

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        with self.table.writing(self._layer, np.unique(ids_N // self.table.shard_rows)):
            super()._scatter(ids_N, rows_NR)


def write_layer(source: RowStore, table: Table, layer: int, chunk: int = 65_536) -> None:
    """Copy all rows of a store into `layer` of a table that is open for writing, in bounded memory.

    Through write calls, not the mapping: a full disk is an OSError. Raises InputError where rows or row_bytes differ.
    """
    info = source.info
    if (info.rows, info.row_bytes) != (table.rows(layer), table.row_bytes):
        raise InputError(f"write_layer: the source has {info.rows} rows of {info.row_bytes} bytes, "
                         f"layer {layer} of the table {table.rows(layer)} of {table.row_bytes}")
    for first in range(0, info.rows, chunk):
        table.write_rows(layer, first, source.gather(np.arange(first, min(first + chunk, info.rows), dtype=np.int64)))
