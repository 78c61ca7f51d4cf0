"""Stores whose rows lie in memory that can be addressed: `MappedStore`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from ..rows.read import by_shard, gather_mapped
from .base import RowStore, Shards
from .mapping import Watch


class MappedStore(RowStore):
    """A store over memory: uint8 [n, row_bytes] arrays, equal sizes but the last.

    A subclass implements `info`. If it is writable and its writes need more than the memory, it
    overrides `_writing` as well.

    Attributes:
        pinned: the read-only shards, which stay mapped while the caller has them; none once
            closed, or in doubt. For a call that checks by itself that the files were whole
            (`ends_of`); `check_memory` is for a call that could not.
    """

    def __init__(self, memory: Shards, watch: Watch | None = None) -> None:
        """watch: checks the files behind the memory before and after each use."""
        super().__init__()
        self._watch = watch
        self._memory = tuple(memory)
        self._readonly: Shards = tuple(shard.view() for shard in memory)
        for shard in self._readonly:
            shard.flags.writeable = False
        self.pinned = self._readonly

    def close(self) -> None:
        super().close()
        # Memory is unmapped when the last array over it dies, so a reader in another thread
        # finishes undisturbed.
        self._memory = ()
        self._readonly = ()
        self.pinned = ()

    def _begin_read(self) -> tuple[Shards, None]:
        # Taken before the check: closing marks the store first and lets go of the memory then.
        shards = self._readonly
        if self._closed:
            self._check_open()
        if self._watch is not None:
            self._watch.before()
        return shards, None

    def check_memory(self) -> None:
        """Raises StoreError or ShardTruncated if memory that was read was damaged."""
        if self._watch is not None:
            self._watch.after()

    def count_token(self, rows: int, taken: int) -> None:
        """Counts a read of a few rows from `pinned`, which took so many nanoseconds."""
        self._counters.add_token(rows, taken)

    @property
    def is_plain(self) -> bool:
        """Whether `reading` gives `pinned`, and nothing of its own is done around it."""
        kind = type(self)
        return (
            kind._begin_read is MappedStore._begin_read and kind._end_read is MappedStore._end_read
        )

    def _end_read(self, pin: Any, rows: int | None, begun: int) -> None:
        if rows is None:
            return
        if self._watch is not None:
            self._watch.after()
        self._count_read(rows, begun)

    def _begin_update(self, ids_N: np.ndarray | None) -> tuple[Shards | None, Any]:
        memory = self._memory  # before the check, as in `_begin_read`
        self._check_writable(ids_N)
        if ids_N is None and not self._has_space():
            return None, None
        scope = self._writing(ids_N)
        scope.__enter__()
        self._forget_names()
        return memory, scope

    def _end_update(self, pin: Any, rows: int, begun: int, error: BaseException | None) -> None:
        if pin is None:  # no memory was given
            return
        scope: AbstractContextManager[None] = pin
        try:
            if error is None:
                scope.__exit__(None, None, None)
            else:
                scope.__exit__(type(error), error, error.__traceback__)
        finally:
            self._forget_names()  # names that the rows were given within the scope
        if error is None:
            self._count_read(rows, begun)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        shards, _ = self._begin_read()
        gather_mapped(shards, self.info, ids_N, out_NR, waits=not self.in_memory)
        if self._watch is not None:
            self._watch.after()

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        memory = self._memory
        self._check_open()
        if not len(ids_N):
            return
        with self._writing(ids_N):
            for shard, local_n, where in by_shard(memory, ids_N):
                shard[local_n] = rows_NR[where]

    def _has_space(self) -> bool:
        """Whether each row can be written without reserving space for it."""
        return True

    def _writing(self, ids_N: np.ndarray | None) -> AbstractContextManager[None]:
        """The scope in which rows are written; ids_N: int64 [N], which; None: any.

        Raises on entering if they cannot be written, on leaving if the memory was damaged.
        """
        return nullcontext() if self._watch is None else _watched(self._watch)


@contextmanager
def _watched(watch: Watch) -> Generator[None, None, None]:
    watch.before()
    yield
    watch.after()
