"""Names of rows: by them, data that belongs to rows can be checked against the rows of a store.

The table_id is the name of a sealed table's rows. A write removes all names. Rows without a name
get a random one when they are asked for it, so a write costs nothing.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import RowStore

_MOST = 4  # names that are kept: each save of the rows adds one


class RowNames:
    """Names of a store's rows as they are now; no other rows have them. Safe for many threads."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = list(names)
        self._lock = threading.Lock()

    @property
    def known(self) -> list[str]:
        """The names, oldest first; empty if the rows have none."""
        with self._lock:
            return list(self._names)

    @property
    def now(self) -> list[str]:
        """The names, oldest first; rows without a name get one."""
        with self._lock:
            if not self._names:
                self._names = [secrets.token_hex(16)]
            return list(self._names)

    def add(self, name: str) -> None:
        """Adds the name of rows elsewhere that were written from these."""
        with self._lock:
            self._names = _few([*self._names, name])

    def adopt(self, names: Iterable[str]) -> None:
        """Adds the names of rows elsewhere that these were read from."""
        with self._lock:
            self._names = _few([*names, *self._names])

    def set(self, names: Iterable[str]) -> None:
        """Replaces the names: all rows are those of these names now."""
        with self._lock:
            self._names = list(names)

    def forget(self) -> None:
        """Removes all names: the rows are about to change, or have changed."""
        with self._lock:
            self._names = []

    def after_fork(self) -> None:
        """In a forked child: the thread that held the lock is gone."""
        self._lock = threading.Lock()


def follow(store: RowStore, first: str | None = None) -> RowNames:
    """Follows the names of a store's rows from now on.

    Args:
        store: the store, or a wrapper around it.
        first: the name of rows that are known. A sealed table has its table_id besides
            (`names_of`).

    Returns:
        The names, which writes to the store remove.
    """
    store = _innermost(store)
    if store.names is None:
        info = store.info
        table = getattr(store, "table", None)
        if first is None and info.writable and table is not None and not table.changed:
            first = info.table_id
        store.names = RowNames([] if first is None else [first])
    return store.names


def names_of(store: RowStore) -> list[str]:
    """All names of a store's rows as they are now."""
    info = store.info
    names = follow(store)
    if info.table_id is None or info.writable:
        return names.now
    return [info.table_id, *names.known]


def name_copy(source: RowStore, target: RowStore) -> None:
    """Gives `target` the names of `source`, whose rows it has now, if names are followed at all."""
    if _innermost(source).names is not None or _innermost(target).names is not None:
        follow(target).set(names_of(source))


def _innermost(store: RowStore) -> RowStore:
    while store.inner is not None:
        store = store.inner
    return store


def _few(names: Iterable[str]) -> list[str]:
    """The first name, which all copies from one start share, and the last ones."""
    distinct = list(dict.fromkeys(names))
    return distinct[:1] + distinct[1:][1 - _MOST :]
