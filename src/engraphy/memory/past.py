"""The ids that a SequenceState keeps: the last ones of each sequence.

The ids are columns of a buffer, one per position. The buffer has room behind them, so that a
decoded token is written without moving anything. A column may be absent in some sequences (a hole
in a mask). It stays in the buffer, since `crop` takes back whole columns, but reading skips it.
Columns that are too old to be taken back are kept without holes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from .. import _native
from .columns import CursorColumns, kept_columns, last, last_present, padded, taken

ABSENT = -2  # the id of a column that is no token of the sequence; a dead token has -1


class Past:
    """The last ids and document starts of each sequence, in the columns before `end`."""

    def __init__(self, batch: int):
        self.end = 0
        self.ids = np.empty((batch, 0), dtype=np.int64)  # [B, columns]
        self.starts = np.empty((batch, 0), dtype=bool)  # [B, columns]
        self.marked = False  # whether a start was ever written; until then `starts` is not updated
        self.holes = False  # whether a column was ever absent
        self.clear = 0  # from this column on no document begins and nothing is absent

    def append(
        self, ids: np.ndarray, starts: np.ndarray | None, holes: bool, look_back: int, margin: int
    ) -> None:
        """Adds columns.

        Args:
            ids: int64 [B, T].
            starts: bool [B, T]; None = no document begins.
            holes: whether some of `ids` may be ABSENT.
            look_back: the most ids that `last` has to return.
            margin: columns that may be taken back.
        """
        self.holes = self.holes or holes
        self.marked = self.marked or starts is not None
        if not self.holes:
            ids = last(ids, look_back + margin)
            starts = last(starts, look_back + margin)
        if self.end + ids.shape[1] > self.ids.shape[1]:
            ids, starts = self._make_room(ids, starts, look_back, margin)
        first = self.end
        self.end = first + ids.shape[1]
        self.ids[:, first : self.end] = ids
        if self.marked:
            self.starts[:, first : self.end] = False if starts is None else starts
        if starts is not None or holes:
            self.clear = self.end

    def cursor_columns(self, count: int) -> CursorColumns | None:
        """The `count` ids before the next one, and those that can be written behind them.

        Returns None if the next id has to go through `append`.
        """
        ids = self.ids
        first = self.end - count
        room = ids.shape[1] - self.end
        if first < self.clear or not room:
            return None
        if not ids.flags.writeable:  # it was unpickled as a view
            return None
        begin = _native.compiled().address(ids)
        oldest = begin + first * ids.itemsize
        following = begin + self.end * ids.itemsize
        return CursorColumns(oldest, following, ids.shape[1], ids.itemsize, room, 1, False)

    def advance(self, tokens: int) -> None:
        """Counts the next columns, whose ids have been written by address."""
        if self.marked:
            self.starts[:, self.end : self.end + tokens] = False
        self.end += tokens

    def _make_room(
        self, ids: np.ndarray, starts: np.ndarray | None, look_back: int, margin: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Moves the columns that are kept to new buffers that have room.

        Returns the ids and starts that are still to be written there.
        """
        count = ids.shape[1]
        keep = look_back + margin
        if not self.holes:
            self._move(min(self.end, keep - count), count + keep)
            return ids, starts
        if starts is None:
            starts = np.zeros(ids.shape, dtype=bool)
        all_ids = np.concatenate([self.ids[:, : self.end], ids], axis=1)
        all_starts = np.concatenate([self.starts[:, : self.end], starts], axis=1)
        index = kept_columns(all_ids != ABSENT, look_back, margin)
        self.end = self.clear = 0
        self.ids = np.zeros((len(ids), index.shape[1] + keep), np.int64)
        self.starts = np.zeros(self.ids.shape, dtype=bool)
        self.marked = True
        return taken(all_ids, index, ABSENT), taken(all_starts, index, False)

    def _move(self, kept: int, room: int) -> None:
        """Moves the last `kept` columns to new buffers with room for `room` more."""
        first = self.end - kept
        ids = np.zeros((len(self.ids), kept + room), np.int64)
        starts = np.zeros(ids.shape, dtype=bool)
        ids[:, :kept] = self.ids[:, first : self.end]
        starts[:, :kept] = self.starts[:, first : self.end]
        self.ids = ids
        self.starts = starts
        self.clear = max(self.clear - first, 0)
        self.end = kept

    def last(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and starts of the last columns that are not absent.

        Returns `count` columns, with -1 in front if a sequence has fewer ids. If no column is
        absent, returns fewer columns instead.
        """
        first = max(self.end - count, 0)
        ids = self.ids[:, first : self.end]
        if not self.holes or not (ids == ABSENT).any():
            return ids, self.starts[:, first : self.end]
        index = last_present(self.ids[:, : self.end] != ABSENT, count)
        return taken(self.ids, index, -1), taken(self.starts, index, False)

    def take(self, index: np.ndarray) -> None:
        """Keeps the sequences of `index`, int64 [n], in its order."""
        self.ids = self.ids[index]
        self.starts = self.starts[index]

    def clone(self) -> Past:
        """An independent copy."""
        other = copy.copy(self)
        other.ids = self.ids.copy()
        other.starts = self.starts.copy()
        return other

    @classmethod
    def join(cls, pasts: Sequence[Past]) -> Past:
        """The sequences of all `pasts`; the shorter ones begin with absent columns."""
        joined = cls(sum(len(past.ids) for past in pasts))
        joined.end = joined.clear = max(past.end for past in pasts)
        joined.holes = joined.marked = True
        ids = [padded(past.ids[:, : past.end], joined.end, ABSENT) for past in pasts]
        starts = [padded(past.starts[:, : past.end], joined.end, False) for past in pasts]
        joined.ids = np.concatenate(ids)
        joined.starts = np.concatenate(starts)
        return joined
