"""state.py: whatever is done to a state, it equals one that was given the resulting sequences at
once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy.errors import ConfigError, InputError, StateTooShort
from engraphy.memory.state import SequenceState

ORDER, MARGIN, WINDOWS = 3, 5, {1: 6, 4: 3, 7: 0}
STREAMS, HIDDEN = 2, 3


@dataclass
class Sequences:
    """Everything that a batch has seen, in full: the plain version of a state."""

    ids: np.ndarray
    live: np.ndarray
    starts: np.ndarray
    present: np.ndarray
    inputs: torch.Tensor
    room: int = field(default=0)

    @classmethod
    def none(cls, batch: int) -> Sequences:
        flags = [np.empty((batch, 0), bool) for _ in range(3)]
        return cls(np.empty((batch, 0), np.int64), *flags, torch.empty(batch, 0, STREAMS, HIDDEN))

    @classmethod
    def random(
        cls, batch: int, tokens: int, seed: int, flags: bool = True, holes: bool = False
    ) -> Sequences:
        rng = np.random.default_rng(seed)
        live = rng.random((batch, tokens)) < (0.8 if flags else 2.0)
        starts = rng.random((batch, tokens)) < (0.15 if flags else -1.0)
        inputs = torch.from_numpy(
            rng.standard_normal((batch, tokens, STREAMS, HIDDEN)).astype(np.float32)
        )
        ids = np.where(live, rng.integers(0, 99, (batch, tokens)), -7)
        present = rng.random((batch, tokens)) < (0.6 if holes else 2.0)
        return cls(ids, live, starts, present, inputs)

    def map(self, change) -> Sequences:
        parts = (self.ids, self.live, self.starts, self.present, self.inputs)
        return Sequences(*map(change, parts), self.room)

    def then(self, chunk: Sequences) -> Sequences:
        room = min(MARGIN, self.room + chunk.ids.shape[1])
        joined = (
            np.concatenate([a, b], axis=1)
            for a, b in (
                (self.ids, chunk.ids),
                (self.live, chunk.live),
                (self.starts, chunk.starts),
                (self.present, chunk.present),
            )
        )
        return Sequences(*joined, torch.cat([self.inputs, chunk.inputs], dim=1), room)

    def back(self, sequence: int, count: int):
        """The last `count` positions of a sequence that are present, the latest first, up to the
        latest start."""
        for t in np.flatnonzero(self.present[sequence])[::-1][:count]:
            yield t
            if self.starts[sequence, t]:
                return

    def history(self) -> np.ndarray:
        out = np.full((len(self.ids), ORDER - 1), -1)
        for b in range(len(out)):
            for i, t in enumerate(self.back(b, ORDER - 1), start=1):
                out[b, -i] = self.ids[b, t] if self.live[b, t] else -1
        return out

    def window(self, size: int) -> torch.Tensor:
        out = torch.zeros(len(self.ids), size, STREAMS, HIDDEN)
        for b in range(len(out)):
            for i, t in enumerate(self.back(b, size), start=1):
                out[b, -i] = self.inputs[b, t]
        return out


def new(batch: int) -> SequenceState:
    return SequenceState(batch, MARGIN, order=ORDER, windows=WINDOWS)


def feed(state: SequenceState, chunk: Sequences, layers=tuple(WINDOWS)) -> None:
    state.extend(chunk.ids, chunk.live, chunk.starts, present_of(chunk))
    push(state, chunk, layers)


def push(state: SequenceState, chunk: Sequences, layers=tuple(WINDOWS)) -> None:
    for layer in layers:
        state.push(layer, chunk.inputs, torch.from_numpy(chunk.starts), present_of(chunk))


def present_of(chunk: Sequences) -> np.ndarray | None:
    return None if chunk.present.all() else chunk.present


def assert_same(state: SequenceState, truth: Sequences, layers=tuple(WINDOWS)) -> None:
    assert state.batch == len(truth.ids)
    assert state.length == truth.ids.shape[1]
    np.testing.assert_array_equal(state.history, truth.history())
    assert state.history.dtype == np.int64
    for layer in layers:
        window, size = state.window(layer), WINDOWS[layer]
        if state.length == 0 or size == 0:
            assert window is None
        else:
            assert window is not None
            torch.testing.assert_close(window, truth.window(size), rtol=0, atol=0)


STEP = st.one_of(
    st.tuples(st.just("extend"), st.integers(0, 14), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("extend"), st.integers(1, 1), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("holes"), st.integers(0, 14), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("crop"), st.integers(0, MARGIN + 1)),
    st.tuples(
        st.sampled_from(["reorder", "select"]), st.lists(st.integers(0, 99), min_size=1, max_size=4)
    ),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("clone")),
)


@settings(max_examples=100)
@given(st.integers(1, 3), st.lists(STEP, max_size=12))
def test_any_sequence_of_steps_equals_a_state_built_from_the_resulting_sequences(batch, steps):
    state, truth = new(batch), Sequences.none(batch)
    for name, *arguments in steps:
        if name in ("extend", "holes"):
            chunk = Sequences.random(state.batch, *arguments, holes=name == "holes")
            feed(state, chunk)
            truth = truth.then(chunk)
        elif name == "crop":
            tokens = arguments[0]
            if tokens > truth.room:
                with pytest.raises(StateTooShort):
                    state.crop(tokens)
            else:
                state.crop(tokens)
                kept = truth.ids.shape[1] - tokens
                truth = truth.map(lambda values, kept=kept: values[:, :kept])
                truth.room -= tokens
        elif name == "clone":
            old, state = state, state.clone()
            feed(old, Sequences.random(old.batch, 2, 0))
        elif name == "repeat":
            if state.batch > 8:
                continue
            state.repeat(arguments[0])
            truth = truth.map(
                lambda values, n=arguments[0]: values[np.repeat(np.arange(len(values)), n)]
            )
        else:
            index = np.array(arguments[0]) % state.batch
            if name == "reorder":
                index = np.resize(index, state.batch)
            getattr(state, name)(torch.from_numpy(index))
            truth = truth.map(lambda values, index=index: values[index])
        assert_same(state, truth)
        fresh = new(state.batch)
        feed(fresh, truth)
        assert_same(fresh, truth)


def test_crop_across_a_start_brings_back_what_lay_before_it():
    state, before = new(2), Sequences.random(2, 10, 1, flags=False)
    feed(state, before)
    after = Sequences.random(2, 4, 2, flags=False)
    after.starts[:, 1] = True
    feed(state, after)
    assert_same(state, before.then(after))
    assert (state.history >= 0).all()
    state.crop(4)
    assert_same(state, before)
    assert (state.window(1) != 0).all()


def test_an_absent_position_is_passed_over_where_a_dead_one_ends_the_look_back():
    absent, dead = (SequenceState(1, order=3, windows={}) for _ in range(2))
    hole = np.array([[True, True, False, True]])
    absent.extend([[5, 6, 9, 7]], present=hole)
    dead.extend([[5, 6, 9, 7]], live=hole)
    np.testing.assert_array_equal(absent.history, [[6, 7]])
    np.testing.assert_array_equal(dead.history, [[-1, 7]])


def test_a_document_does_not_begin_at_an_absent_position():
    state = SequenceState(1, order=3, windows={})
    flags = np.array([[False, False, True]])
    state.extend([[5, 6, 9]], starts=flags, present=~flags)
    np.testing.assert_array_equal(state.history, [[5, 6]])


def test_what_is_kept_is_bounded_with_holes_too():
    state, truth = new(2), Sequences.none(2)
    for seed in range(200):
        chunk = Sequences.random(2, 1 + 30 * (seed % 50 == 0), seed, holes=True)
        feed(state, chunk)
        truth = truth.then(chunk)
    assert_same(state, truth)
    assert state._windows[1].inputs.shape[1] <= 2 * (WINDOWS[1] + MARGIN)
    assert state._past.ids.shape[1] <= 2 * (ORDER - 1 + MARGIN)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
    st.integers(0, MARGIN),
    st.booleans(),
)
def test_joined_states_go_on_as_each_of_them_by_itself(lengths, seed, cropped, holes):
    rng = np.random.default_rng(seed)
    states, truths = [], []
    for chunks in lengths:
        state, truth = new(2), Sequences.none(2)
        for tokens in chunks:
            chunk = Sequences.random(2, tokens, int(rng.integers(2**32)), holes=holes)
            feed(state, chunk)
            truth = truth.then(chunk)
        states.append(state)
        truths.append(truth)
    joined = SequenceState.join(states)
    assert joined.length == max(state.length for state in states)
    cropped = min(cropped, *(truth.room for truth in truths))
    joined.crop(cropped)
    more = Sequences.random(2 * len(states), 3, seed)
    for part in (more.map(lambda values: values[:, :2]), more.map(lambda values: values[:, 2:])):
        feed(joined, part)
    for number, (state, truth) in enumerate(zip(states, truths, strict=True)):
        mine = slice(2 * number, 2 * number + 2)
        kept = truth.ids.shape[1] - cropped
        expected = truth.map(lambda values, kept=kept: values[:, :kept])
        expected = expected.then(more.map(lambda values, mine=mine: values[mine]))
        np.testing.assert_array_equal(joined.history[mine], expected.history())
        for layer in (1, 4):
            torch.testing.assert_close(
                joined.window(layer)[mine], expected.window(WINDOWS[layer]), rtol=0, atol=0
            )
        assert_same(state, truth)


def test_only_whole_states_of_one_memory_are_joined():
    ahead = new(1).extend([[1, 2]])
    for states, message in (
        ([], "found none"),
        ([new(1), ahead], "middle of a forward"),
        ([new(1), SequenceState(1, MARGIN, order=4, windows=WINDOWS)], "expected states of"),
        ([new(1), SequenceState(1, 9, order=ORDER, windows=WINDOWS)], "expected states of"),
        ([SequenceState(1)], "not bound"),
    ):
        with pytest.raises(InputError, match=message):
            SequenceState.join(states)


def test_before_the_latest_start_and_at_dead_positions_there_is_nothing():
    state = SequenceState(3, order=4, windows={})
    state.extend(
        [[5, 6, 7], [5, 6, 7], [5, 6, 7]],
        live=np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool),
        starts=np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]], bool),
    )
    np.testing.assert_array_equal(state.history, [[-1, 6, 7], [5, -1, 7], [5, 6, 7]])


def test_crop_to_the_very_beginning_leaves_a_fresh_state():
    state = new(2)
    feed(state, Sequences.random(2, 3, 0))
    state.crop(3)
    assert_same(state, Sequences.none(2))
    with pytest.raises(StateTooShort):
        state.crop(1)


def test_a_margin_is_used_up_by_cropping_and_refilled_by_extending():
    state = new(1)
    feed(state, Sequences.random(1, 40, 0))
    state.crop(3).crop(2)
    with pytest.raises(
        StateTooShort, match=f"expected at most 0 tokens, found 1: .*margin is {MARGIN}"
    ):
        state.crop(1)
    feed(state, Sequences.random(1, 2, 1))
    state.crop(2)


def test_a_failed_crop_changes_nothing():
    state, truth = new(2), Sequences.random(2, 20, 3)
    feed(state, truth)
    with pytest.raises(StateTooShort):
        state.crop(MARGIN + 1)
    assert_same(state, truth)


def test_crop_undoes_a_forward_that_only_some_layers_have_finished():
    state, truth, lost = new(2), Sequences.random(2, 9, 4), Sequences.random(2, 3, 5)
    feed(state, truth)
    feed(state, lost, layers=[1])
    state.crop(3)
    assert_same(state, truth)
    again = Sequences.random(2, 2, 6)
    feed(state, again)
    assert_same(state, truth.then(again))


def test_chunks_may_be_looked_up_ahead_of_their_forward():
    state, first, second = new(1), Sequences.random(1, 4, 7), Sequences.random(1, 7, 8)
    for chunk in (first, second):
        state.extend(chunk.ids, chunk.live, chunk.starts)
    push(state, first)
    for layer in (1, 4):
        torch.testing.assert_close(
            state.window(layer), first.window(WINDOWS[layer]), rtol=0, atol=0
        )
    push(state, second)
    assert_same(state, first.then(second))


def test_push_refuses_another_chunk_than_the_next_one():
    state, chunk = new(1), Sequences.random(1, 4, 7)
    state.extend(chunk.ids, chunk.live, chunk.starts)
    inputs = chunk.inputs
    for wrong in (inputs[:, :3], torch.cat([inputs] * 2, 1), inputs[0], inputs.repeat(2, 1, 1, 1)):
        with pytest.raises(InputError, match=r"layer 1: expected .* \[1, 4, S, D\]"):
            state.push(1, wrong)
    state.push(1, chunk.inputs)
    with pytest.raises(InputError, match=r"\[1, 0, S, D\]"):
        state.push(1, chunk.inputs)


def test_crop_shortens_a_chunk_whose_forward_is_still_to_come():
    state, first, second = new(1), Sequences.random(1, 4, 7), Sequences.random(1, 5, 8)
    for chunk in (first, second):
        state.extend(chunk.ids, chunk.live, chunk.starts)
    state.crop(2)
    second = second.map(lambda values: values[:, :3])
    for chunk in (first, second):
        push(state, chunk)
    assert_same(state, first.then(second))


def test_interleaved_requests_do_not_disturb_each_other():
    chunks = [
        [Sequences.random(1, 3, seed) for seed in (request, 10 + request)] for request in range(2)
    ]
    states = [new(1), new(1)]
    for step in range(2):
        for state, own in zip(states, chunks, strict=True):
            feed(state, own[step])
    for state, (first, second) in zip(states, chunks, strict=True):
        assert_same(state, first.then(second))


def test_windows_are_copies_without_a_graph():
    state, chunk = new(1), Sequences.random(1, 3, 0, flags=False)
    inputs = chunk.inputs.clone().requires_grad_()
    state.extend(chunk.ids).push(1, inputs)
    with torch.no_grad():
        inputs.fill_(float("nan"))
    window = state.window(1)
    assert not window.requires_grad
    torch.testing.assert_close(window, chunk.window(6), rtol=0, atol=0)


def test_what_is_kept_is_bounded_however_it_was_fed():
    state = new(1)
    feed(state, Sequences.random(1, 500, 0))
    for seed in range(300):
        feed(state, Sequences.random(1, 1, seed))
    assert (
        state._windows[1].inputs.untyped_storage().size()
        <= 2 * (WINDOWS[1] + MARGIN) * STREAMS * HIDDEN * 4
    )
    assert (
        state._past.ids.size <= 2 * (ORDER - 1 + MARGIN)
        and state._past.ids.shape == state._past.starts.shape
    )


def test_a_state_without_sizes_is_bound_by_its_first_memory_and_by_no_other():
    state = SequenceState(1)
    assert state.margin == 64
    with pytest.raises(InputError, match="not bound"):
        state.extend([[1]])
    state.bind(ORDER, WINDOWS).bind(ORDER, WINDOWS)
    feed(state, Sequences.random(1, 2, 0))
    with pytest.raises(ConfigError, match="order 3 .* found order 4"):
        state.bind(4, WINDOWS)
    with pytest.raises(ConfigError, match="layer 2 has no memory"):
        state.window(2)


def test_an_order_of_one_has_no_history():
    state = SequenceState(2, 0, order=1, windows={0: 1})
    state.extend([[1, 2], [3, 4]]).push(0, torch.ones(2, 2, 1, 1))
    assert state.history.shape == (2, 0)
    assert state.window(0).shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    "ids", [[1, 2], [[1], [2], [3]], [[0.5], [1.0]], [[True], [False]], [["a"], ["b"]]]
)
def test_extend_refuses_other_shapes_and_types_of_ids(ids):
    with pytest.raises(InputError, match=r"ids: expected integers \[2, T\]"):
        new(2).extend(ids)


def test_ragged_ids_are_refused():
    with pytest.raises(InputError, match="expected an array, found list"):
        new(2).extend([[1, 2], [3]])


@pytest.mark.parametrize("live", [None, np.array([[True, True]])])
def test_extend_refuses_negative_ids_at_live_positions(live):
    with pytest.raises(InputError, match="no negative id"):
        new(1).extend([[3, -2]], live)


@pytest.mark.parametrize("name", ["live", "starts", "present"])
def test_extend_refuses_flags_of_another_shape_or_type(name):
    for flags in (np.ones((1, 3), bool), np.ones((1, 2), np.int64)):
        with pytest.raises(InputError, match=rf"{name}: expected bool \[1, 2\]"):
            new(1).extend([[3, 2]], **{name: flags})


def test_a_refused_extend_changes_nothing():
    state, truth = new(1), Sequences.random(1, 8, 2)
    feed(state, truth)
    with pytest.raises(InputError):
        state.extend([[3, -2]], starts=np.ones((1, 2), bool))
    assert_same(state, truth)


@pytest.mark.parametrize("index", [[2], [-1, 0], [0.0, 1.0], [[0, 1]]])
def test_an_index_that_names_no_sequence_is_refused(index):
    for name in ("reorder", "select"):
        with pytest.raises(InputError, match="index"):
            getattr(new(2), name)(index)


def test_reorder_keeps_the_batch():
    with pytest.raises(InputError, match="expected 2 indices, found 1"):
        new(2).reorder([0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch": -1},
        {"batch": 2.0},
        {"margin": -1},
        {"margin": True},
        {"order": 3},
        {"order": 0, "windows": {}},
        {"order": 2, "windows": {0: -1}},
    ],
)
def test_sizes_that_cannot_be_meant_are_refused(arguments):
    with pytest.raises(InputError, match="expected"):
        SequenceState(**{"batch": 1, **arguments})


def test_counts_that_cannot_be_meant_are_refused():
    for call in (
        lambda s: s.crop(-1),
        lambda s: s.crop(1.0),
        lambda s: s.repeat(0),
        lambda s: s.repeat(True),
    ):
        with pytest.raises(InputError, match="expected a number"):
            call(new(1))


def test_repr_says_batch_tokens_layers_and_margin():
    state = SequenceState(2, MARGIN)
    assert "batch=2, length=0, not bound to a memory, margin=5, croppable=0" in repr(state)
    state.bind(ORDER, WINDOWS).extend(np.ones((2, 9), np.int64))
    expected = "batch=2, length=9, order=3, layers=[1, 4, 7], margin=5, croppable=5"
    assert repr(state) == f"SequenceState({expected})"
    assert "length=7" in repr(state.crop(2)) and "croppable=3" in repr(state)
