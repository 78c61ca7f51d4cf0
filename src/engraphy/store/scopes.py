"""Context managers for one read and for one update of a store's mapped memory.

They are classes, since a generator would take longer than reading a few rows.
"""

# pyright: reportPrivateUsage=false
# The scopes are parts of RowStore: they call its hooks.

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .base import RowStore

Shards = Sequence[np.ndarray]  # uint8 [n, row_bytes] each, of equal sizes except for the last


class Reading:
    """The scope of `RowStore.reading`."""

    __slots__ = ("_begun", "_pin", "_rows", "_shards", "_store")

    def __init__(self, store: RowStore, rows: int) -> None:
        self._store = store
        self._rows = rows

    def __enter__(self) -> Shards | None:
        self._begun = time.perf_counter_ns()
        self._shards, self._pin = self._store._begin_read()
        return self._shards

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        rows = self._rows if kind is None else None
        self._store._end_read(self._pin, rows, self._begun)
        self._shards = self._pin = None


class ReadingAll:
    """`Reading` for several stores at once. Gives a list with the shards of each store.

    For the few rows of a token: it makes no object per store, and takes the time once for all.
    """

    __slots__ = ("_begun", "_entered", "_rows", "_shards", "_stores")

    def __init__(self, stores: Iterable[RowStore], rows: int) -> None:
        """rows: how many rows of each store the caller reads."""
        self._stores = stores
        self._rows = rows

    def __enter__(self) -> list[Shards | None]:
        self._begun = time.perf_counter_ns()
        self._entered: list[tuple[RowStore, Any]] = []
        self._shards: list[Shards | None] = []
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
        rows = self._rows if kind is None else None
        first: BaseException | None = None
        for store, pin in self._entered:
            try:
                store._end_read(pin, rows, self._begun)
            except BaseException as damage:  # also leave the scopes of the other stores
                first = first or damage
        if first is not None:
            raise first


class Updating:
    """The scope of `RowStore.updating`."""

    __slots__ = ("_begun", "_ids", "_pin", "_rows", "_shards", "_store")

    def __init__(self, store: RowStore, rows: int, ids: np.ndarray | None) -> None:
        self._store = store
        self._rows = rows
        self._ids = ids

    def __enter__(self) -> Shards | None:
        self._begun = time.perf_counter_ns()
        self._shards, self._pin = self._store._begin_update(self._ids)
        return self._shards

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._store._end_update(self._pin, self._rows, self._begun, error)
        self._shards = self._pin = None
