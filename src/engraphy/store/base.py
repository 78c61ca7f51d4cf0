"""What a store is: rows of bytes by row id, whatever holds them. No tokens, no numbers, no model.

`RowStore` checks and counts; a store fills in `_gather` and `_scatter`. `MappedStore` is the one for memory that can be
addressed, and wrappers (caches, overlays) are stores around a store.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, StoreError
from ..rows import RowFormat, by_shard, check_array, check_ids, check_out, take


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds. kind: its URL scheme. The rest is None where a store does not know it: the identities of the
    table behind it, its row format, layer and path."""

    kind: str
    rows: int
    row_bytes: int
    writable: bool
    table_id: str | None = None
    layer: int | None = None
    path: str | None = None
    format: RowFormat | None = None
    address_digest: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class StoreStats:
    """What has been read since the store was opened: calls, rows, bytes."""

    gathers: int
    rows: int
    bytes: int


class RowStore(ABC):
    """Rows of one layer. Reading is safe from many threads; writing beside reading may show half-written rows."""

    def __init__(self) -> None:
        self._closed = False
        self._count_lock = threading.Lock()
        self._gathers = self._rows_read = 0

    @property
    @abstractmethod
    def info(self) -> StoreInfo:
        """What the store holds; answers on a closed store too."""

    @property
    def shards(self) -> Sequence[np.ndarray] | None:
        """Mapped memory as read-only uint8 [n, row_bytes], equal sizes but the last; None where rows are not mapped.

        For `rows.read` alone, which calls `count_read`. Raises StoreError on a closed store.
        """
        self._check_open()
        return None

    @property
    def stats(self) -> StoreStats:
        """Counters so far."""
        with self._count_lock:
            return StoreStats(self._gathers, self._rows_read, self._rows_read * self.info.row_bytes)

    def gather(self, ids_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `ids_N` (int64 [N]) as uint8 [N, row_bytes], in `out` (C-contiguous) where it is given.

        Raises RowOutOfRange, InputError (dtype, shape) or StoreError (closed) before anything is written.
        """
        self._check_open()
        info = self.info
        _check_flat_ids(ids_N, info.rows)
        if out is None:
            out = np.empty((len(ids_N), info.row_bytes), np.uint8)
        check_out(out, (len(ids_N), info.row_bytes), (np.uint8,))
        self._gather(ids_N, out)
        self.count_read(len(ids_N))
        return out

    def scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        """Write uint8 [N, row_bytes] to rows `ids_N` (int64 [N]). Of an id given twice the last row stays.

        Raises RowOutOfRange, InputError (dtype, shape) or StoreError (closed, read-only) before anything is written.
        """
        self._check_open()
        info = self.info
        if not info.writable:
            raise StoreError(f"{info.kind} store of {info.path or 'rows'}: expected one opened for writing, "
                             "found it read-only")
        _check_flat_ids(ids_N, info.rows)
        check_array("rows", rows_NR, (len(ids_N), info.row_bytes), (np.uint8,))
        self._scatter(ids_N, rows_NR)

    def count_read(self, rows: int) -> None:
        """Put `rows` rows, read past `gather`, to the counters."""
        with self._count_lock:
            self._gathers += 1
            self._rows_read += rows

    def close(self) -> None:
        """Let go of files and memory; every later use raises StoreError. May be called again."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.info.kind} store of {self.info.path or 'rows'}: it is closed")

    @abstractmethod
    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None: ...

    @abstractmethod
    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None: ...


class MappedStore(RowStore):
    """A store whose rows can be addressed: uint8 [n, row_bytes] arrays, equal sizes but the last."""

    def __init__(self, memory: Sequence[np.ndarray]) -> None:
        super().__init__()
        self._memory = tuple(memory)
        self._readonly = tuple(shard.view() for shard in memory)
        for shard in self._readonly:
            shard.flags.writeable = False

    @property
    def shards(self) -> Sequence[np.ndarray]:
        self._check_open()
        return self._readonly

    def close(self) -> None:
        super().close()
        # Memory is unmapped when the last array over it dies, so a reader in another thread finishes in peace.
        self._memory = self._readonly = ()

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        take(self.shards, ids_N, out_NR)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        for shard, local_n, where in by_shard(self._memory, ids_N):
            shard[local_n] = rows_NR[where]


def copy_rows(source: RowStore, target: RowStore, chunk: int = 65_536) -> None:
    """Copy all rows of a store into another of the same size, `chunk` rows at a time, in bounded memory.

    Raises InputError where rows, row_bytes or (if both stores know it) the row format differ, StoreError where the
    target is read-only.
    """
    ours, theirs = source.info, target.info
    if (ours.rows, ours.row_bytes) != (theirs.rows, theirs.row_bytes):
        raise InputError(f"copy_rows: the source has {ours.rows} rows of {ours.row_bytes} bytes, "
                         f"the target {theirs.rows} of {theirs.row_bytes}")
    if None not in (ours.format, theirs.format) and ours.format != theirs.format:
        raise InputError(f"copy_rows: the source has rows of {ours.format}, the target of {theirs.format}")
    buffer_nR = np.empty((min(chunk, ours.rows), ours.row_bytes), np.uint8)
    for first in range(0, ours.rows, chunk):
        ids_n = np.arange(first, min(first + chunk, ours.rows), dtype=np.int64)
        target.scatter(ids_n, source.gather(ids_n, out=buffer_nR[:len(ids_n)]))


def _check_flat_ids(ids_N: np.ndarray, rows: int) -> None:
    check_array("row ids", ids_N, (None,), (np.int64,))
    check_ids(ids_N, rows)
