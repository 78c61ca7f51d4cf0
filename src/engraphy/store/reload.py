"""A store whose table is exchanged while it is read: hot reload."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DigestMismatch
from .base import RowStore, StoreInfo

_SAME = ("rows", "row_bytes", "format", "layer")


class ReloadableStore(RowStore):
    """The rows of `store`, until `reload` puts another in its place. Owns the store that is served:
    closing closes it.

    A cache belongs inside, around each table: `ReloadableStore(CacheStore(...))`.
    """

    def __init__(self, store: RowStore) -> None:
        super().__init__()
        self._switch = threading.Lock()
        self._serve(store)

    def _serve(self, store: RowStore) -> None:
        self.inner: RowStore = store
        self.in_memory, self.tells_residency = store.in_memory, store.tells_residency
        self._readers = _Readers(store)

    @property
    def info(self) -> StoreInfo:
        return self.inner.info

    def check(self, new: RowStore) -> None:
        """Raise DigestMismatch unless `new` is addressed like the store that is served, ConfigError
        unless it has as many rows, of the same size and format, of the same layer, and is another
        one."""
        ours, theirs = self.info, new.info
        if ours.address_digest != theirs.address_digest:
            raise DigestMismatch(
                f"reload: expected address digest {ours.address_digest}, {theirs.path or theirs.kind} "
                f"has {theirs.address_digest}"
            )
        for name in _SAME:
            if getattr(ours, name) != getattr(theirs, name):
                raise ConfigError(
                    f"reload, {name}: expected {getattr(ours, name)}, "
                    f"{theirs.path or theirs.kind} has {getattr(theirs, name)}"
                )
        if new is self or new is self.inner:
            raise ConfigError(
                f"reload: expected another store, found the one that is served, {new!r}"
            )

    def reload(self, new: RowStore) -> None:
        """Serve `new` from now on. The old store is closed when the last call that reads it is
        done.

        For the layers of one memory use `reload_layers`. Raises what `check` raises, StoreError
        once closed: the old store stays then, and `new` is the caller's to close.
        """
        self.check(new)
        with self._switch:
            self._check_open()
            old = self._readers
            self._serve(new)
        logging.getLogger("engraphy").info(
            "layer %s: table %s instead of %s, %r",
            new.info.layer,
            new.info.table_id,
            old.store.info.table_id,
            new,
        )
        old.retire()

    def close(self) -> None:
        with self._switch:
            super().close()
        self._readers.retire()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._switch = threading.Lock()
        self._readers = _Readers(self.inner)

    def _pinned(self) -> _Readers:
        """The store that is served, which is not closed until the scope of what is returned is
        left."""
        with self._switch:
            self._check_open()
            self._readers.begin()
            return self._readers

    def _begin_read(self) -> tuple[Sequence[np.ndarray] | None, Any]:
        readers = self._pinned()
        try:
            shards, pin = readers.store._begin_read()
        except BaseException:
            readers.end()
            raise
        return shards, (readers, pin, shards is not None)

    def _end_read(self, pin: Any, rows: int | None, begun: int) -> None:
        readers, inner, mapped = pin  # of the store that was read, whatever is served now
        try:
            readers.store._end_read(inner, rows, begun)
        finally:
            readers.end()
        if mapped and rows is not None:
            self._count_read(rows, begun)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        with self._pinned() as store:
            store.gather(ids_N, out_NR)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        with self._pinned() as store:
            store.scatter(ids_N, rows_NR)


def reload_layers(stores: Mapping[int, ReloadableStore], new: Mapping[int, RowStore]) -> None:
    """Exchange the stores of all layers, or of none: everything is checked first. A batch that is
    being read meanwhile may see both tables.

    Raises what `ReloadableStore.check` raises; ConfigError where layers are missing, DigestMismatch
    where the new stores are not of one table.
    """
    if set(stores) != set(new):
        raise ConfigError(f"reload: expected layers {sorted(stores)}, found {sorted(new)}")
    if len(tables := {store.info.table_id for store in new.values()}) > 1:
        raise DigestMismatch(
            f"reload: expected rows of one table, found {sorted(map(str, tables))}"
        )
    for layer, store in stores.items():
        store.check(new[layer])
    for layer, store in stores.items():
        store.reload(new[layer])


class _Readers:
    """A store, and how many calls are reading it; it is closed when it is retired and none is."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._count, self._retired = 0, False

    def begin(self) -> None:
        with self._lock:
            self._count += 1

    def __enter__(self) -> RowStore:
        return self.store

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._retired and self._count == 0
        if last:
            self.store.close()

    def retire(self) -> None:
        with self._lock:
            last = not self._retired and self._count == 0
            self._retired = True
        if last:
            self.store.close()
