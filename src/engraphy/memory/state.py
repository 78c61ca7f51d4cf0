"""SequenceState: what a batch of sequences carries from one forward to the next.

Modules hold no request state. Two things outlive a chunk: the last ids, which look-back needs, and
the last inputs of each memory layer's conv. Both are kept unmasked, together with the document
starts, and masked when they are read. So tokens can be taken back across a document start, and the
ids and inputs before that start count again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import _native
from ..errors import ConfigError, InputError, StateTooShort
from ..fusion.decode import NO_COLUMNS, Columns
from .arguments import as_flags, as_index, as_tokens, is_int
from .columns import padded, since_start
from .past import ABSENT, Past
from .readings import Cancellable, Readings
from .window import Window

if TYPE_CHECKING:
    from .._native._core import Cursor


class SequenceState:
    """The past of `batch` sequences of equal length; up to `margin` tokens can be taken back.

    The caller keeps it, and a forward with a state extends it. Two states share no memory that is
    ever written. Methods change the state in place and return it; `clone` makes an independent one.
    A state keeps N-1+margin ids per sequence, and W+margin detached conv inputs per sequence and
    layer.

    One step is `extend` with a chunk's ids, then for each layer `window`, the layer's forward with
    `conv_inputs=True`, and `push` of the conv inputs that it returns. Each layer knows which chunks
    it has not seen yet. So chunks may be looked up ahead of their forward, and `crop` undoes a
    forward that failed half-way.

    Attributes:
        batch: number of sequences.
        margin: tokens that can be taken back at most.
        order: N, the largest n-gram order; None = no memory has bound the state yet.
    """

    def __init__(
        self,
        batch: int,
        margin: int = 64,
        *,
        order: int | None = None,
        windows: Mapping[int, int] | None = None,
    ):
        """A state without a past.

        Args:
            batch: number of sequences, from 0 on.
            margin: tokens that can be taken back at most, from 0 on.
            order: N, the largest n-gram order. None, for `windows` too: the first memory that uses
                the state sets both.
            windows: memory layer -> W, the number of earlier positions that its conv looks at.

        Raises:
            InputError: sizes are invalid.
        """
        for name, value in (("batch", batch), ("margin", margin)):
            if not is_int(value) or value < 0:
                raise InputError(f"{name}: expected an integer from 0 on, found {value!r}")
        if (order is None) != (windows is None):
            raise InputError("state: expected order and windows together, or neither, found one")
        self.batch = int(batch)
        self.margin = int(margin)
        self._length = 0
        self.order: int | None = None
        self._cursor: Cursor | None = None  # over the buffers below; see `cursor`
        self._room = 0  # tokens that can be taken back now
        self._past = Past(self.batch)
        self._readings = Readings()
        self._sizes: dict[int, int] = {}
        self._bound_by: Mapping[int, int] | None = None  # the object that `bind` was given
        self._windows: dict[int, Window] = {}
        if order is not None and windows is not None:
            self.bind(order, windows)

    def bind(self, order: int, windows: Mapping[int, int]) -> SequenceState:
        """Sets N and each layer's window length, unless they are set already.

        Args:
            order: N, the largest n-gram order.
            windows: memory layer -> W.

        Raises:
            ConfigError: a memory of other sizes has set them.
            InputError: sizes are invalid.
        """
        if windows is self._bound_by and order == self.order:  # the memory of the last call
            return self
        if self.order == order and self._sizes == windows:
            self._bound_by = windows
            return self
        self._give_up_cursor()
        is_valid = is_int(order) and order >= 1
        are_valid = all(is_int(size) and size >= 0 for size in windows.values())
        if not (is_valid and are_valid):
            raise InputError(
                f"expected order >= 1 and windows >= 0, found {order!r} and {dict(windows)!r}"
            )
        if self.order is not None:
            raise ConfigError(
                f"state: expected a memory of order {self.order} with conv windows {self._sizes}, "
                f"to which the state belongs, found order {order} and {dict(windows)}"
            )
        self.order = int(order)
        self._sizes = {layer: int(size) for layer, size in windows.items()}
        self._windows = {layer: Window(size, self.margin) for layer, size in self._sizes.items()}
        return self

    @property
    def history(self) -> np.ndarray:
        """The raw ids before the next chunk, int64 [B, N-1], for `Addresser.all_rows`.

        -1 = no id: before the sequence, before the most recent document start, or dead.
        """
        look_back = self._bound() - 1
        self._give_up_cursor()
        ids, starts = self._past.last(look_back)
        if self._past.marked and starts.any():
            ids = np.where(since_start(starts), ids, -1)
        if ids.shape[1] == look_back:
            return ids.copy()
        return padded(ids, look_back, -1)

    def extend(
        self, ids_BT: Any, live: Any = None, starts: Any = None, present: Any = None
    ) -> SequenceState:
        """Appends T tokens.

        Args:
            ids_BT: raw ids, int [B, T]. Ids at dead and absent positions may have any value.
            live: bool [B, T] as in `Addresser.all_rows`.
            starts: bool [B, T] as in `Addresser.all_rows`.
            present: bool [B, T], False = the sequence has no token at this position (a hole in a
                mask): the next token follows directly on the last one before the hole. The position
                still counts for `length` and `crop`.

        Raises:
            InputError: a shape or dtype is invalid, or an id at a live position is negative.
        """
        self._bound()
        return self.extend_checked(*as_tokens(ids_BT, live, starts, present, self.batch))

    def extend_checked(
        self,
        ids_BT: np.ndarray,
        live: np.ndarray | None,
        starts: np.ndarray | None,
        present: np.ndarray | None,
    ) -> SequenceState:
        """`extend` by a chunk that was checked before, such as by `Addresser.all_rows`.

        Args:
            ids_BT: integers [B, T].
            live, starts, present: bool [B, T] or None, as in `extend`. Where no token is present,
                live and starts are False.
        """
        if live is not None:
            ids_BT = np.where(live, ids_BT, -1)
        if present is not None:
            ids_BT = np.where(present, ids_BT, ABSENT)
        self._give_up_cursor()
        self._past.append(ids_BT, starts, present is not None, self._bound() - 1, self.margin)
        self._lengthen(ids_BT.shape[1])
        return self

    @property
    def length(self) -> int:
        """Tokens seen, without those taken back."""
        cursor = self._cursor
        return self._length if cursor is None else self._length + cursor.tokens()

    def cursor(self) -> Cursor | None:
        """Where native calls write the next ids and conv inputs, instead of `extend` and `push`.

        They count what they write in the cursor. Every other method that changes the state, or
        reads what they write, first gives the cursor up and counts these tokens. The ids must be in
        the vocabulary and begin no document. A cursor has no windows if conv inputs have to go
        through `push`. Returns None if the next ids have to go through `extend`.
        """
        cursor = self._cursor
        if cursor is not None and cursor.ready():
            return cursor
        self._give_up_cursor()
        core = _native.core
        if core is None or not self.batch:
            return None
        ids = self._past.cursor_columns(self._bound() - 1)
        if ids is None:
            return None
        windows = [window.cursor_columns() for window in self._windows.values()]
        usable = [columns for columns in windows if columns is not None]
        if len(usable) < len(windows):
            usable = []
        self._cursor = core.Cursor(self.batch, ids, usable)
        return self._cursor

    def _count_cursor(self) -> None:
        """Counts what was written through the cursor."""
        if self._cursor is None:
            return
        tokens, *columns = self._cursor.take()
        if tokens:
            self._past.advance(tokens)
            for _ in range(tokens):
                self._lengthen(1)
        for window, written in zip(self._windows.values(), columns, strict=False):
            for _ in range(written if window.size else 0):
                window.advance()

    def _give_up_cursor(self) -> None:
        """Before ids or windows are used in another way."""
        self._count_cursor()
        if self._cursor is not None:
            self._cursor.end()
            self._cursor = None

    def _give_up_windows(self) -> None:
        """Gives up a cursor that has windows, before one is used in another way. A cursor over ids
        alone stays."""
        if self._cursor is not None and self._cursor.has_windows():
            self._give_up_cursor()
        self._count_cursor()

    def _lengthen(self, tokens: int) -> None:
        self._length += tokens
        for window in self._windows.values():
            window.expect(tokens)
        self._room = min(self.margin, self._room + tokens)

    def window(self, layer: int) -> Tensor | None:
        """The last W conv inputs of a memory layer, [B, W, S, D], for `EngramLayer.forward`.

        They are zero before the sequence and before the most recent document start. Returns None
        before the layer's first push, and for a layer without a conv. The tensor is valid until the
        next push, which may write to it.
        """
        self._give_up_windows()
        return self._window(layer).read() if self.length else None

    def push(
        self, layer: int, inputs_BTSD: Tensor, starts: Any = None, present: Any = None
    ) -> SequenceState:
        """Appends a chunk's conv inputs of a memory layer. If W is 0, nothing is kept.

        Args:
            layer: a layer of the memory.
            inputs_BTSD: [B, T, S, D], unmasked.
            starts: bool [B, T], the same as in `extend` for this chunk.
            present: bool [B, T], the same as in `extend` for this chunk.

        Raises:
            InputError: the shape is not that of the next chunk in `extend`.
            ConfigError: the layer has no memory.
        """
        self._give_up_windows()
        window = self._window(layer)
        if not window.size:
            return self
        tokens = window.ahead[0] if window.ahead else 0
        if inputs_BTSD.ndim != 4 or inputs_BTSD.shape[:2] != (self.batch, tokens):
            raise InputError(
                f"layer {layer}: expected the next chunk's conv inputs "
                f"[{self.batch}, {tokens}, S, D], found {list(inputs_BTSD.shape)}"
            )
        shape = tuple(inputs_BTSD.shape[:2])
        begins = as_flags("starts", starts, shape)
        there = as_flags("present", present, shape)
        if there is not None and begins is not None:
            begins = begins & there
        window.append(inputs_BTSD.detach(), begins, None if there is None else ~there)
        return self

    def columns(self, layer: int, x_B1SD: Tensor) -> Columns | None:
        """Addresses of a layer's next conv inputs and of the W before them, columns [S, D].

        The caller writes the inputs there instead of calling `push`, and then calls `advance`.
        Returns None if the caller has to use `window` and `push`.

        Args:
            layer: a layer of the memory.
            x_B1SD: the layer's hidden state. Conv inputs have its size, and its dtype or float32,
                whichever is wider.
        """
        self._give_up_windows()
        window = self._window(layer)
        return window.columns(x_B1SD) if window.size else NO_COLUMNS

    def advance(self, layer: int) -> SequenceState:
        """Counts the next conv inputs of a layer, which the caller has written (see `columns`)."""
        self._give_up_cursor()  # the next one may have windows
        window = self._window(layer)
        if window.size:
            window.advance()
        return self

    def watch(self, reading: Cancellable, tokens: int) -> None:
        """Registers a read under way for the last `tokens` tokens.

        `crop` cancels it if it takes back all of these tokens.
        """
        self._readings.add(reading, self.length - tokens)

    def crop(self, tokens: int) -> SequenceState:
        """Takes back the last tokens, in the ids and in every layer that has seen them.

        Cancels reads of their rows. After an error the state is unchanged.

        Raises:
            StateTooShort: the state has seen fewer tokens, or the margin is smaller.
            InputError: `tokens` is not an integer from 0 on.
        """
        if not is_int(tokens) or tokens < 0:
            raise InputError(f"crop: expected a number of tokens from 0 on, found {tokens!r}")
        self._give_up_cursor()
        if tokens > self._room:
            raise StateTooShort(
                f"crop: expected at most {self._room} tokens, found {tokens}: "
                f"{self.length} were seen, and the margin is {self.margin} since the longest point "
                "(attach, load and memory.state take margin=)"
            )
        self._past.end -= int(tokens)
        self._length -= int(tokens)
        self._room -= int(tokens)
        for window in self._windows.values():
            window.crop(int(tokens))
        self._readings.cancel_from(self._length)
        return self

    def reorder(self, index_B: Any) -> SequenceState:
        """Replaces each sequence b by sequence index_B[b] (beam search). index_B: int [B].

        Raises InputError if the array or an index is invalid.
        """
        index = as_index(index_B, self.batch)
        if len(index) != self.batch:
            raise InputError(f"reorder: expected {self.batch} indices, found {len(index)}")
        return self._take(index)

    def repeat(self, times: int) -> SequenceState:
        """Repeats each sequence `times` times, copies side by side (repeat_interleave)."""
        if not is_int(times) or times < 1:
            raise InputError(f"repeat: expected a number from 1 on, found {times!r}")
        return self._take(np.repeat(np.arange(self.batch), times))

    def select(self, index: Any) -> SequenceState:
        """Keeps the sequences of `index`, int [n], in its order; the batch becomes n."""
        return self._take(as_index(index, self.batch))

    @classmethod
    def join(cls, states: Sequence[SequenceState]) -> SequenceState:
        """Makes one state for the sequences of all `states`, in their order.

        The states are unchanged. Their lengths may differ (continuous batching): shorter ones are
        padded in front with absent positions, so `length` is that of the longest. As many
        tokens can be taken back as in every one of the states.

        Raises:
            InputError: there is no state, the states have different sizes or margins, or some layer
                has not seen all tokens.
        """
        for state in states:
            state._give_up_cursor()
        _check_joinable(states)
        first = states[0]
        batches = [state.batch for state in states]
        joined = cls(sum(batches), first.margin, order=first.order, windows=first._sizes)
        joined._length = max(state.length for state in states)
        joined._room = min(state._room for state in states)
        joined._past = Past.join([state._past for state in states])
        for layer in first._windows:
            windows = [state._windows[layer] for state in states]
            joined._windows[layer] = Window.join(windows, batches)
        return joined

    def clone(self) -> SequenceState:
        """An independent state with the same past."""
        other = copy.copy(self)  # gives up the cursor
        other._past = self._past.clone()
        other._windows = {layer: window.clone() for layer, window in self._windows.items()}
        return other

    def __repr__(self) -> str:
        self._count_cursor()
        bound = "not bound to a memory"
        if self.order is not None:
            bound = f"order={self.order}, layers={list(self._windows)}"
        return (
            f"SequenceState(batch={self.batch}, length={self.length}, {bound}, "
            f"margin={self.margin}, croppable={self._room})"
        )

    def __getstate__(self) -> dict[str, Any]:
        self._give_up_cursor()
        # A copy must not cancel reads that this state still needs.
        return self.__dict__ | {"_readings": Readings()}

    def to(self, device: torch.device | str) -> SequenceState:
        """Moves the conv windows to a device; ids stay in CPU memory."""
        self._give_up_cursor()
        for window in self._windows.values():
            window.to(device)
        return self

    def _bound(self) -> int:
        if self.order is None:
            raise InputError(
                "the state is not bound to a memory: give order and windows, or use "
                "memory.state(batch)"
            )
        return self.order

    def _window(self, layer: int) -> Window:
        self._bound()
        if layer not in self._windows:
            raise ConfigError(
                f"layer {layer!r} has no memory; expected one of {sorted(self._windows)}"
            )
        return self._windows[layer]

    def _take(self, index: np.ndarray) -> SequenceState:
        self._give_up_cursor()
        self.batch = len(index)
        self._past.take(index)
        for window in self._windows.values():
            window.take(index)
        return self


def _check_joinable(states: Sequence[SequenceState]) -> None:
    if not states:
        raise InputError("join: expected one state or more, found none")
    first = states[0]
    sizes = (first._bound(), first._sizes, first.margin)
    for state in states:
        found = (state._bound(), state._sizes, state.margin)
        if found != sizes:
            raise InputError(
                f"join: expected states of (order, conv windows, margin) = {sizes}, found {found}"
            )
        if any(window.ahead for window in state._windows.values()):
            raise InputError(
                "join: expected states whose layers have all seen all tokens, "
                "found one in the middle of a forward"
            )
