"""One layer of a table on disk, read with pread by blocking threads: for tables beyond memory.

A batch is sorted, so that each row is read once however often its id occurs, and one read brings
rows of the same or of neighbouring pages. Reads go to several threads, since a disk is fastest with
many of them under way. A truncated shard is an error at the read that meets it, never a signal.

The plain version (`pread_plain.py`) is the specification of the native one (`_native/pread.cpp`):
the same reads, the same rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _native  # pyright: ignore[reportPrivateUsage]
from ..errors import ConfigError
from ..table.table import Table
from .base import RowStore, StoreInfo
from .pread_files import OpenFiles
from .pread_plain import read_plain, write_rows
from .threads import Threads


class PreadStore(RowStore):
    """Rows of one layer of an open table, read when they are requested.

    It is writable like a `FileStore`. `stats` counts the reads of the system, too. Reading a shard
    that was truncated meanwhile raises ShardTruncated.

    Args:
        table: the open table.
        layer: the model's layer, 0-based.
        threads: at most so many reads are under way at a time.
        direct: read past the page cache; for tables that are open for reading.
        close_table: close the table with the store.

    Raises:
        ConfigError: if the table does not have the layer, or `direct` is set for a table that is
            open for writing.
        StoreError: if the file system refuses direct reads.
        TableError: for damaged shards, as `Table.open` raises it.
    """

    def __init__(
        self,
        table: Table,
        layer: int,
        threads: int,
        direct: bool = False,
        close_table: bool = False,
    ) -> None:
        if direct and table.mode == "w":
            raise ConfigError(
                f"{table.path}: expected a table open for reading with direct=1, "
                "found it open for writing"
            )
        super().__init__()
        self.table = table
        self._layer = layer
        self._close_table = close_table
        self._files: OpenFiles | None = OpenFiles(table, layer, direct)
        self._limit = threads
        self._threads = Threads(threads)
        how = f"pread, {threads} thread" if threads == 1 else f"pread, {threads} threads"
        if direct:
            how += ", direct"
        self._info = StoreInfo.of_layer("file", table, layer, how)

    @property
    def info(self) -> StoreInfo:
        self._info = self._info.as_of_now(self.table)
        return self._info

    def close(self) -> None:
        super().close()
        self._files = None  # closed when the last reader in another thread is done
        if self._close_table:
            self.table.close()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._threads = Threads(self._limit)  # the threads of the parent are not in the child

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        files = self._files
        if files is None:
            return self._check_open()
        if not len(ids_N):
            return
        core = _native.core
        if core is None:
            counts = read_plain(files, self._threads, ids_N, out_NR, self.table.shard_rows)
        else:
            counts = self._read_native(core, files, ids_N, out_NR)
        self._counters.add_reads(*counts)

    def _read_native(
        self, core: Any, files: OpenFiles, ids_N: np.ndarray, out_NR: np.ndarray
    ) -> tuple[int, int]:
        if files.reader is None:
            files.reader = files.native_reader(
                core, self.table.shard_rows, out_NR.shape[1], self._limit
            )
        flat_N = np.ascontiguousarray(ids_N)
        reads, read_bytes, number, code = files.reader.read(
            core.address(flat_N), len(flat_N), core.address(out_NR)
        )
        if number >= 0:
            raise files.failed(number, code)
        return reads, read_bytes

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        files = self._files
        if files is None:
            return self._check_open()
        touched = np.unique(ids_N // self.table.shard_rows).tolist()
        with self.table.writing(self._layer, touched):
            files.check_sizes(touched)  # a write beyond the end would hide that the rest is missing
            write_rows(files, self._threads, ids_N, rows_NR, self.table.shard_rows)
