"""Hot reload: a store whose table can be exchanged while it is read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from ..errors import ConfigError, DigestMismatch
from .base import RowStore
from .wrapper import Held, WrapperStore

_SAME = ("rows", "row_bytes", "format", "layer")


class ReloadableStore(WrapperStore):
    """Serves the rows of a store until `reload` replaces it with another one.

    It owns the store that it serves. `close` closes that store too, once the last call that reads
    it is done. Put a cache inside, around each table: `ReloadableStore(CacheStore(...))`.

    Args:
        store: the store to serve first.
    """

    def __init__(self, store: RowStore) -> None:
        super().__init__(store)
        self._switch = threading.Lock()
        self._readers = _Readers(store)

    def check(self, new: RowStore) -> None:
        """Checks that a store may replace the one that is served.

        Raises:
            DigestMismatch: if its address digest differs.
            ConfigError: if its rows, row_bytes, format or layer differ, or if it is the store that
                is served.
        """
        served = self.info
        info = new.info
        name = info.path or info.kind
        if served.address_digest != info.address_digest:
            raise DigestMismatch(
                f"reload: expected address digest {served.address_digest}, "
                f"found {info.address_digest} in {name}"
            )
        for field in _SAME:
            expected = getattr(served, field)
            value = getattr(info, field)
            if expected != value:
                raise ConfigError(f"reload, {field}: expected {expected}, found {value} in {name}")
        if new is self or new is self.inner:
            raise ConfigError(
                f"reload: expected another store, found the one that is served, {new!r}"
            )

    def reload(self, new: RowStore) -> None:
        """Serves another store from now on.

        The old store is closed when the last call that reads it is done. For the layers of one
        memory use `reload_layers`.

        Args:
            new: the store to serve. After an error the old store is still served, and the caller
                has to close `new`.

        Raises:
            DigestMismatch, ConfigError: as `check` does.
            StoreError: if this store is closed.
        """
        self.check(new)
        with self._switch:
            self._check_open()
            old = self._readers
            self.inner = new
            self._readers = _Readers(new)
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
            self._closed = True
        self._readers.retire()

    def _title(self) -> str:
        return "reloadable store"

    def _after_fork(self) -> None:
        super()._after_fork()
        self._switch = threading.Lock()
        self._readers = _Readers(self.wrapped)

    def _hold(self) -> Held:
        with self._switch:
            self._check_open()
            self._readers.begin()
            return self._readers


def reload_layers(stores: Mapping[int, ReloadableStore], new: Mapping[int, RowStore]) -> None:
    """Exchanges the stores of all layers, or of none: all checks come first.

    A batch that is read at the same time may get rows of both tables.

    Args:
        stores: the stores by layer.
        new: the new stores by layer.

    Raises:
        ConfigError: if the layers differ, or a store does not fit (`ReloadableStore.check`).
        DigestMismatch: if the new stores belong to different tables, or their address digest
            differs from the old one.
    """
    if set(stores) != set(new):
        raise ConfigError(f"reload: expected layers {sorted(stores)}, found {sorted(new)}")
    tables = {store.info.table_id for store in new.values()}
    if len(tables) > 1:
        raise DigestMismatch(
            f"reload: expected rows of one table, found {sorted(map(str, tables))}"
        )
    for layer, store in stores.items():
        store.check(new[layer])
    for layer, store in stores.items():
        store.reload(new[layer])


class _Readers(Held):
    """A store and the number of calls that read it. Once retired, it closes with the last call."""

    def __init__(self, store: RowStore) -> None:
        super().__init__(store)
        self._lock = threading.Lock()
        self._count = 0
        self._retired = False

    def begin(self) -> None:
        """Counts a call that reads the store until `end`."""
        with self._lock:
            self._count += 1

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            is_last = self._retired and self._count == 0
        if is_last:
            self.store.close()

    def retire(self) -> None:
        """Closes the store when the last call has ended; no new call may begin."""
        with self._lock:
            is_last = not self._retired and self._count == 0
            self._retired = True
        if is_last:
            self.store.close()
