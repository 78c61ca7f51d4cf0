"""What a SequenceState keeps: the last ids of each sequence, and of each layer the last inputs of
its conv.

Both are buffers of columns, one a position, with room behind what is kept, so that a decoded token
is written and nothing is moved. A column may be absent in some sequences (a hole in a mask): it
stays a column, since tokens are taken back by columns, and is passed over by what is read. Columns
that are too old to be taken back are kept without holes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from .. import _native
from ..fusion.decode import Columns

ABSENT = -2  # the id of a column that is no token of the sequence; a dead token has -1


class Past:
    """The last ids of each sequence and where documents began: the columns before `end` of two
    buffers."""

    def __init__(self, batch: int):
        self.end = 0
        self.ids = np.empty((batch, 0), dtype=np.int64)  # [B, columns]
        self.starts = np.empty((batch, 0), dtype=bool)
        self.marked = False  # whether a start was ever written: else none has to be taken away
        self.holes = False  # whether a column was ever absent
        self.clear = 0  # from this column on no document begins and nothing is absent

    def append(
        self, ids: np.ndarray, starts: np.ndarray | None, holes: bool, look_back: int, margin: int
    ) -> None:
        """Add columns. holes: some of `ids` may be ABSENT. look_back: ids that are read; margin:
        columns that may be taken back."""
        self.holes = self.holes or holes
        self.marked = self.marked or starts is not None
        if not self.holes:
            ids, starts = _last(ids, look_back + margin), _last(starts, look_back + margin)
        count = ids.shape[1]
        if self.end + count > self.ids.shape[1]:
            ids, starts = self._make_room(ids, starts, look_back, margin)
        first, self.end = self.end, self.end + ids.shape[1]
        self.ids[:, first : self.end] = ids
        if self.marked:
            self.starts[:, first : self.end] = False if starts is None else starts
        if starts is not None or holes:
            self.clear = self.end

    def columns(self, count: int) -> Columns | None:
        """The `count` before the next id, and where that goes; None where only `append` will do."""
        ids, first = self.ids, self.end - count
        if (
            first < self.clear or self.end == ids.shape[1] or not ids.flags.writeable
        ):  # a view of what was pickled
            return None
        begin = _native.core.address(ids)
        return Columns(begin + first * 8, begin + self.end * 8, ids.shape[1])

    def advance(self) -> None:
        """The next column of ids has been written."""
        if self.marked:
            self.starts[:, self.end] = False
        self.end += 1

    def _make_room(
        self, ids: np.ndarray, starts: np.ndarray | None, look_back: int, margin: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Move what is kept to new buffers that have room. Returns the columns that are still to be
        written there."""
        count, keep = ids.shape[1], look_back + margin
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
        """To new buffers, the last `kept` columns and room for more."""
        buffers = []
        for old in (self.ids, self.starts):
            new = np.zeros((len(old), kept + room), old.dtype)
            new[:, :kept] = old[:, self.end - kept : self.end]
            buffers.append(new)
        self.ids, self.starts = buffers
        self.clear = max(self.clear - (self.end - kept), 0)
        self.end = kept

    def last(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The last columns that are not absent, as many of `count` as there are, or -1 in front of
        them."""
        first = max(self.end - count, 0)
        ids, starts = self.ids[:, first : self.end], self.starts[:, first : self.end]
        if not self.holes or not (ids == ABSENT).any():
            return ids, starts
        index = last_present(self.ids[:, : self.end] != ABSENT, count)
        return taken(self.ids, index, -1), taken(self.starts, index, False)

    def take(self, index: np.ndarray) -> None:
        self.ids, self.starts = self.ids[index], self.starts[index]

    def clone(self) -> Past:
        other = copy.copy(self)
        other.ids, other.starts = self.ids.copy(), self.starts.copy()
        return other

    @classmethod
    def join(cls, pasts: Sequence[Past]) -> Past:
        """All their sequences, of which the shorter ones begin with absent columns."""
        joined = cls(sum(len(past.ids) for past in pasts))
        joined.end = joined.clear = max(past.end for past in pasts)
        joined.holes = joined.marked = True
        joined.ids = np.concatenate(
            [_padded(past.ids[:, : past.end], joined.end, ABSENT) for past in pasts]
        )
        joined.starts = np.concatenate(
            [_padded(past.starts[:, : past.end], joined.end, False) for past in pasts]
        )
        return joined


class _Place(NamedTuple):
    """What a buffer of conv inputs is: sequences, values of one column of all of them, bytes
    between columns; asking it takes longer."""

    batch: int
    values: int
    dtype: torch.dtype
    cpu: bool
    inference: bool
    address: int
    column: int
    stride: int


class Window:
    """The last conv inputs of one layer: the columns before `end` of a buffer, in front of them
    `size` zeros.

    A decoding step writes one column; where the buffer is full, what is kept moves to a new one
    with room behind it.
    """

    def __init__(self, size: int, margin: int):
        self.size, self.margin, self.keep = size, margin, size + margin
        self.ahead: list[
            int
        ] = []  # lengths of the chunks whose ids are known and whose inputs are still to come
        self.end = size
        self.inputs: Tensor | None = None  # [B, columns, S, D]
        self.place: _Place | None = None  # of inputs
        self.starts = np.zeros((0, 0), dtype=bool)  # [B, columns]
        self.absent = np.zeros((0, 0), dtype=bool)
        self.holes = False  # whether a column was ever absent
        self.clear = 0  # from this column on no document begins and nothing is absent

    def expect(self, tokens: int) -> None:
        if tokens and self.size:
            self.ahead.append(tokens)

    def append(self, inputs: Tensor, starts: np.ndarray | None, absent: np.ndarray | None) -> None:
        if not inputs.shape[1]:
            return
        self.ahead.pop(0)
        self.holes = self.holes or absent is not None
        if not self.holes:
            inputs, starts = inputs[:, -self.keep :], _last(starts, self.keep)
        end = self.end + inputs.shape[1]
        if self.inputs is None or end > self.inputs.shape[1] or self._foreign(inputs):
            if self.holes:
                self._compact(inputs, starts, absent)
                return
            self._move(inputs)
            end = self.end + inputs.shape[1]
        assert self.inputs is not None
        self.inputs.narrow(1, self.end, inputs.shape[1]).copy_(inputs)
        self.starts[:, self.end : end] = False if starts is None else starts
        self.absent[:, self.end : end] = False if absent is None else absent
        self.end = end
        if starts is not None and starts.any() or absent is not None:
            self.clear = end

    def columns(self, x: Tensor) -> Columns | None:
        first = self.end - self.size
        buffer = self.inputs
        if buffer is not None and (
            self.place is None or self.place.address != buffer.data_ptr()
        ):  # deepcopy
            self.place = _Place(
                len(buffer),
                buffer[:, 0].numel(),
                buffer.dtype,
                buffer.is_cpu,
                buffer.is_inference(),
                buffer.data_ptr(),
                buffer.stride(1) * buffer.itemsize,
                buffer.stride(0),
            )
        at = self.place
        if (
            at is None
            or len(x) != at.batch
            or x.numel() != at.values
            or not at.cpu
            or torch.promote_types(x.dtype, torch.float32) is not at.dtype
            or self.ahead[:1] != [1]
            or self.end == self.starts.shape[1]
            or first < self.clear
            or at.inference
            and not torch.is_inference_mode_enabled()
        ):
            return None
        return Columns(at.address + first * at.column, at.address + self.end * at.column, at.stride)

    def advance(self) -> None:
        self.ahead.pop(0)
        if self.clear:
            self.starts[:, self.end] = self.absent[:, self.end] = False
        self.end += 1

    def _foreign(self, inputs: Tensor) -> bool:
        """Whether the buffer cannot be written to as it is: another dtype, or made in inference
        mode and used after."""
        assert self.inputs is not None
        return (
            inputs.dtype != self.inputs.dtype
            or self.inputs.is_inference()
            and not torch.is_inference_mode_enabled()
        )

    def _move(self, inputs: Tensor) -> None:
        """To a new buffer that has room for these inputs."""
        kept = min(self.end, self.keep - inputs.shape[1])
        columns = kept + inputs.shape[1] + self.keep // 4 + 1
        buffer, starts, absent = self._new(inputs, columns)
        if self.inputs is not None:
            buffer[:, :kept] = self.inputs[:, self.end - kept : self.end]
            starts[:, :kept] = self.starts[:, self.end - kept : self.end]
        self.inputs, self.place, self.starts, self.absent = buffer, None, starts, absent
        self.clear = max(self.clear - (self.end - kept), 0)
        self.end = kept

    def _compact(
        self, inputs: Tensor, starts: np.ndarray | None, absent: np.ndarray | None
    ) -> None:
        """To a new buffer that ends with these inputs, what is too old to be taken back without its
        holes."""
        nothing = np.zeros(tuple(inputs.shape[:2]), dtype=bool)
        old, old_starts, old_absent = self._new(inputs, self.end)
        if self.inputs is not None:
            old[:] = self.inputs[:, : self.end]
            old_starts[:], old_absent[:] = self.starts[:, : self.end], self.absent[:, : self.end]
        all_starts = np.concatenate([old_starts, nothing if starts is None else starts], axis=1)
        all_absent = np.concatenate([old_absent, nothing if absent is None else absent], axis=1)
        index = kept_columns(~all_absent, self.size, self.margin)
        kept, columns = index.shape[1], index.shape[1] + self.keep // 4 + 1
        self.inputs, self.starts, self.absent = self._new(old, columns)
        self.inputs[:, :kept] = _taken_inputs(torch.cat([old, inputs.to(old.dtype)], dim=1), index)
        self.starts[:, :kept] = taken(all_starts, index, False)
        self.absent[:, :kept] = taken(all_absent, index, True)
        self.place, self.end, self.clear = None, kept, kept

    def _new(self, inputs: Tensor, columns: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Zeros: a buffer of `columns` for inputs like these, starts and absences of its columns."""
        dtype = (
            inputs.dtype
            if self.inputs is None
            else torch.promote_types(inputs.dtype, self.inputs.dtype)
        )
        buffer = inputs.new_zeros(len(inputs), columns, *inputs.shape[2:], dtype=dtype)
        return (
            buffer,
            np.zeros((len(inputs), columns), dtype=bool),
            np.zeros((len(inputs), columns), dtype=bool),
        )

    def read(self) -> Tensor | None:
        if self.inputs is None:
            return None
        first = self.end - self.size
        window, starts = self.inputs.narrow(1, first, self.size), self.starts[:, first : self.end]
        if self.holes and self.absent[:, first : self.end].any():
            index = last_present(~self.absent[:, : self.end], self.size)
            window, starts = _taken_inputs(self.inputs, index), taken(self.starts, index, False)
        if not starts.any():
            return window
        seen = torch.from_numpy(since_start(starts)).to(window.device)
        return torch.where(seen[:, :, None, None], window, 0.0)

    def crop(self, tokens: int) -> None:
        while tokens and self.ahead:
            length = self.ahead.pop()
            if length > tokens:
                self.ahead.append(length - tokens)
            tokens = max(tokens - length, 0)
        if self.size:
            self.end -= tokens

    def take(self, index: np.ndarray) -> None:
        if self.inputs is not None:
            self.place = None
            self.inputs = self.inputs.index_select(
                0, torch.from_numpy(index).to(self.inputs.device)
            )
            self.starts, self.absent = self.starts[index], self.absent[index]

    def to(self, device: torch.device | str) -> None:
        if self.inputs is not None:
            self.inputs, self.place = self.inputs.to(device), None

    def clone(self) -> Window:
        other = copy.copy(self)
        other.ahead, other.starts, other.absent = (
            list(self.ahead),
            self.starts.copy(),
            self.absent.copy(),
        )
        other.inputs, other.place = None if self.inputs is None else self.inputs.clone(), None
        return other

    @classmethod
    def join(cls, windows: Sequence[Window], batches: Sequence[int]) -> Window:
        """The inputs of all their sequences, of which the shorter ones begin with absent columns."""
        joined = cls(windows[0].size, windows[0].margin)
        filled = [window.inputs for window in windows if window.inputs is not None]
        if not filled:
            return joined
        end = max(window.end for window in windows)
        dtype = functools.reduce(torch.promote_types, (inputs.dtype for inputs in filled))
        joined.inputs = filled[0].new_zeros(sum(batches), end, *filled[0].shape[2:], dtype=dtype)
        joined.starts = np.zeros((sum(batches), end), dtype=bool)
        joined.absent = np.ones((sum(batches), end), dtype=bool)
        joined.end = joined.clear = end
        joined.holes = True
        first = 0
        for window, batch in zip(windows, batches, strict=True):
            part = slice(first, first + batch), slice(end - window.end, end)
            if window.inputs is not None:
                joined.inputs[part] = window.inputs[:, : window.end].to(joined.inputs.device)
                joined.starts[part], joined.absent[part] = (
                    window.starts[:, : window.end],
                    window.absent[:, : window.end],
                )
            first += batch
        return joined


def kept_columns(present_Bn: np.ndarray, look_back: int, margin: int) -> np.ndarray:
    """int64 [B, columns]: the columns to keep. The last `margin` are kept as they are, since they
    may be taken back; before them the last `look_back` that are present, -1 where there are fewer.
    """
    batch, count = present_Bn.shape
    recent = max(count - margin, 0)
    older = last_present(present_Bn[:, :recent], look_back)
    return np.concatenate([older, np.tile(np.arange(recent, count), (batch, 1))], axis=1)


def last_present(present_Bn: np.ndarray, count: int) -> np.ndarray:
    """int64 [B, count]: the last columns that are present, in order; -1 in front where there are
    fewer."""
    order = np.argsort(present_Bn, axis=1, kind="stable")  # absent ones first
    order = np.where(np.take_along_axis(present_Bn, order, axis=1), order, -1)
    missing = max(count - order.shape[1], 0)
    return np.pad(_last(order, count), ((0, 0), (missing, 0)), constant_values=-1)


def taken(values_Bn: np.ndarray, index_BK: np.ndarray, nothing: int) -> np.ndarray:
    """[B, K]: the columns of `index_BK`, `nothing` where it is -1."""
    if not values_Bn.shape[1]:
        return np.full(index_BK.shape, nothing, values_Bn.dtype)
    found = np.take_along_axis(values_Bn, np.maximum(index_BK, 0), axis=1)
    return np.where(index_BK < 0, np.asarray(nothing, values_Bn.dtype), found)


def _taken_inputs(inputs_BnSD: Tensor, index_BK: np.ndarray) -> Tensor:
    index = torch.from_numpy(index_BK).to(inputs_BnSD.device)
    sequence = torch.arange(len(index), device=index.device)[:, None]
    found_BKSD = inputs_BnSD[sequence, index.clamp_min(0)]
    return torch.where((index < 0)[:, :, None, None], 0.0, found_BKSD)


def _padded(values_Bn: np.ndarray, columns: int, fill: int) -> np.ndarray:
    missing = columns - values_Bn.shape[1]
    return np.pad(values_Bn, ((0, 0), (missing, 0)), constant_values=fill)


def since_start(starts_Bn: np.ndarray) -> np.ndarray:
    """bool [B, n]: no later position begins a document."""
    from_here = np.cumsum(starts_Bn[:, ::-1], axis=1)[:, ::-1]
    return from_here == starts_Bn


@overload
def _last(values_Bn: np.ndarray, count: int) -> np.ndarray: ...
@overload
def _last(values_Bn: None, count: int) -> None: ...
def _last(values_Bn: np.ndarray | None, count: int) -> np.ndarray | None:
    return None if values_Bn is None else values_Bn[:, max(values_Bn.shape[1] - count, 0) :]
