"""Names of rows: what belongs to the rows of a store can tell by them that they are others now.

The rows of a sealed table are named by its table_id. A write takes away all names; rows that have
none get a random one when they are asked for it, so a write costs nothing.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import RowStore

_MOST = 4  # names that are kept: each save of the rows gives them one more


class RowNames:
    """Names of a store's rows as they are now, which no other rows have. Safe for many threads."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = list(names)
        self._lock = threading.Lock()

    @property
    def known(self) -> list[str]:
        """The names that there are, oldest first."""
        with self._lock:
            return list(self._names)

    @property
    def now(self) -> list[str]:
        """The same; rows without a name get one."""
        with self._lock:
            if not self._names:
                self._names = [secrets.token_hex(16)]
            return list(self._names)

    def add(self, name: str) -> None:
        """Rows elsewhere, which were written from these, have this name."""
        with self._lock:
            self._names = _few([*self._names, name])

    def adopt(self, names: Iterable[str]) -> None:
        """Rows elsewhere, of which these were read, have these names."""
        with self._lock:
            self._names = _few([*names, *self._names])

    def set(self, names: Iterable[str]) -> None:
        """The rows are, from the first to the last, those of these names."""
        with self._lock:
            self._names = list(names)

    def forget(self) -> None:
        """The rows are about to change, or have changed."""
        with self._lock:
            self._names = []

    def after_fork(self) -> None:
        """In a forked child the thread is gone that held the lock."""
        self._lock = threading.Lock()


def follow(store: RowStore, first: str | None = None) -> RowNames:
    """The names that the rows of `store` have been given, followed from now on.

    first: the name of rows that are known. A sealed table has its table_id beside them
    (`names_of`).
    """
    store = _innermost(store)
    if store.names is None:
        info, table = store.info, getattr(store, "table", None)
        if first is None and info.writable and table is not None and not table.changed:
            first = info.table_id
        store.names = RowNames([] if first is None else [first])
    return store.names


def names_of(store: RowStore) -> list[str]:
    """All names of a store's rows as they are now."""
    info, names = store.info, follow(store)
    if info.table_id is None or info.writable:
        return names.now
    return [info.table_id, *names.known]


def name_copy(source: RowStore, target: RowStore) -> None:
    """All rows of `target` are those of `source` now; for rows whose names somebody follows."""
    if _innermost(source).names is not None or _innermost(target).names is not None:
        follow(target).set(names_of(source))


def _innermost(store: RowStore) -> RowStore:
    while store.inner is not None:
        store = store.inner
    return store


def _few(names: Iterable[str]) -> list[str]:
    """The first, which all copies have that go on from one start, and the last ones."""
    distinct = list(dict.fromkeys(names))
    return distinct[:1] + distinct[1:][1 - _MOST :]
