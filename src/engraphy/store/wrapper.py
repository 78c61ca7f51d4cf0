"""Stores around another store. `WrapperStore` forwards everything; a subclass changes parts of it.

For example, a wrapper that logs its reads:

    class Counted(WrapperStore):
        def _gather(self, ids_N, out_NR):
            log(len(ids_N))
            super()._gather(ids_N, out_NR)
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np

from .base import RowStore, Shards, StoreInfo


class WrapperStore(RowStore):
    """A store that forwards everything to the store behind it, and owns it: closing closes both.

    A subclass that overrides `_gather` changes how rows are read. Mapped memory would bypass that,
    so `reading` then gives None, and `in_memory` and `tells_residency` are False. For the same
    reason `updating` gives None if a subclass overrides `_gather` or `_scatter`. To change this, a
    subclass also overrides `_begin_read`, `_begin_update` or these properties.

    `stats` counts the calls of the wrapper; the store behind it counts its own.

    Args:
        store: the store behind the wrapper.
    """

    _own_gather = False  # whether the class overrides `_gather`
    _own_scatter = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._own_gather = cls._gather is not WrapperStore._gather
        cls._own_scatter = cls._scatter is not WrapperStore._scatter

    def __init__(self, store: RowStore) -> None:
        super().__init__()
        self.inner = store

    @property
    def wrapped(self) -> RowStore:
        """The store behind the wrapper now."""
        return cast(RowStore, self.inner)

    @property
    def info(self) -> StoreInfo:
        return self.wrapped.info

    # Properties, not attributes, since a wrapper may exchange the store behind it.

    @property
    def in_memory(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self._own_gather and self.wrapped.in_memory

    @property
    def tells_residency(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self._own_gather and self.wrapped.tells_residency

    def close(self) -> None:
        super().close()
        self.wrapped.close()

    def __repr__(self) -> str:
        return f"<{self._title()} around {self.wrapped!r}>"

    def _title(self) -> str:
        """The wrapper's name in `repr`."""
        return type(self).__name__

    def _hold(self) -> Held:
        """The store for one call; the caller calls `end()` when it is done.

        A wrapper that exchanges its store keeps the held one open until then. Raises StoreError if
        the wrapper is closed.
        """
        self._check_open()
        return Held(self.wrapped)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        with self._hold() as store:
            store.gather(ids_N, out_NR)

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        with self._hold() as store:
            store.scatter(ids_N, rows_NR)

    def _begin_read(self) -> tuple[Shards | None, Any]:
        if self._own_gather:
            return super()._begin_read()
        held = self._hold()
        try:
            shards, pin = held.store._begin_read()
        except BaseException:
            held.end()
            raise
        return shards, _Scope(held, pin, shards is not None)

    def _end_read(self, pin: _Scope | None, rows: int | None, begun: int) -> None:
        if pin is None:
            return
        try:
            pin.held.store._end_read(pin.inner, rows, begun)
        finally:
            pin.held.end()
        if pin.is_mapped and rows is not None:
            self._count_read(rows, begun)

    def _begin_update(self, ids_N: np.ndarray | None) -> tuple[Shards | None, Any]:
        if self._own_gather or self._own_scatter:
            return super()._begin_update(ids_N)
        held = self._hold()
        try:
            shards, pin = held.store._begin_update(ids_N)
        except BaseException:
            held.end()
            raise
        return shards, _Scope(held, pin, shards is not None)

    def _end_update(
        self, pin: _Scope | None, rows: int, begun: int, error: BaseException | None
    ) -> None:
        if pin is None:
            return
        try:
            pin.held.store._end_update(pin.inner, rows, begun, error)
        finally:
            pin.held.end()
        if pin.is_mapped and error is None:
            self._count_read(rows, begun)


class Held:
    """The store that one call of a wrapper uses, until `end`."""

    def __init__(self, store: RowStore) -> None:
        self.store = store

    def __enter__(self) -> RowStore:
        return self.store

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends the call's use of the store."""


class _Scope(NamedTuple):
    """What a wrapper has to remember of a scope.

    Attributes:
        held: the store that the scope was opened on; the wrapper may have another one by now.
        inner: what that store has to remember.
        is_mapped: whether that store gave memory.
    """

    held: Held
    inner: Any
    is_mapped: bool
