"""One layer of a table on disk, mapped: the page cache holds what is read, shared by all processes."""

from __future__ import annotations

import os

import numpy as np

from ..errors import InputError
from ..rows.read import by_shard
from ..table.shards import HEADER_BYTES, Shard
from ..table.table import Table
from .base import MappedStore, RowStore, StoreInfo
from .mapping import MappedFile, Reserved, Watch
from .options import FileOptions
from .pread import PreadStore


class FileStore(MappedStore):
    """Rows of `layer` of an open table; writable while the table is open for writing, until it is
    sealed or closed.

    A table has one writer: for several layers open it once and make a store of each. close_table:
    close the table with the store. populate: bring all rows into memory now, and read them as what
    is there. Shards are sparse and take space as rows are written: a full disk is a StoreError,
    before any row is written. A shard that is truncated while it is served is ShardTruncated at the
    next read (see mapping.py); one that another file is renamed over stays mapped as it was. Raises
    ConfigError for a layer that the table does not have, and what `Table.open` raises for damaged
    shards.
    """

    kind = "file"

    def __init__(
        self, table: Table, layer: int, close_table: bool = False, populate: bool = False
    ) -> None:
        shards = table.shards(layer)
        files = [_map(table, shard) for shard in shards]
        super().__init__(
            [
                file.records(HEADER_BYTES, shard.rows, shard.row_bytes)
                for shard, file in zip(shards, files, strict=True)
            ],
            Watch(files),
        )
        self.table, self._layer, self._close_table = table, layer, close_table
        self._reserved = Reserved(files) if table.mode == "w" else None
        self.in_memory = self.in_memory or populate
        self.tells_residency = all(file.tells_residency for file in files)
        populated = {file.populate() for file in files} if populate else ()
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

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        watch, reserved = self._watch, self._reserved
        if watch is None or reserved is None:
            return self._check_open()
        if not len(ids_N):
            return
        row_bytes, numbers = self._info.row_bytes, np.unique(ids_N // self.table.shard_rows)
        with self.table.writing(self._layer, numbers):
            watch.before()  # reserving space beyond the end would hide that the rest is missing
            for number, (_, local_n, _) in zip(numbers, by_shard(self._memory, ids_N), strict=True):
                reserved.take(number, HEADER_BYTES + local_n * row_bytes, row_bytes)
            super()._scatter(ids_N, rows_NR)
            watch.after()


def open_layer(table: Table, layer: int, options: FileOptions) -> RowStore:
    """The store that reads `layer` as the options say, which closes the table when it is closed."""
    if options.choose(table) == "pread":
        return PreadStore(table, layer, options.threads, options.direct, close_table=True)
    return FileStore(table, layer, close_table=True, populate=options.populate)


def write_layer(source: RowStore, table: Table, layer: int, chunk: int = 65_536) -> None:
    """Copy all rows of a store into `layer` of a table that is open for writing, in bounded memory.

    Through write calls, not the mapping: a full disk is an OSError. Raises InputError where rows or
    row_bytes differ.
    """
    info = source.info
    if (info.rows, info.row_bytes) != (table.rows(layer), table.row_bytes):
        raise InputError(
            f"write_layer: the source has {info.rows} rows of {info.row_bytes} bytes, "
            f"layer {layer} of the table {table.rows(layer)} of {table.row_bytes}"
        )
    for first in range(0, info.rows, chunk):
        table.write_rows(
            layer,
            first,
            source.gather(np.arange(first, min(first + chunk, info.rows), dtype=np.int64)),
        )


def _map(table: Table, shard: Shard) -> MappedFile:
    fd = table.open_shard(shard)
    try:
        return MappedFile(fd, str(shard.path), shard.size, table.mode == "w")
    finally:
        os.close(fd)
