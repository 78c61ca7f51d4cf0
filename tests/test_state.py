"""state.py: whatever is done to a state, it equals one that was given the resulting sequences at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy.errors import ConfigError, InputError, StateTooShort
from engraphy.state import SequenceState

ORDER, MARGIN, WINDOWS = 3, 5, {1: 6, 4: 3, 7: 0}
STREAMS, HIDDEN = 2, 3


@dataclass
class Sequences:
    """Everything that a batch has seen, in full: the plain version of a state."""

    ids: np.ndarray
    live: np.ndarray
    starts: np.ndarray
    inputs: torch.Tensor
    room: int = field(default=0)

    @classmethod
    def none(cls, batch: int) -> Sequences:
        return cls(np.empty((batch, 0), np.int64), np.empty((batch, 0), bool), np.empty((batch, 0), bool),
                   torch.empty(batch, 0, STREAMS, HIDDEN))

    @classmethod
    def random(cls, batch: int, tokens: int, seed: int, flags: bool = True) -> Sequences:
        rng = np.random.default_rng(seed)
        live = rng.random((batch, tokens)) < (0.8 if flags else 2.0)
        starts = rng.random((batch, tokens)) < (0.15 if flags else -1.0)
        inputs = torch.from_numpy(rng.standard_normal((batch, tokens, STREAMS, HIDDEN)).astype(np.float32))
        return cls(np.where(live, rng.integers(0, 99, (batch, tokens)), -7), live, starts, inputs)

    def map(self, change) -> Sequences:
        return Sequences(change(self.ids), change(self.live), change(self.starts), change(self.inputs), self.room)

    def then(self, chunk: Sequences) -> Sequences:
        room = min(MARGIN, self.room + chunk.ids.shape[1])
        joined = (np.concatenate([a, b], axis=1) for a, b in (
            (self.ids, chunk.ids), (self.live, chunk.live), (self.starts, chunk.starts)))
        return Sequences(*joined, torch.cat([self.inputs, chunk.inputs], dim=1), room)

    def history(self) -> np.ndarray:
        out = np.full((len(self.ids), ORDER - 1), -1)
        for b, row in enumerate(self.ids):
            for back in range(1, ORDER):
                t = len(row) - back
                if t < 0:
                    break
                out[b, -back] = row[t] if self.live[b, t] else -1
                if self.starts[b, t]:
                    break
        return out

    def window(self, size: int) -> torch.Tensor:
        out = torch.zeros(len(self.ids), size, STREAMS, HIDDEN)
        for b, row in enumerate(self.inputs):
            for back in range(1, size + 1):
                t = len(row) - back
                if t < 0:
                    break
                out[b, -back] = row[t]
                if self.starts[b, t]:
                    break
        return out


def new(batch: int) -> SequenceState:
    return SequenceState(batch, MARGIN, order=ORDER, windows=WINDOWS)


def feed(state: SequenceState, chunk: Sequences, layers=tuple(WINDOWS)) -> None:
    state.extend(chunk.ids, chunk.live, chunk.starts)
    push(state, chunk, layers)


def push(state: SequenceState, chunk: Sequences, layers=tuple(WINDOWS)) -> None:
    for layer in layers:
        state.push(layer, chunk.inputs, torch.from_numpy(chunk.starts))


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
    st.tuples(st.just("crop"), st.integers(0, MARGIN + 1)),
    st.tuples(st.sampled_from(["reorder", "select"]), st.lists(st.integers(0, 99), min_size=1, max_size=4)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("clone")),
)


@settings(max_examples=100)
@given(st.integers(1, 3), st.lists(STEP, max_size=12))
def test_any_sequence_of_steps_equals_a_state_built_from_the_resulting_sequences(batch, steps):
    state, truth = new(batch), Sequences.none(batch)
    for name, *arguments in steps:
        if name == "extend":
            chunk = Sequences.random(state.batch, *arguments)
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
            truth = truth.map(lambda values, n=arguments[0]: values[np.repeat(np.arange(len(values)), n)])
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


def test_before_the_latest_start_and_at_dead_positions_there_is_nothing():
    state = SequenceState(3, order=4, windows={})
    state.extend([[5, 6, 7], [5, 6, 7], [5, 6, 7]], live=np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool),
                 starts=np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]], bool))
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
    with pytest.raises(StateTooShort, match=f"asked to take back 1 tokens, 0 are possible.*margin is {MARGIN}"):
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
        torch.testing.assert_close(state.window(layer), first.window(WINDOWS[layer]), rtol=0, atol=0)
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
    chunks = [[Sequences.random(1, 3, seed) for seed in (request, 10 + request)] for request in range(2)]
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
    assert state._windows[1].inputs.untyped_storage().size() <= 2 * (WINDOWS[1] + MARGIN) * STREAMS * HIDDEN * 4
    assert state._past.ids.size <= 2 * (ORDER - 1 + MARGIN) and state._past.ids.shape == state._past.starts.shape


def test_a_state_without_sizes_is_bound_by_its_first_memory_and_by_no_other():
    state = SequenceState(1)
    assert state.margin == 64
    with pytest.raises(InputError, match="not bound"):
        state.extend([[1]])
    state.bind(ORDER, WINDOWS).bind(ORDER, WINDOWS)
    feed(state, Sequences.random(1, 2, 0))
    with pytest.raises(ConfigError, match="order 3 .* this one has order 4"):
        state.bind(4, WINDOWS)
    with pytest.raises(ConfigError, match="layer 2 has no memory"):
        state.window(2)


def test_an_order_of_one_has_no_history():
    state = SequenceState(2, 0, order=1, windows={0: 1})
    state.extend([[1, 2], [3, 4]]).push(0, torch.ones(2, 2, 1, 1))
    assert state.history.shape == (2, 0)
    assert state.window(0).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("ids", [[1, 2], [[1], [2], [3]], [[0.5], [1.0]], [[True], [False]], [["a"], ["b"]]])
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


@pytest.mark.parametrize("name", ["live", "starts"])
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


@pytest.mark.parametrize("arguments", [{"batch": -1}, {"batch": 2.0}, {"margin": -1}, {"margin": True}, {"order": 3},
                                       {"order": 0, "windows": {}}, {"order": 2, "windows": {0: -1}}])
def test_sizes_that_cannot_be_meant_are_refused(arguments):
    with pytest.raises(InputError, match="expected"):
        SequenceState(**{"batch": 1, **arguments})


def test_counts_that_cannot_be_meant_are_refused():
    for call in (lambda s: s.crop(-1), lambda s: s.crop(1.0), lambda s: s.repeat(0), lambda s: s.repeat(True)):
        with pytest.raises(InputError, match="expected a number"):
            call(new(1))
