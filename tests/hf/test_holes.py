"""Holes in a mask: a sequence with holes is the sequence without them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import Trace
from engraphy.errors import InputError
from engraphy.memory.state import SequenceState
from tests.memory.test_memory import HIDDEN, make_memory, run, sample

TOKENS = 23


def holes(batch: int, seed: int, share: float = 0.4) -> torch.Tensor:
    return torch.rand(batch, TOKENS, generator=torch.Generator().manual_seed(seed)) >= share


def assert_equals_the_bare_sequences(memory, out, ids, x, present, **flags) -> None:
    for b in range(len(ids)):
        there = present[b]
        own = {name: flag[b : b + 1, there] for name, flag in flags.items()}
        bare = run(memory, ids[b : b + 1, there], x[b : b + 1, there], **own)
        torch.testing.assert_close(out[b : b + 1, there], bare, rtol=0, atol=1e-9)


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, TOKENS), max_size=8),
    st.booleans(),
    st.sampled_from([1, 3]),
)
def test_holes_in_any_chunks_equal_one_forward_over_the_sequence_without_them(
    seed, cuts, flagged, streams
):
    memory, (ids, x) = make_memory(streams), sample(3, TOKENS, streams, seed)
    present, flags = holes(3, seed), {}
    if flagged:
        flags = {"live": holes(3, seed + 1, 0.2), "starts": ~holes(3, seed + 2, 0.1)}
    ids[~present] = -5  # what stands at a hole may be anything
    assert_equals_the_bare_sequences(
        memory, run(memory, ids, x, present=present, **flags), ids, x, present, **flags
    )
    state, parts, ends = memory.state(3), [], [0, *sorted({*cuts, TOKENS})]
    for first, last in zip(ends, ends[1:], strict=False):
        part = slice(first, last)
        own = {name: flag[:, part] for name, flag in flags.items()}
        parts.append(run(memory, ids[:, part], x[:, part], state, present=present[:, part], **own))
    assert_equals_the_bare_sequences(memory, torch.cat(parts, 1), ids, x, present, **flags)


def test_single_tokens_after_a_hole_equal_the_sequence_without_it():
    memory, (ids, x) = make_memory(), sample(2, TOKENS)
    present = torch.ones(2, TOKENS, dtype=torch.bool)
    present[0, 5:8] = present[1, 9] = False
    state = memory.state(2)
    with torch.no_grad():
        parts = [run(memory, ids[:, :10], x[:, :10], state, present=present[:, :10])]
        parts += [run(memory, ids[:, t : t + 1], x[:, t : t + 1], state) for t in range(10, TOKENS)]
    assert_equals_the_bare_sequences(memory, torch.cat(parts, 1), ids, x, present)


def test_tokens_and_holes_are_taken_back_as_they_stand():
    memory, (ids, x) = make_memory(), sample(2, TOKENS)
    present = holes(2, 3)
    state = memory.state(2, margin=6)
    run(memory, ids[:, :12], x[:, :12], state, present=present[:, :12])
    wrong_ids, wrong_x = sample(2, 6, seed=9)
    run(memory, wrong_ids, wrong_x, state, present=holes(2, 8)[:, :6])
    state.crop(6)
    rest = run(memory, ids[:, 12:], x[:, 12:], state, present=present[:, 12:])
    for b in range(2):
        whole, later = (
            run(memory, ids[b : b + 1, present[b]], x[b : b + 1, present[b]]),
            present[b, 12:],
        )
        torch.testing.assert_close(
            rest[b : b + 1, later], whole[:, -int(later.sum()) :], rtol=0, atol=1e-9
        )


def test_a_dead_position_still_stops_the_look_back_where_a_hole_does_not():
    memory, (ids, x) = make_memory(), sample(1, 8)
    flag = torch.ones(1, 8, dtype=torch.bool)
    flag[0, 4] = False
    hole, dead = run(memory, ids, x, present=flag), run(memory, ids, x, live=flag)
    assert (hole[:, 5] - dead[:, 5]).abs().max() > 1e-3


def test_nothing_is_added_at_a_hole_and_the_trace_names_positions_as_they_stand():
    memory, (ids, x) = make_memory(), sample(1, 9)
    present = torch.ones(1, 9, dtype=torch.bool)
    present[0, 3] = False
    lookup = memory.lookup(ids, trace=(trace := Trace()), present=present)
    out = memory.apply(1, x, lookup)
    assert torch.equal(out[:, 3], x[:, 3]) and (trace.gates.get(1, torch.ones(1))[0, 3] == 0).all()
    bare = Trace()
    memory.lookup(ids[:, present[0]], trace=bare)
    for layer in memory.layers:
        assert (trace.row_ids[layer][:, present[0].numpy()] == bare.row_ids[layer]).all()


def test_gradients_of_rows_and_weights_are_those_of_the_sequence_without_holes():
    grads = []
    for bare in (False, True):
        memory, (ids, x) = make_memory().train(), sample(1, TOKENS)
        present = holes(1, 4)
        if bare:
            out = run(memory, ids[:, present[0]], x[:, present[0]])
        else:
            out = run(memory, ids, x, present=present)[:, present[0]]
        out.square().sum().backward()
        rows = torch.zeros(memory.stores[1].info.rows, 4)
        for layer, row_ids, grad in memory.drain_row_grads():
            if layer == 1:
                rows.index_add_(0, torch.from_numpy(row_ids), torch.from_numpy(grad))
        grads.append([rows, *(parameter.grad for parameter in memory.parameters())])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=1e-5 if found is grads[0][0] else 1e-9
        )


def test_joined_states_decode_as_each_by_itself():
    memory = make_memory()
    (long_ids, long_x), (short_ids, short_x) = sample(1, 17, seed=1), sample(2, 9, seed=2)
    states = [memory.state(1), memory.state(2)]
    run(memory, long_ids[:, :14], long_x[:, :14], states[0])
    run(memory, short_ids[:, :6], short_x[:, :6], states[1])
    joined = SequenceState.join(states)
    steps = []
    with torch.no_grad():
        for step in range(3):
            ids = torch.cat([long_ids[:, 14 + step, None], short_ids[:, 6 + step, None]])
            x = torch.cat([long_x[:, 14 + step, None], short_x[:, 6 + step, None]])
            steps.append(run(memory, ids, x, joined))
    out = torch.cat(steps, 1)
    torch.testing.assert_close(out[:1], run(memory, long_ids, long_x)[:, 14:], rtol=0, atol=1e-9)
    torch.testing.assert_close(out[1:], run(memory, short_ids, short_x)[:, 6:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("present", [torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)])
def test_present_has_to_be_a_flag_for_each_position(present):
    memory, state = make_memory(), None
    with pytest.raises(InputError, match=r"present: expected bool \[2, 3\]"):
        memory.lookup(torch.zeros(2, 3, dtype=torch.long), state, present=present)


def test_a_chunk_of_nothing_but_holes_leaves_everything_as_it_was():
    memory, (ids, x) = make_memory(), sample(1, 10)
    state = memory.state(1)
    run(memory, ids[:, :6], x[:, :6], state)
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert run(memory, ids[:, :4], x[:, :4], state, present=nothing).shape == (1, 4, 1, HIDDEN)
    rest = run(memory, ids[:, 6:], x[:, 6:], state)
    torch.testing.assert_close(rest, run(memory, ids, x)[:, 6:], rtol=0, atol=1e-9)
