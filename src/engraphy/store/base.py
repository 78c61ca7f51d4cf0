"""What a store is: rows of bytes by row id, whatever holds them. No tokens, no numbers, no model.

`RowStore` checks and counts; a store fills in `_gather` and `_scatter`. `MappedStore` is the one
for memory that can be addressed, and wrappers (caches, overlays) are stores around a store.
`Reading` is the scope of one read of memory.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError, StoreError
from ..rows.format import RowFormat
from ..rows.read import by_shard, check_ids, gather_mapped
from ..system.checks import check_array, check_out
from ..table.table import Table
from .latency import BUCKETS, Latency, bucket_of, latency_of
from .mapping import Watch
from .names import RowNames, name_copy


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds. kind: its URL scheme. The rest is None where a store does not know it:
    the identities of the table behind it, its row format, layer and path; reads: in words, how it
    gets at rows, where it had a choice."""

    kind: str
    rows: int
    row_bytes: int
    writable: bool
    table_id: str | None = None
    layer: int | None = None
    path: str | None = None
    format: RowFormat | None = None
    address_digest: str | None = None
    reads: str | None = None

    @classmethod
    def of_layer(cls, kind: str, table: Table, layer: int, reads: str) -> StoreInfo:
        """Of a store over one layer of a table. Raises ConfigError for a layer that the table does
        not have."""
        return cls(
            kind,
            table.rows(layer),
            table.row_bytes,
            table.mode == "w",
            table.table_id,
            layer,
            str(table.path),
            table.fmt,
            table.address_digest,
            reads,
        )

    def as_of_now(self, table: Table) -> StoreInfo:
        """The same after a seal, which ends writing and may change the table_id."""
        writable, table_id = table.mode == "w", table.table_id
        if (writable, table_id) == (self.writable, self.table_id):
            return self
        return dataclasses.replace(self, writable=writable, table_id=table_id)

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class StoreStats:
    """What has been read since the store was opened: calls, rows, bytes. And what the system was
    asked for, by stores that read files instead of mapping them: reads, and their bytes, which
    divided by `bytes` is the amplification.

    hits, misses: of a cache, rows that it had, and rows that it read from the store behind it.
    under_way: calls of `gather` that have not returned, now. latency: of the calls.
    """

    gathers: int
    rows: int
    bytes: int
    reads: int = 0
    read_bytes: int = 0
    hits: int | None = None
    misses: int | None = None
    under_way: int = field(default=0, compare=False)
    latency: Latency = field(default=Latency(), compare=False)

    @property
    def hit_rate(self) -> float | None:
        """Share of the rows that a cache had; None for other stores and before the first row."""
        return None if self.hits is None or not self.rows else self.hits / self.rows

    @property
    def amplification(self) -> float | None:
        """Bytes that the system was asked for, for each byte of rows; None where files are not read
        but mapped."""
        return self.read_bytes / self.bytes if self.read_bytes and self.bytes else None


class RowStore(ABC):
    """Rows of one layer. Reading is safe from many threads; writing beside reading may show
    half-written rows.

    inner: of a wrapper, the store behind it. names: of the rows, where somebody follows them
    (names.py). in_memory: reading never waits for a disk or a network, so that a few rows are read
    faster here than by another thread. tells_residency: of mapped memory of which mincore tells
    whether a row is there now.
    """

    inner: RowStore | None = None
    names: RowNames | None = None
    in_memory = False
    tells_residency = False

    def __init__(self) -> None:
        self._closed = False
        self._count_lock = threading.Lock()
        self._gathers = self._rows_read = self._reads = self._read_bytes = self._nanoseconds = (
            self._under_way
        ) = 0
        self._buckets = [0] * BUCKETS
        _ALL.add(self)

    @property
    @abstractmethod
    def info(self) -> StoreInfo:
        """What the store holds; answers on a closed store too."""

    def reading(self, rows: int = 0) -> AbstractContextManager[Sequence[np.ndarray] | None]:
        """`with store.reading(rows) as shards:`, the scope of one read of `rows` rows straight from
        mapped memory.

        shards: read-only uint8 [n, row_bytes], equal sizes but the last; None if rows are not
        mapped, and then nothing is counted. The memory stays mapped within the scope, whatever is
        closed or reloaded meanwhile. Leaving it checks that this memory was whole, and counts a
        call of `rows` rows; after an exception it does neither. Raises StoreError on entering a
        closed store, ShardTruncated or StoreError on leaving damaged memory.
        """
        return Reading(self, rows)

    @property
    def shards(self) -> Sequence[np.ndarray] | None:
        """Deprecated: `reading()`, which also tells whether the memory was whole while it was read."""
        warnings.warn(
            "store.shards is deprecated: use `with store.reading(rows) as shards:`, which keeps the memory "
            "mapped and checks it for damage",
            DeprecationWarning,
            stacklevel=2,
        )
        shards, pin = self._begin_read()
        self._end_read(pin, None, 0)
        return shards

    @property
    def stats(self) -> StoreStats:
        """Counters so far."""
        with self._count_lock:
            return StoreStats(
                self._gathers,
                self._rows_read,
                self._rows_read * self.info.row_bytes,
                self._reads,
                self._read_bytes,
                under_way=self._under_way,
                latency=latency_of(self._buckets, self._nanoseconds),
            )

    def gather(self, ids_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `ids_N` (int64 [N]) as uint8 [N, row_bytes], in `out` (C-contiguous) where it is
        given.

        Raises RowOutOfRange, InputError (dtype, shape) or StoreError (closed) before anything is
        written.
        """
        begun = time.perf_counter_ns()
        self._check_open()
        info = self.info
        _check_flat_ids(ids_N, info.rows)
        if out is None:
            out = np.empty((len(ids_N), info.row_bytes), np.uint8)
        check_out(out, (len(ids_N), info.row_bytes), (np.uint8,))
        with self._count_lock:
            self._under_way += 1
        try:
            self._gather(ids_N, out)
        finally:
            with self._count_lock:
                self._under_way -= 1
        self._count_read(len(ids_N), begun)
        return out

    def scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        """Write uint8 [N, row_bytes] to rows `ids_N` (int64 [N]). Of an id given twice the last row
        stays.

        Raises RowOutOfRange, InputError (dtype, shape) or StoreError (closed, read-only) before
        anything is written.
        """
        self._check_open()
        info = self.info
        if not info.writable:
            raise StoreError(
                f"{info.kind} store of {info.path or 'rows'}: expected one opened for writing, "
                "found it read-only"
            )
        _check_flat_ids(ids_N, info.rows)
        check_array("rows", rows_NR, (len(ids_N), info.row_bytes), (np.uint8,))
        if self.names is None or not len(ids_N):
            self._scatter(ids_N, rows_NR)
            return
        self.names.forget()
        try:
            self._scatter(ids_N, rows_NR)
        finally:
            self.names.forget()  # a name that was drawn meanwhile

    def _count_read(self, rows: int, begun: int) -> None:
        """Count a call that began at `begun` (perf_counter_ns) and read `rows` rows."""
        taken = time.perf_counter_ns() - begun
        bucket = bucket_of(taken)
        with self._count_lock:
            self._gathers += 1
            self._rows_read += rows
            self._nanoseconds += taken
            self._buckets[bucket] += 1

    def _begin_read(self) -> tuple[Sequence[np.ndarray] | None, Any]:
        """What `reading` gives on entering, and what `_end_read` has to be given. Raises StoreError
        if closed."""
        self._check_open()
        return None, None

    def _end_read(self, pin: Any, rows: int | None, begun: int) -> None:
        """Leave what `_begin_read` began, while its memory is still held. rows: None if nothing
        came of it."""
        return  # nothing is mapped

    def __repr__(self) -> str:
        info = self.info
        layer = "" if info.layer is None else f", layer {info.layer}"
        details = "".join(
            f", {text}" for text in (info.reads, "writable" if info.writable else None) if text
        )
        return (
            f"<{info.kind} store{' of ' + info.path if info.path else ''}{layer}: {info.rows} rows of "
            f"{info.row_bytes} bytes{details}>"
        )

    def close(self) -> None:
        """Let go of files and memory; every later use raises StoreError. May be called again."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.info.kind} store of {self.info.path or 'rows'}: it is closed")

    def _after_fork(self) -> None:
        """In a forked child: the threads are gone that held locks."""
        self._count_lock, self._under_way = threading.Lock(), 0
        if self.names is not None:
            self.names.after_fork()

    @abstractmethod
    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None: ...

    @abstractmethod
    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None: ...


class MappedStore(RowStore):
    """A store whose rows can be addressed: uint8 [n, row_bytes] arrays, equal sizes but the last.
    watch: of the files that the memory is of, asked before and after each read."""

    def __init__(self, memory: Sequence[np.ndarray], watch: Watch | None = None) -> None:
        super().__init__()
        self._watch = watch
        self._memory = tuple(memory)
        self._readonly = tuple(shard.view() for shard in memory)
        for shard in self._readonly:
            shard.flags.writeable = False

    def _begin_read(self) -> tuple[Sequence[np.ndarray], None]:
        shards = (
            self._readonly
        )  # before the check: closing marks the store first, and then lets go of the memory
        if self._closed:
            self._check_open()
        if self._watch is not None:
            self._watch.before()
        return shards, None

    def _end_read(self, pin: Any, rows: int | None, begun: int) -> None:
        if rows is not None:
            if self._watch is not None:
                self._watch.after()
            self._count_read(rows, begun)

    def close(self) -> None:
        super().close()
        # Memory is unmapped when the last array over it dies, so a reader in another thread
        # finishes in peace.
        self._memory = self._readonly = ()

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        shards, _ = self._begin_read()
        gather_mapped(shards, self.info, ids_N, out_NR, waits=not self.in_memory)
        if self._watch is not None:
            self._watch.after()

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        for shard, local_n, where in by_shard(self._memory, ids_N):
            shard[local_n] = rows_NR[where]


class Reading:
    """The scope that `RowStore.reading` gives. An object, since a generator takes longer than
    reading a few rows."""

    __slots__ = ("_begun", "_pin", "_rows", "_shards", "_store")

    def __init__(self, store: RowStore, rows: int) -> None:
        self._store, self._rows = store, rows

    def __enter__(self) -> Sequence[np.ndarray] | None:
        self._begun = time.perf_counter_ns()
        self._shards, self._pin = self._store._begin_read()
        return self._shards

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._store._end_read(self._pin, self._rows if kind is None else None, self._begun)
        self._shards = self._pin = None


class ReadingAll:
    """The scopes of several stores as one, which gives a list of what each gives. For the few rows
    of a token: it makes no object for a store, and one time is counted for all."""

    __slots__ = ("_begun", "_entered", "_rows", "_shards", "_stores")

    def __init__(self, stores: Iterable[RowStore], rows: int) -> None:
        """rows: of each store."""
        self._stores, self._rows = stores, rows

    def __enter__(self) -> list[Sequence[np.ndarray] | None]:
        self._begun = time.perf_counter_ns()
        self._entered, self._shards = [], []
        try:
            for store in self._stores:
                shards, pin = store._begin_read()
                self._entered.append((store, pin))
                self._shards.append(shards)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self._shards

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        rows, first = self._rows if kind is None else None, None
        for store, pin in self._entered:
            try:
                store._end_read(pin, rows, self._begun)
            except BaseException as damage:  # the others are left, too
                first = first or damage
        if first is not None:
            raise first


def copy_rows(source: RowStore, target: RowStore, chunk: int = 65_536) -> None:
    """Copy all rows of a store into another of the same size, `chunk` rows at a time, in bounded
    memory.

    Raises InputError where rows, row_bytes or (if both stores know it) the row format differ,
    StoreError where the target is read-only.
    """
    ours, theirs = source.info, target.info
    if (ours.rows, ours.row_bytes) != (theirs.rows, theirs.row_bytes):
        raise InputError(
            f"copy_rows: the source has {ours.rows} rows of {ours.row_bytes} bytes, "
            f"the target {theirs.rows} of {theirs.row_bytes}"
        )
    if None not in (ours.format, theirs.format) and ours.format != theirs.format:
        raise InputError(
            f"copy_rows: the source has rows of {ours.format}, the target of {theirs.format}"
        )
    buffer_nR = np.empty((min(chunk, ours.rows), ours.row_bytes), np.uint8)
    for first in range(0, ours.rows, chunk):
        ids_n = np.arange(first, min(first + chunk, ours.rows), dtype=np.int64)
        target.scatter(ids_n, source.gather(ids_n, out=buffer_nR[: len(ids_n)]))
    name_copy(source, target)


_ALL: weakref.WeakSet[RowStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_ALL):
        store._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _check_flat_ids(ids_N: np.ndarray, rows: int) -> None:
    check_array("row ids", ids_N, (None,), (np.int64,))
    check_ids(ids_N, rows)
