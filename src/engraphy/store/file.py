"""One layer of a table on disk, mapped: the page cache holds what is read, for all processes."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

from ..errors import InputError
from ..rows.read import by_shard
from ..table.shards import HEADER_BYTES, Shard
from ..table.table import Table
from .base import RowStore, StoreInfo
from .mapped import MappedStore
from .mapping import MappedFile, Reserved, Watch
from .options import FileOptions
from .pread import PreadStore

_COPIED_ROWS = 65_536  # at a time


class FileStore(MappedStore):
    """Rows of one layer of an open table, mapped.

    The store is writable while the table is open for writing, until the table is sealed or closed.
    A table has one writer: to write several layers, open the table once and make a store of each.
    Shards are sparse and take disk space as rows are written; a full disk is a StoreError before
    any row is written. A shard that is truncated while it is served raises ShardTruncated at the
    next read (see mapping.py). A shard that another file is renamed over stays mapped as it was.

    Args:
        table: the open table.
        layer: the model's layer, 0-based.
        close_table: close the table with the store.
        populate: bring all rows into memory now, and treat them as rows in memory from then on.

    Raises:
        ConfigError: if the table does not have the layer.
        TableError: for damaged shards, as `Table.open` raises it.
    """

    kind = "file"

    def __init__(
        self, table: Table, layer: int, close_table: bool = False, populate: bool = False
    ) -> None:
        shards = table.shards(layer)
        files = [_map(table, shard) for shard in shards]
        memory = [
            file.records(HEADER_BYTES, shard.rows, shard.row_bytes)
            for shard, file in zip(shards, files, strict=True)
        ]
        super().__init__(memory, Watch(files))
        self.table = table
        self._layer = layer
        self._close_table = close_table
        self._reserved = Reserved(files, HEADER_BYTES) if table.mode == "w" else None
        self.in_memory = self.in_memory or populate
        self.tells_residency = all(file.tells_residency for file in files)
        populated = {file.populate() for file in files} if populate else set[str]()
        self._info = StoreInfo.of_layer(self.kind, table, layer, ", ".join(["mmap", *populated]))

    @property
    def info(self) -> StoreInfo:
        self._info = self._info.as_of_now(self.table)
        return self._info

    def close(self) -> None:
        super().close()
        self._reserved = None
        if self._close_table:
            self.table.close()

    def _has_space(self) -> bool:
        reserved = self._reserved
        return reserved is not None and reserved.is_complete

    @contextmanager
    def _writing(self, ids_N: np.ndarray | None) -> Generator[None, None, None]:
        memory = self._memory
        reserved = self._reserved
        self._check_open()
        assert reserved is not None  # a writable store that was not closed has it
        if ids_N is None:
            touched = list(range(len(memory)))
        else:
            touched = np.unique(ids_N // self.table.shard_rows).tolist()
        with self.table.writing(self._layer, touched), super()._writing(ids_N):
            # The watch has looked at the sizes by now: reserving space beyond the end of a
            # truncated file would hide that the rest is missing.
            if ids_N is not None and len(ids_N):
                row_bytes = self._info.row_bytes
                parts = by_shard(memory, ids_N)
                for number, (_, local_n, _) in zip(touched, parts, strict=True):
                    reserved.take(number, HEADER_BYTES + local_n * row_bytes, row_bytes)
            yield


def open_layer(table: Table, layer: int, options: FileOptions) -> RowStore:
    """Opens the store that reads `layer` as the options say. Closing it closes the table."""
    if options.choose(table) == "pread":
        return PreadStore(table, layer, options.threads, options.direct, close_table=True)
    return FileStore(table, layer, close_table=True, populate=options.populate)


def write_layer(source: RowStore, table: Table, layer: int) -> None:
    """Copies all rows of a store into one layer of a table, in bounded memory.

    It uses write calls, not the mapping: a full disk is an OSError.

    Args:
        source: the store to read.
        table: a table that is open for writing.
        layer: the model's layer, 0-based.

    Raises:
        InputError: if rows or row_bytes differ.
    """
    info = source.info
    if (info.rows, info.row_bytes) != (table.rows(layer), table.row_bytes):
        raise InputError(
            f"layer {layer}: expected a source of {table.rows(layer)} rows of {table.row_bytes} "
            f"bytes, as in the table, found {info.rows} rows of {info.row_bytes} bytes"
        )
    for first in range(0, info.rows, _COPIED_ROWS):
        ids_n = np.arange(first, min(first + _COPIED_ROWS, info.rows), dtype=np.int64)
        table.write_rows(layer, first, source.gather(ids_n))


def _map(table: Table, shard: Shard) -> MappedFile:
    fd = table.open_shard(shard)
    try:
        return MappedFile(fd, str(shard.path), shard.size, table.mode == "w")
    finally:
        os.close(fd)
