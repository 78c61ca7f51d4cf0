"""SequenceState: what a batch of sequences carries from one forward to the next. Modules hold no
request state.

Two things outlive a chunk: the last ids, since look-back is a property of the sequence, and the
last inputs of each memory layer's conv. Both are kept as they came, with the document starts beside
them, and masked when they are read: so tokens can be taken back across a start, and what lies
before the start counts again.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError, StateTooShort
from ..fusion.decode import NO_COLUMNS, Columns
from .columns import since_start
from .past import ABSENT, Past
from .window import Window


class Cancellable(Protocol):
    """What can be given up: a prefetcher's ticket."""

    def cancel(self) -> None: ...


class SequenceState:
    """The past of `batch` sequences of equal length, of which up to `margin` tokens can be taken
    back.

    A value in the caller's hands: a forward that is given one extends it, two states share nothing
    that is ever written. Methods change it in place and return it; `clone` gives an independent
    one. order: N, the largest n-gram order. windows: memory layer -> W, earlier positions that its
    conv looks at. They may be left out: the memory that first uses the state binds them. Keeps
    N-1+margin ids per sequence, and W+margin conv inputs, detached, per sequence and layer.

    One step is `extend` with a chunk's ids, then per layer `window`, the layer's forward with
    `conv_inputs=True`, and `push` of what that returns. Each layer knows which chunks it has not
    seen yet, so chunks may be looked up ahead of their forward, and a forward that failed half-way
    is undone by `crop`. Raises InputError for sizes that cannot be meant.
    """

    def __init__(
        self,
        batch: int,
        margin: int = 64,
        *,
        order: int | None = None,
        windows: Mapping[int, int] | None = None,
    ):
        for name, value in (("batch", batch), ("margin", margin)):
            if not _is_int(value) or value < 0:
                raise InputError(f"{name}: expected an integer from 0 on, found {value!r}")
        if (order is None) != (windows is None):
            raise InputError("expected order and windows together, or neither")
        self.batch, self.margin = int(batch), int(margin)
        self.length = 0  # tokens seen, those taken back not counted
        self.order: int | None = None
        self._room = 0  # tokens that can be taken back: no more than were seen, than margin, than are left of it
        self._past = Past(self.batch)
        self._readings: list[
            tuple[int, weakref.ref[Cancellable]]
        ] = []  # by the first token that they are for
        self._sizes: dict[int, int] = {}
        self._windows: dict[int, Window] = {}
        if order is not None and windows is not None:
            self.bind(order, windows)

    def bind(self, order: int, windows: Mapping[int, int]) -> SequenceState:
        """Fix N and each layer's window length. Raises ConfigError where a memory of other sizes
        has done so."""
        if (self.order, self._sizes) == (order, windows):
            return self
        if (
            not _is_int(order)
            or order < 1
            or not all(_is_int(w) and w >= 0 for w in windows.values())
        ):
            raise InputError(
                f"expected order >= 1 and windows >= 0, found {order!r} and {dict(windows)!r}"
            )
        if self.order is not None:
            raise ConfigError(
                f"the state belongs to a memory of order {self.order} with conv windows {self._sizes}; "
                f"this one has order {order} and {dict(windows)}"
            )
        self.order = int(order)
        self._sizes = {layer: int(size) for layer, size in windows.items()}
        self._windows = {layer: Window(size, self.margin) for layer, size in self._sizes.items()}
        return self

    @property
    def history(self) -> np.ndarray:
        """The raw ids before the next chunk, int64 [B, N-1]; -1 = nothing there: before the
        sequence, before the most recent document start, or dead. As Addresser takes it."""
        past = self._bound() - 1
        ids, starts = self._past.last(past)
        if self._past.marked and starts.any():
            ids = np.where(since_start(starts), ids, -1)
        missing = past - ids.shape[1]
        return np.pad(ids, ((0, 0), (missing, 0)), constant_values=-1) if missing else ids.copy()

    def extend(
        self, ids_BT: Any, live: Any = None, starts: Any = None, present: Any = None
    ) -> SequenceState:
        """Append T tokens: raw ids, int [B, T]. live, starts: bool [B, T] as in
        `Addresser.all_rows`.

        present: bool [B, T], False = there is no token of the sequence at this position (a hole in
        a mask): what comes after it follows what came before it. It counts as a position for
        `length` and `crop`. Ids at dead and absent positions may be anything. Raises InputError for
        shapes, dtypes, and negative ids at other positions.
        """
        look_back = self._bound() - 1
        ids = _array(ids_BT)
        if ids.ndim != 2 or len(ids) != self.batch or ids.dtype.kind not in "iu":
            raise InputError(
                f"ids: expected integers [{self.batch}, T], found {ids.dtype} {list(ids.shape)}"
            )
        begins, alive = _flags("starts", starts, ids.shape), _flags("live", live, ids.shape)
        there = _flags("present", present, ids.shape)
        if there is not None:
            alive = there if alive is None else alive & there
            begins = None if begins is None else begins & there
        given = ids if alive is None else ids[alive]
        if given.size and given.min() < 0:
            raise InputError(
                f"ids: expected no negative id at a live position, found {int(given.min())}"
            )
        if alive is not None:
            ids = np.where(alive, ids, -1)
        if there is not None:
            ids = np.where(there, ids, ABSENT)
        self._past.append(ids, begins, there is not None, look_back, self.margin)
        self._lengthen(ids.shape[1])
        return self

    def next_ids(self) -> Columns | None:
        """Where the next id of each sequence goes and the N-1 before it lie, int64, to be written
        in place of `extend` and then told to `advance_ids`; None where only `history` and `extend`
        will do."""
        return self._past.columns(self._bound() - 1)

    def advance_ids(self) -> SequenceState:
        """The next token of each sequence has been written: ids that are in the vocabulary, no
        document's beginning."""
        self._past.advance()
        self._lengthen(1)
        return self

    def _lengthen(self, tokens: int) -> None:
        self.length += tokens
        for window in self._windows.values():
            window.expect(tokens)
        self._room = min(self.margin, self._room + tokens)

    def window(self, layer: int) -> Tensor | None:
        """The last W conv inputs of a memory layer, [B, W, S, D], as EngramLayer takes it: zero
        where nothing is and before the most recent start. None before the layer's first push, and
        for a layer without a conv. Of use until the next push, which may write to it."""
        return self._window(layer).read() if self.length else None

    def push(
        self, layer: int, inputs_BTSD: Tensor, starts: Any = None, present: Any = None
    ) -> SequenceState:
        """Append a chunk's conv inputs of a memory layer, [B, T, S, D] unmasked, and the chunk's
        starts and present, bool [B, T], as `extend` was given them. If W is 0 nothing is kept.

        Raises InputError for other shapes, and for another chunk than the next one that `extend`
        was given.
        """
        window = self._window(layer)
        if not window.size:
            return self
        tokens = window.ahead[0] if window.ahead else 0
        if inputs_BTSD.ndim != 4 or inputs_BTSD.shape[:2] != (self.batch, tokens):
            raise InputError(
                f"layer {layer}: expected the next chunk's conv inputs [{self.batch}, {tokens}, S, D], "
                f"found {list(inputs_BTSD.shape)}"
            )
        shape = tuple(inputs_BTSD.shape[:2])
        begins, there = _flags("starts", starts, shape), _flags("present", present, shape)
        if there is not None and begins is not None:
            begins = begins & there
        window.append(inputs_BTSD.detach(), begins, None if there is None else ~there)
        return self

    def columns(self, layer: int, x_B1SD: Tensor) -> Columns | None:
        """Where a layer's next conv inputs go and the W before them lie, columns [S, D], to be
        written in place of `push` and then told to `advance`; None where only `window` and `push`
        will do. x_B1SD: what the layer is given; conv inputs have its size, and its dtype or
        float32 where that is narrower."""
        window = self._window(layer)
        return window.columns(x_B1SD) if window.size else NO_COLUMNS

    def advance(self, layer: int) -> SequenceState:
        """The next column of a layer has been written."""
        window = self._window(layer)
        if window.size:
            window.advance()
        return self

    def watch(self, reading: Cancellable, tokens: int) -> None:
        """`reading` is under way for the last `tokens` tokens: `crop` cancels it where it takes all
        of them back."""
        self._readings = [each for each in self._readings if each[1]() is not None]
        self._readings.append((self.length - tokens, weakref.ref(reading)))

    def crop(self, tokens: int) -> SequenceState:
        """Take back the last tokens, in the ids and in every layer that has seen them; give up
        reading rows for them.

        Raises StateTooShort beyond the margin: the state stays as it is.
        """
        if not _is_int(tokens) or tokens < 0:
            raise InputError(f"crop: expected a number of tokens from 0 on, found {tokens!r}")
        if tokens > self._room:
            raise StateTooShort(
                f"crop: asked to take back {tokens} tokens, {self._room} are possible: "
                f"{self.length} were seen, and the margin is {self.margin} since the longest point "
                "(attach, load and memory.state take margin=)"
            )
        self._past.end -= int(tokens)
        self.length -= int(tokens)
        self._room -= int(tokens)
        for window in self._windows.values():
            window.crop(int(tokens))
        for first, reference in self._readings:
            reading = reference()
            if first >= self.length and reading is not None:
                reading.cancel()
        self._readings = [each for each in self._readings if each[0] < self.length]
        return self

    def reorder(self, index_B: Any) -> SequenceState:
        """Sequence b becomes what sequence index_B[b] was (beam search); int [B]."""
        index = self._index(index_B)
        if len(index) != self.batch:
            raise InputError(f"reorder: expected {self.batch} indices, found {len(index)}")
        return self._take(index)

    def repeat(self, times: int) -> SequenceState:
        """Each sequence `times` times, copies side by side (repeat_interleave)."""
        if not _is_int(times) or times < 1:
            raise InputError(f"repeat: expected a number from 1 on, found {times!r}")
        return self._take(np.repeat(np.arange(self.batch), times))

    def select(self, index: Any) -> SequenceState:
        """Keep the sequences of `index`, int [n], in its order; the batch becomes n."""
        return self._take(self._index(index))

    @classmethod
    def join(cls, states: Sequence[SequenceState]) -> SequenceState:
        """One state for the sequences of all `states`, in their order; the states stay as they are.
        Their lengths may differ (continuous batching): the shorter ones are padded in front with
        positions that are absent, so `length` becomes the longest, and as many tokens can be taken
        back as in every one of them.

        Raises InputError for no state, states of memories of other sizes or of other margins, and
        states of which some layers have not seen all tokens.
        """
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
                    "join: expected states whose layers have all seen all tokens, found one in the middle "
                    "of a forward"
                )
        joined = cls(
            sum(state.batch for state in states),
            first.margin,
            order=first.order,
            windows=first._sizes,
        )
        joined.length = max(state.length for state in states)
        joined._room = min(state._room for state in states)
        joined._past = Past.join([state._past for state in states])
        batches = [state.batch for state in states]
        joined._windows = {
            layer: Window.join([state._windows[layer] for state in states], batches)
            for layer in first._windows
        }
        return joined

    def clone(self) -> SequenceState:
        """An independent state with the same past."""
        other = copy.copy(self)
        other._past = self._past.clone()
        other._windows = {layer: window.clone() for layer, window in self._windows.items()}
        return other

    def __repr__(self) -> str:
        bound = "not bound to a memory"
        if self.order is not None:
            bound = f"order={self.order}, layers={list(self._windows)}"
        return (
            f"SequenceState(batch={self.batch}, length={self.length}, {bound}, "
            f"margin={self.margin}, croppable={self._room})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_readings": []
        }  # what copies and pickles of it take back is still read for this one

    def to(self, device: torch.device | str) -> SequenceState:
        """Move the conv windows; ids stay in the CPU's memory."""
        for window in self._windows.values():
            window.to(device)
        return self

    def _bound(self) -> int:
        if self.order is None:
            raise InputError(
                "the state is not bound to a memory: give order and windows, or use memory.state(batch)"
            )
        return self.order

    def _window(self, layer: int) -> Window:
        self._bound()
        if layer not in self._windows:
            raise ConfigError(
                f"layer {layer!r} has no memory; expected one of {sorted(self._windows)}"
            )
        return self._windows[layer]

    def _index(self, index: Any) -> np.ndarray:
        index = _array(index)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise InputError(
                f"index: expected integers [n], found {index.dtype} {list(index.shape)}"
            )
        if index.size and not (0 <= index.min() and index.max() < self.batch):
            raise InputError(
                f"index: expected sequences 0 to {self.batch - 1}, found {index.min()} to {index.max()}"
            )
        return index.astype(np.int64)

    def _take(self, index: np.ndarray) -> SequenceState:
        self.batch = len(index)
        self._past.take(index)
        for window in self._windows.values():
            window.take(index)
        return self


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _array(values: Any) -> np.ndarray:
    try:
        return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:  # ragged lists
        raise InputError(f"expected an array, found {type(values).__name__}: {error}") from None


def _flags(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if values is None:
        return None
    flags = _array(values)
    if flags.dtype != np.bool_ or flags.shape != tuple(shape):
        raise InputError(
            f"{name}: expected bool {list(shape)}, found {flags.dtype} {list(flags.shape)}"
        )
    return flags
