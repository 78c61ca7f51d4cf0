"""The conv inputs that a SequenceState keeps: the last ones of one layer.

The inputs are columns of a buffer, as ids are (past.py). A decoding step writes one column. If the
buffer is full, the columns that are still needed move to a new buffer with room behind them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..fusion.decode import Columns
from .columns import (
    CursorColumns,
    kept_columns,
    last,
    last_present,
    since_start,
    taken,
    taken_inputs,
)

# Of a layer without a conv: nothing is read or written.
_NO_WINDOW = CursorColumns(0, 0, 0, 0, 1 << 60, 0, False)


class _Place(NamedTuple):
    """Facts about a buffer of conv inputs, cached because asking the tensor takes longer.

    Attributes:
        batch: Sequences.
        values: Values of one column in all sequences together.
        dtype: Dtype of the buffer.
        cpu: Whether it is in CPU memory.
        inference: Whether it was made in inference mode.
        address: Address of the first value.
        column: Bytes from one column to the next.
        stride: Values from one sequence to the next.
    """

    batch: int
    values: int
    dtype: torch.dtype
    cpu: bool
    inference: bool
    address: int
    column: int
    stride: int

    @classmethod
    def of(cls, buffer: Tensor) -> _Place:
        """The facts about a buffer [B, columns, S, D]."""
        return cls(
            len(buffer),
            buffer[:, 0].numel(),
            buffer.dtype,
            buffer.is_cpu,
            buffer.is_inference(),
            buffer.data_ptr(),
            buffer.stride(1) * buffer.itemsize,
            buffer.stride(0),
        )

    def takes(self, x: Tensor) -> bool:
        """Whether conv inputs for x may be written here by address."""
        if len(x) != self.batch or x.numel() != self.values or not self.cpu:
            return False
        if torch.promote_types(x.dtype, torch.float32) is not self.dtype:
            return False
        return not self.inference or torch.is_inference_mode_enabled()


class Window:
    """The columns before `end` of a buffer, with `size` zeros in front of the first.

    size: columns before a position that the conv looks at. margin: columns that may be taken back.
    """

    def __init__(self, size: int, margin: int):
        self.size = size
        self.margin = margin
        self.keep = size + margin
        self.ahead: list[int] = []  # lengths of the chunks whose inputs are still to come
        self.end = size
        self.inputs: Tensor | None = None  # [B, columns, S, D]
        self.place: _Place | None = None  # of inputs
        self.starts = np.zeros((0, 0), dtype=bool)  # [B, columns]
        self.absent = np.zeros((0, 0), dtype=bool)
        self.holes = False  # whether a column was ever absent
        self.clear = 0  # from this column on no document begins and nothing is absent

    def expect(self, tokens: int) -> None:
        """Notes that a chunk of `tokens` tokens was looked up, whose inputs will be appended."""
        if tokens and self.size:
            self.ahead.append(tokens)

    def append(self, inputs: Tensor, starts: np.ndarray | None, absent: np.ndarray | None) -> None:
        """Adds the columns of the next chunk.

        Args:
            inputs: [B, T, S, D].
            starts: bool [B, T]; None = no document begins.
            absent: bool [B, T]; None = all are present.
        """
        if not inputs.shape[1]:
            return
        self.ahead.pop(0)
        self.holes = self.holes or absent is not None
        if not self.holes:
            inputs = inputs[:, -self.keep :]
            starts = last(starts, self.keep)
        count = inputs.shape[1]
        if self._is_full(count) or self._is_foreign(inputs):
            if self.holes:
                self._compact(inputs, starts, absent)
                return
            self._move(inputs)
        assert self.inputs is not None
        first = self.end
        self.end = first + count
        self.inputs.narrow(1, first, count).copy_(inputs)
        self.starts[:, first : self.end] = False if starts is None else starts
        self.absent[:, first : self.end] = False if absent is None else absent
        if absent is not None or (starts is not None and starts.any()):
            self.clear = self.end

    def columns(self, x: Tensor) -> Columns | None:
        """Addresses of the `size` columns before the next one, and of the next one.

        Returns None if the inputs for x, one token a sequence, have to go through `append`.
        """
        buffer = self.inputs
        if buffer is None:
            return None
        place = self.place
        if place is None or place.address != buffer.data_ptr():  # deepcopy makes other buffers
            place = self.place = _Place.of(buffer)
        first = self.end - self.size
        if self.ahead[:1] != [1] or self.end == self.starts.shape[1] or first < self.clear:
            return None
        if not place.takes(x):
            return None
        oldest = place.address + first * place.column
        return Columns(oldest, place.address + self.end * place.column, place.stride)

    def cursor_columns(self) -> CursorColumns | None:
        """The `size` columns before the next one, and those that can be written behind them.

        Makes room for at least one column. Returns None if the next inputs have to go through
        `append`.
        """
        if not self.size:
            return _NO_WINDOW
        buffer = self.inputs
        if buffer is None or self.ahead or not buffer.is_cpu:
            return None
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            return None
        if buffer.dtype not in (torch.float32, torch.float64):
            return None
        if self.end - self.size < self.clear:
            return None
        if self.end == self.starts.shape[1]:
            if self.holes:
                return None
            self._move(buffer[:, :1])
            return self.cursor_columns()
        column = buffer.stride(1) * buffer.itemsize
        following = buffer.data_ptr() + self.end * column
        return CursorColumns(
            following - self.size * column,
            following,
            buffer.stride(0),
            column,
            self.starts.shape[1] - self.end,
            buffer.stride(1),
            buffer.dtype is torch.float64,
        )

    def advance(self) -> None:
        """Counts the next column, which has been written by address."""
        self.ahead.pop(0)
        if self.clear:
            self.starts[:, self.end] = self.absent[:, self.end] = False
        self.end += 1

    def _is_full(self, count: int) -> bool:
        return self.inputs is None or self.end + count > self.inputs.shape[1]

    def _is_foreign(self, inputs: Tensor) -> bool:
        """Whether the buffer has another dtype, or was made in inference mode, which has ended."""
        assert self.inputs is not None
        if inputs.dtype != self.inputs.dtype:
            return True
        return self.inputs.is_inference() and not torch.is_inference_mode_enabled()

    def _move(self, inputs: Tensor) -> None:
        """Moves the columns to a new buffer that has room for these inputs."""
        kept = min(self.end, self.keep - inputs.shape[1])
        first = self.end - kept
        columns = kept + inputs.shape[1] + self.keep // 4 + 1
        buffer, starts, absent = self._new(inputs, columns)
        if self.inputs is not None:
            buffer[:, :kept] = self.inputs[:, first : self.end]
            starts[:, :kept] = self.starts[:, first : self.end]
        self._replace(buffer, starts, absent)
        self.clear = max(self.clear - first, 0)
        self.end = kept

    def _compact(
        self, inputs: Tensor, starts: np.ndarray | None, absent: np.ndarray | None
    ) -> None:
        """Moves the columns to a new buffer, with these inputs at the end.

        Columns that are too old to be taken back lose their holes.
        """
        nothing = np.zeros(tuple(inputs.shape[:2]), dtype=bool)
        old, old_starts, old_absent = self._new(inputs, self.end)
        if self.inputs is not None:
            old[:] = self.inputs[:, : self.end]
            old_starts[:] = self.starts[:, : self.end]
            old_absent[:] = self.absent[:, : self.end]
        all_inputs = torch.cat([old, inputs.to(old.dtype)], dim=1)
        all_starts = np.concatenate([old_starts, nothing if starts is None else starts], axis=1)
        all_absent = np.concatenate([old_absent, nothing if absent is None else absent], axis=1)
        index = kept_columns(~all_absent, self.size, self.margin)
        kept = index.shape[1]
        self._replace(*self._new(old, kept + self.keep // 4 + 1))
        assert self.inputs is not None
        self.inputs[:, :kept] = taken_inputs(all_inputs, index)
        self.starts[:, :kept] = taken(all_starts, index, False)
        self.absent[:, :kept] = taken(all_absent, index, True)
        self.end = self.clear = kept

    def _new(self, inputs: Tensor, columns: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """New zeros: a buffer of `columns` columns for inputs like these, starts and absent."""
        dtype = inputs.dtype
        if self.inputs is not None:
            dtype = torch.promote_types(dtype, self.inputs.dtype)
        buffer = inputs.new_zeros(len(inputs), columns, *inputs.shape[2:], dtype=dtype)
        flags = (len(inputs), columns)
        return buffer, np.zeros(flags, dtype=bool), np.zeros(flags, dtype=bool)

    def _replace(self, inputs: Tensor, starts: np.ndarray, absent: np.ndarray) -> None:
        self.inputs = inputs
        self.place = None
        self.starts = starts
        self.absent = absent

    def read(self) -> Tensor | None:
        """The last `size` inputs that are present, [B, size, S, D].

        They are zero before the first input and before the most recent start. Returns None before
        the first `append`.
        """
        if self.inputs is None:
            return None
        first = self.end - self.size
        window = self.inputs.narrow(1, first, self.size)
        starts = self.starts[:, first : self.end]
        if self.holes and self.absent[:, first : self.end].any():
            index = last_present(~self.absent[:, : self.end], self.size)
            window = taken_inputs(self.inputs, index)
            starts = taken(self.starts, index, False)
        if not starts.any():
            return window
        seen = torch.from_numpy(since_start(starts)).to(window.device)
        return torch.where(seen[:, :, None, None], window, 0.0)

    def crop(self, tokens: int) -> None:
        """Takes back the last tokens, beginning with those whose inputs were not appended yet."""
        while tokens and self.ahead:
            length = self.ahead.pop()
            if length > tokens:
                self.ahead.append(length - tokens)
            tokens = max(tokens - length, 0)
        if self.size:
            self.end -= tokens

    def take(self, index: np.ndarray) -> None:
        """Keeps the sequences of `index`, int64 [n], in its order."""
        if self.inputs is not None:
            rows = torch.from_numpy(index).to(self.inputs.device)
            inputs = self.inputs.index_select(0, rows)
            self._replace(inputs, self.starts[index], self.absent[index])

    def to(self, device: torch.device | str) -> None:
        """Moves the inputs to a device."""
        if self.inputs is not None:
            self.inputs = self.inputs.to(device)
            self.place = None

    def clone(self) -> Window:
        """An independent copy."""
        other = copy.copy(self)
        other.ahead = list(self.ahead)
        other.starts = self.starts.copy()
        other.absent = self.absent.copy()
        other.inputs = None if self.inputs is None else self.inputs.clone()
        other.place = None
        return other

    @classmethod
    def join(cls, windows: Sequence[Window], batches: Sequence[int]) -> Window:
        """The sequences of all `windows`; the shorter ones begin with absent columns."""
        joined = cls(windows[0].size, windows[0].margin)
        filled = [window.inputs for window in windows if window.inputs is not None]
        if not filled:
            return joined
        end = max(window.end for window in windows)
        flags = (sum(batches), end)
        dtype = functools.reduce(torch.promote_types, (inputs.dtype for inputs in filled))
        inputs = filled[0].new_zeros(*flags, *filled[0].shape[2:], dtype=dtype)
        joined._replace(inputs, np.zeros(flags, dtype=bool), np.ones(flags, dtype=bool))
        joined.end = joined.clear = end
        joined.holes = True
        first = 0
        for window, batch in zip(windows, batches, strict=True):
            if window.inputs is not None:
                part = (slice(first, first + batch), slice(end - window.end, end))
                inputs[part] = window.inputs[:, : window.end].to(inputs.device)
                joined.starts[part] = window.starts[:, : window.end]
                joined.absent[part] = window.absent[:, : window.end]
            first += batch
        return joined
