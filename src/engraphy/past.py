"""What a SequenceState keeps: the last ids of each sequence, and of each layer the last inputs of its conv.

Both are buffers with room behind what is kept, so that a decoded token is written and nothing is moved.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _native


class Columns(NamedTuple):
    """Addresses of two columns of a buffer, those of the first sequence: the oldest that is looked at now, and the next
    one to be written; `stride` values further lie those of the second sequence."""

    oldest: int
    next: int
    stride: int


NO_COLUMNS = Columns(0, 0, 0)  # of a layer without a conv


class Past:
    """The last ids of each sequence, -1 = dead, and where documents began: the columns before `end` of two buffers."""

    def __init__(self, batch: int):
        self.end = 0
        self.ids = np.empty((batch, 0), dtype=np.int64)  # [B, columns]
        self.starts = np.empty((batch, 0), dtype=bool)
        self.marked = False  # whether a start was ever written: else none has to be taken away
        self.clear = 0  # from this column on no document begins

    def append(self, ids: np.ndarray, starts: np.ndarray | None, keep: int) -> None:
        ids = _last(ids, keep)
        end = self.end + ids.shape[1]
        if end > self.ids.shape[1]:
            self._move(min(self.end, keep - ids.shape[1]), ids.shape[1] + keep)
            end = self.end + ids.shape[1]
        self.ids[:, self.end:end] = ids
        if self.marked or starts is not None:
            self.starts[:, self.end:end] = False if starts is None else _last(starts, keep)
            self.marked = True
        if starts is not None:
            self.clear = end
        self.end = end

    def columns(self, count: int) -> Columns | None:
        """The `count` before the next id, and where that goes; None where only `append` will do."""
        ids, first = self.ids, self.end - count
        if first < self.clear or self.end == ids.shape[1] or not ids.flags.writeable:  # a view of what was pickled
            return None
        begin = _native.core.address(ids)
        return Columns(begin + first * 8, begin + self.end * 8, ids.shape[1])

    def advance(self) -> None:
        """The next column of ids has been written."""
        if self.marked:
            self.starts[:, self.end] = False
        self.end += 1

    def _move(self, kept: int, room: int) -> None:
        """To new buffers, the last `kept` columns and room for more."""
        buffers = []
        for old in (self.ids, self.starts):
            new = np.zeros((len(old), kept + room), old.dtype)
            new[:, :kept] = old[:, self.end - kept:self.end]
            buffers.append(new)
        self.ids, self.starts = buffers
        self.clear = max(self.clear - (self.end - kept), 0)
        self.end = kept

    def last(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The last columns, as many of `count` as there are."""
        first = max(self.end - count, 0)
        return self.ids[:, first:self.end], self.starts[:, first:self.end]

    def take(self, index: np.ndarray) -> None:
        self.ids, self.starts = self.ids[index], self.starts[index]

    def clone(self) -> Past:
        other = copy.copy(self)
        other.ids, other.starts = self.ids.copy(), self.starts.copy()
        return other


class _Place(NamedTuple):
    """What a buffer of conv inputs is: sequences, values of one column of all of them, bytes between columns; asking it
    takes longer."""

    batch: int
    values: int
    dtype: torch.dtype
    cpu: bool
    inference: bool
    address: int
    column: int
    stride: int


class Window:
    """The last conv inputs of one layer: the columns before `end` of a buffer, in front of them `size` zeros.

    A decoding step writes one column; where the buffer is full, the last size + margin move to a new one with room
    behind them."""

    def __init__(self, size: int, margin: int):
        self.size, self.keep = size, size + margin
        self.ahead: list[int] = []  # lengths of the chunks whose ids are known and whose inputs are still to come
        self.end = size
        self.inputs: Tensor | None = None  # [B, columns, S, D]
        self.place: _Place | None = None  # of inputs
        self.starts = np.zeros((0, 0), dtype=bool)  # [B, columns]
        self.clear = 0  # from this column on no document begins

    def expect(self, tokens: int) -> None:
        if tokens and self.size:
            self.ahead.append(tokens)

    def append(self, inputs: Tensor, starts: np.ndarray | None) -> None:
        if not inputs.shape[1]:
            return
        self.ahead.pop(0)
        inputs = inputs[:, -self.keep:]
        end = self.end + inputs.shape[1]
        if self.inputs is None or end > self.inputs.shape[1] or self._foreign(inputs):
            self._move(inputs)
            end = self.end + inputs.shape[1]
        assert self.inputs is not None
        self.inputs.narrow(1, self.end, inputs.shape[1]).copy_(inputs)
        self.starts[:, self.end:end] = False if starts is None else starts[:, -self.keep:]
        self.end = end
        if starts is not None and starts.any():
            self.clear = end

    def columns(self, x: Tensor) -> Columns | None:
        first = self.end - self.size
        buffer = self.inputs
        if buffer is not None and (self.place is None or self.place.address != buffer.data_ptr()):  # deepcopy
            self.place = _Place(len(buffer), buffer[:, 0].numel(), buffer.dtype, buffer.is_cpu, buffer.is_inference(),
                                buffer.data_ptr(), buffer.stride(1) * buffer.itemsize, buffer.stride(0))
        at = self.place
        if (at is None or len(x) != at.batch or x.numel() != at.values or not at.cpu
                or torch.promote_types(x.dtype, torch.float32) is not at.dtype or self.ahead[:1] != [1]
                or self.end == self.starts.shape[1] or first < self.clear
                or at.inference and not torch.is_inference_mode_enabled()):
            return None
        return Columns(at.address + first * at.column, at.address + self.end * at.column, at.stride)

    def advance(self) -> None:
        self.ahead.pop(0)
        if self.clear:
            self.starts[:, self.end] = False
        self.end += 1

    def _foreign(self, inputs: Tensor) -> bool:
        """Whether the buffer cannot be written to as it is: another dtype, or made in inference mode and used after."""
        assert self.inputs is not None
        return inputs.dtype != self.inputs.dtype or self.inputs.is_inference() and not torch.is_inference_mode_enabled()

    def _move(self, inputs: Tensor) -> None:
        """To a new buffer that has room for these inputs."""
        kept = min(self.end, self.keep - inputs.shape[1])
        batch, columns = len(inputs), kept + inputs.shape[1] + self.keep // 4 + 1
        dtype = inputs.dtype if self.inputs is None else torch.promote_types(inputs.dtype, self.inputs.dtype)
        buffer = inputs.new_zeros(batch, columns, *inputs.shape[2:], dtype=dtype)
        starts = np.zeros((batch, columns), dtype=bool)
        if self.inputs is not None:
            buffer[:, :kept] = self.inputs[:, self.end - kept:self.end]
            starts[:, :kept] = self.starts[:, self.end - kept:self.end]
        self.inputs, self.place, self.starts = buffer, None, starts
        self.clear = max(self.clear - (self.end - kept), 0)
        self.end = kept

    def read(self) -> Tensor | None:
        if self.inputs is None:
            return None
        window = self.inputs.narrow(1, self.end - self.size, self.size)
        starts = self.starts[:, self.end - self.size:self.end]
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
            self.inputs = self.inputs.index_select(0, torch.from_numpy(index).to(self.inputs.device))
            self.starts = self.starts[index]

    def to(self, device: torch.device | str) -> None:
        if self.inputs is not None:
            self.inputs, self.place = self.inputs.to(device), None

    def clone(self) -> Window:
        other = copy.copy(self)
        other.ahead, other.starts = list(self.ahead), self.starts.copy()
        other.inputs, other.place = None if self.inputs is None else self.inputs.clone(), None
        return other


def since_start(starts_Bn: np.ndarray) -> np.ndarray:
    """bool [B, n]: no later position begins a document."""
    from_here = np.cumsum(starts_Bn[:, ::-1], axis=1)[:, ::-1]
    return from_here == starts_Bn


def _last(values_Bn: np.ndarray, count: int) -> np.ndarray:
    return values_Bn[:, max(values_Bn.shape[1] - count, 0):]
