"""RowStore: the base of all stores. A store holds rows of bytes by row id.

It knows no tokens, no numbers and no model. `RowStore` checks and counts; a store implements
`info`, `_gather` and `_scatter`. Stores whose memory can be addressed derive from `MappedStore`
(mapped.py), stores around another store from `WrapperStore` (wrapper.py). The folder testing/ has
the tests that every store has to pass.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..errors import InputError, StoreError
from ..rows.read import check_ids
from ..system.checks import check_array, check_out
from .info import Counters, StoreInfo, StoreStats
from .names import RowNames, name_copy
from .scopes import Reading, ReadingAll, Shards, Updating

__all__ = [
    "Reading",
    "ReadingAll",
    "RowStore",
    "Shards",
    "StoreInfo",
    "StoreStats",
    "Updating",
    "copy_rows",
]


class RowStore(ABC):
    """Rows of one layer.

    Reading is safe from many threads. A read during a write may return half-written rows.

    Attributes:
        inner: the store behind a wrapper; None for other stores.
        names: names of the rows (names.py); None until something follows them.
        in_memory: True if reading never waits for a disk or a network. A few rows are then read
            faster by the calling thread than by another one.
        tells_residency: True if mincore() reports reliably which rows of the mapped memory are in
            RAM now.
    """

    inner: RowStore | None = None
    names: RowNames | None = None
    in_memory: bool = False
    tells_residency: bool = False

    def __init__(self) -> None:
        self._closed = False
        self._counters = Counters()
        _ALL.add(self)

    @property
    @abstractmethod
    def info(self) -> StoreInfo:
        """What the store holds. Works on a closed store, too."""

    @property
    def stats(self) -> StoreStats:
        """The counters so far."""
        return self._counters.stats(self.info.row_bytes)

    def gather(self, ids_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Reads rows.

        Args:
            ids_N: int64 [N], the row ids.
            out: uint8 [N, row_bytes], C-contiguous, to read into; None for a new array.

        Returns:
            uint8 [N, row_bytes]: `out`, or the new array.

        Raises:
            RowOutOfRange: if an id is out of range; nothing is written then.
            InputError: if a dtype or a shape is wrong; nothing is written then.
            StoreError: if the store is closed, or the rows cannot be read.
        """
        begun = time.perf_counter_ns()
        self._check_open()
        info = self.info
        check_flat_ids(ids_N, info.rows)
        if out is None:
            out = np.empty((len(ids_N), info.row_bytes), np.uint8)
        check_out(out, (len(ids_N), info.row_bytes), (np.uint8,))
        self._counters.begin()
        try:
            self._gather(ids_N, out)
        except BaseException:
            self._counters.end()
            raise
        self._counters.end(len(ids_N), begun)
        return out

    def scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        """Writes rows. If an id occurs twice, its last row stays.

        Args:
            ids_N: int64 [N], the row ids.
            rows_NR: uint8 [N, row_bytes], the rows.

        Raises:
            RowOutOfRange: if an id is out of range; nothing is written then.
            InputError: if a dtype or a shape is wrong; nothing is written then.
            StoreError: if the store is closed or read-only, or the rows cannot be written.
        """
        info = self._check_writable(ids_N)
        check_array("rows", rows_NR, (len(ids_N), info.row_bytes), (np.uint8,))
        if not len(ids_N):
            self._scatter(ids_N, rows_NR)
            return
        self._forget_names()
        try:
            self._scatter(ids_N, rows_NR)
        finally:
            self._forget_names()  # also names that were given during the write

    def reading(self, rows: int = 0) -> AbstractContextManager[Shards | None]:
        """The scope of one read straight from mapped memory.

            with store.reading(rows) as shards:

        `shards` are read-only arrays uint8 [n, row_bytes], of equal sizes except for the last. If
        the rows are not mapped, `shards` is None and nothing is counted. The memory stays mapped
        within the scope, even if the store is closed or reloaded. Leaving the scope checks that no
        memory was damaged, and counts a call of `rows` rows. After an exception it does neither.

        Args:
            rows: how many rows the caller reads, for `stats`.

        Raises:
            StoreError: on entering, if the store is closed; on leaving, if the memory could not
                be read.
            ShardTruncated: on leaving, if a file behind the memory was truncated.
        """
        return Reading(self, rows)

    def updating(
        self, rows: int = 0, ids: np.ndarray | None = None
    ) -> AbstractContextManager[Shards | None]:
        """The scope of one update of rows in place, the writable twin of `reading`.

            with store.updating(rows, ids) as shards:

        `shards` are writable arrays uint8 [n, row_bytes], of equal sizes except for the last. If
        the rows cannot be written in place, `shards` is None; use `gather` and `scatter` then. This
        happens if the rows are not mapped, if a cache keeps copies of them, or if `ids` is None and
        a sparse file has no disk space yet for some row. (Space is reserved before the first write,
        since a full disk would end the process.)

        The memory stays mapped within the scope, even if the store is closed or reloaded. The rows
        lose their names, as in `scatter`. Leaving the scope checks that no memory was damaged, and
        counts a call of `rows` rows, as the `gather` before a `scatter` would. After an exception
        it does neither. The thread that entered the scope has to leave it. Until then, other
        threads that write, seal or close the same table wait.

        Args:
            rows: how many rows the caller updates, for `stats`.
            ids: int64 [N], the rows that the caller may write: only their shards are marked as
                changed, and space is reserved for them alone. None if any row may be written.

        Raises:
            StoreError: on entering, if the store is closed or read-only, or the disk is full; on
                leaving, if the memory could not be read or written.
            RowOutOfRange: on entering, if an id is out of range.
            InputError: on entering, if dtype or shape of the ids are wrong.
            ShardTruncated: if a file behind the memory was truncated.
        """
        return Updating(self, rows, ids)

    @property
    def shards(self) -> Shards | None:
        """Deprecated: use `reading()`, which also checks the memory for damage."""
        warnings.warn(
            "store.shards is deprecated: use `with store.reading(rows) as shards:`, which keeps "
            "the memory mapped and checks it for damage",
            DeprecationWarning,
            stacklevel=2,
        )
        shards, pin = self._begin_read()
        self._end_read(pin, None, 0)
        return shards

    def close(self) -> None:
        """Releases files and memory; every later use raises StoreError. May be called again."""
        self._closed = True

    def __repr__(self) -> str:
        """Kind, place, layer, sizes, format, and whether the store is writable or closed."""
        info = self.info
        head = f"{info.kind} store"
        if info.path is not None:
            head += f" of {info.path}"
        elif self.in_memory:
            head += " in memory"
        if info.layer is not None:
            head += f", layer {info.layer}"
        facts = [f"{info.rows} rows of {info.row_bytes} bytes"]
        if info.format is not None:
            facts[0] += f" ({info.format.kind}, d = {info.format.d})"
        if info.reads is not None:
            facts.append(info.reads)
        facts.append("writable" if info.writable else "read-only")
        if self._closed:
            facts.append("closed")
        return f"<{head}: {', '.join(facts)}>"

    # What a store implements.

    @abstractmethod
    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        """Reads rows into `out_NR`. Both arguments have been checked."""

    @abstractmethod
    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        """Writes rows. The arguments have been checked, and the store is writable."""

    # What a store with mapped memory implements in addition.

    def _begin_read(self) -> tuple[Shards | None, Any]:
        """Enters `reading`. Returns its memory, and what `_end_read` needs.

        Raises StoreError if the store is closed.
        """
        self._check_open()
        return None, None

    def _end_read(self, pin: Any, rows: int | None, begun: int) -> None:
        """Leaves `reading`; the memory is still held. rows: None after an exception."""
        return  # nothing is mapped

    def _begin_update(self, ids_N: np.ndarray | None) -> tuple[Shards | None, Any]:
        """Enters `updating`. Returns its memory, and what `_end_update` needs.

        Raises StoreError if the store is closed or read-only, and RowOutOfRange or InputError if
        ids are invalid.
        """
        self._check_writable(ids_N)
        return None, None

    def _end_update(self, pin: Any, rows: int, begun: int, error: BaseException | None) -> None:
        """Leaves `updating`; the memory is still held. error: what was raised in the scope."""
        return  # nothing was given

    # Helpers of stores.

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self.info.name}: expected an open store, found it closed")

    def _check_writable(self, ids_N: np.ndarray | None) -> StoreInfo:
        """Raises unless these rows (None: any) may be written. Returns `info`."""
        self._check_open()
        info = self.info
        if not info.writable:
            raise StoreError(f"{info.name}: expected a store open for writing, found it read-only")
        if ids_N is not None:
            check_flat_ids(ids_N, info.rows)
        return info

    def _count_read(self, rows: int, begun: int) -> None:
        """Counts a call that began at `begun` (perf_counter_ns) and read `rows` rows."""
        self._counters.add_call(rows, begun)

    def _forget_names(self) -> None:
        """Removes the rows' names: the rows are about to change, or have changed."""
        if self.names is not None:
            self.names.forget()

    def _after_fork(self) -> None:
        """In a forked child: the threads that held locks are gone."""
        self._counters.after_fork()
        if self.names is not None:
            self.names.after_fork()


def copy_rows(source: RowStore, target: RowStore, chunk: int = 65_536) -> None:
    """Copies all rows of a store into another of the same size, in bounded memory.

    Args:
        source: the store to read.
        target: the store to write.
        chunk: rows that are copied at a time.

    Raises:
        InputError: if rows, row_bytes or (if both stores know it) the row format differ.
        StoreError: if the target is read-only.
    """
    info = source.info
    target_info = target.info
    if (info.rows, info.row_bytes) != (target_info.rows, target_info.row_bytes):
        raise InputError(
            f"copy_rows: expected a target of {info.rows} rows of {info.row_bytes} bytes, "
            f"found {target_info.rows} of {target_info.row_bytes}"
        )
    if None not in (info.format, target_info.format) and info.format != target_info.format:
        raise InputError(
            f"copy_rows: expected a target with rows of {info.format}, found {target_info.format}"
        )
    buffer_nR = np.empty((min(chunk, info.rows), info.row_bytes), np.uint8)
    for first in range(0, info.rows, chunk):
        ids_n = np.arange(first, min(first + chunk, info.rows), dtype=np.int64)
        target.scatter(ids_n, source.gather(ids_n, out=buffer_nR[: len(ids_n)]))
    name_copy(source, target)


_ALL: weakref.WeakSet[RowStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_ALL):
        store._after_fork()  # pyright: ignore[reportPrivateUsage]


os.register_at_fork(after_in_child=_after_fork)


def check_flat_ids(ids_N: np.ndarray, rows: int) -> None:
    check_array("row ids", ids_N, (None,), (np.int64,))
    check_ids(ids_N, rows)
