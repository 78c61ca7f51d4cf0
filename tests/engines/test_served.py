"""A memory in the forwards of an engine gives each request what one forward over it gives, whatever
the engine's schedule."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from engraphy import EngramConfig, EngramMemory, _native
from engraphy.addresses.vocab import VocabMap
from engraphy.engines.chunks import Chunks, past_slots
from engraphy.engines.served import ServedMemory, Step
from engraphy.engines.slots import Slots, slot_bytes, slot_width
from engraphy.errors import ConfigError, DigestMismatch, InputError, StoreError
from tests.tools.paged_engine import PagedEngine
from tests.tools.tiny_model import fill

VOCAB = 50


def make_memory(kernel: int = 4) -> EngramMemory:
    model = dict(num_hidden_layers=4, hidden_size=16, vocab_size=VOCAB, pad_token_id=0)
    config = EngramConfig.for_model(
        model, layers=(1, 2), heads=2, rows_per_head=31, dim=8, kernel=kernel
    )
    memory = fill(EngramMemory(config, VocabMap.identity(VOCAB)))
    return memory.eval().requires_grad_(False)


def serve(memory: EngramMemory, lines: int) -> ServedMemory:
    """Slots start with values that spoil every result that they reach."""
    served = ServedMemory(memory, torch.device("cpu"), torch.float32)
    served.bind(torch.full((lines // 4, 4, slot_width(memory.config)), 7e4))
    return served


def expected(memory: EngramMemory, ids: list[int], hidden_VD: torch.Tensor) -> torch.Tensor:
    """What one forward over a request gives in each layer, [layers, T, D]."""
    ids_1T = torch.tensor([ids])
    lookup = memory.lookup(ids_1T)
    outs = [memory.fuse(layer, hidden_VD[ids_1T] + layer, lookup)[0] for layer in memory.layers]
    return torch.stack(outs)


@pytest.mark.parametrize("kernel", [4, 0], ids=["conv", "no-conv"])
def test_any_schedule_gives_what_one_forward_gives(kernel):
    memory = make_memory(kernel)
    hidden_VD = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(1))
    counts = Counter()
    for seed in range(6):
        engine = PagedEngine(seed, blocks=14, block_size=4, vocab=VOCAB, past=9 if kernel else 2)
        served = serve(memory, 56)
        wanted = [expected(memory, request.ids, hidden_VD) for request in engine.requests]
        while engine.unfinished():
            plan = engine.schedule()
            out_LND = run(served.begin(plan.chunks), served, hidden_VD, plan.chunks)
            outs = out_LND.split(plan.lengths, dim=1)
            for out_LTD, (request, first, last) in zip(outs, plan.parts, strict=True):
                torch.testing.assert_close(out_LTD, wanted[request][:, first:last])
        counts.update(engine.counts)
    assert len(counts) == 5 and min(counts.values()) > 0, counts


@pytest.mark.skipif(_native.core is None, reason="torch's sums depend on the shape")
def test_a_token_gives_the_same_bits_in_every_batch():
    memory = make_memory()
    hidden_VD = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(1, VOCAB, (24,), generator=torch.Generator().manual_seed(2))
    whole = Chunks(ids, np.array([0, 24]), np.arange(24), np.full((1, 9), -1))
    served = serve(memory, 24)
    wanted_LTD = run(served.begin(whole), served, hidden_VD, whole)
    for cuts in ([0, 1, 2, 3, 24], [0, 5, 20, 24], [0, 17, 18, 24]):
        served = serve(memory, 24)
        for first, last in zip(cuts, cuts[1:], strict=False):
            past_RP = past_slots(np.arange(6)[None], 4, np.array([first]), 9)
            chunk = Chunks(
                ids[first:last], np.array([0, last - first]), np.arange(first, last), past_RP
            )
            out_LTD = run(served.begin(chunk), served, hidden_VD, chunk)
            assert torch.equal(out_LTD, wanted_LTD[:, first:last])


def test_a_wrong_past_is_noticed():
    memory = make_memory()
    hidden_VD = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(1))
    ids = [3, 4, 5, 6, 7, 8]
    wanted_LTD = expected(memory, ids, hidden_VD)
    for wrong in (False, True):
        served = serve(memory, 8)
        past_RP = np.full((1, served.past), -1)
        first = Chunks(torch.tensor(ids[:3]), np.array([0, 3]), np.arange(3), past_RP)
        run(served.begin(first), served, hidden_VD, first)
        past_RP = past_slots(np.arange(2)[None], 4, np.array([3 - wrong]), served.past)
        second = Chunks(torch.tensor(ids[3:]), np.array([0, 3]), np.arange(3, 6), past_RP)
        out_LTD = run(served.begin(second), served, hidden_VD, second)
        assert torch.allclose(out_LTD, wanted_LTD[:, 3:], atol=1e-5) is not wrong


def run(step: Step, served: ServedMemory, hidden_VD: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    outs = [step.fuse(layer, hidden_VD[chunks.ids_N] + layer) for layer in served.layers]
    return torch.stack(outs)


def test_lines_behind_the_last_token_stay():
    memory = make_memory()
    served = serve(memory, 8)
    chunks = Chunks(torch.tensor([3]), np.array([0, 1]), np.array([0]), np.full((1, 9), -1))
    x_ND = torch.randn(4, 16)
    out_ND = served.begin(chunks).fuse(1, x_ND)
    assert torch.equal(out_ND[1:], x_ND[1:])
    assert not torch.equal(out_ND[0], x_ND[0])


def test_the_slots_before_each_token_are_those_of_its_request():
    past_RP = np.array([[4, 5], [-1, -1], [-1, 3]])
    chunks = Chunks(torch.zeros(6), np.array([0, 2, 3, 6]), np.array([6, 7, 2, 3, 4, 5]), past_RP)
    assert chunks.before(np.array([2, 1, 0])).tolist() == [
        *([4, 5, 6], [5, 6, 7]),
        [-1, -1, 2],
        *([-1, 3, 3], [3, 3, 4], [3, 4, 5]),
    ]


def test_past_slots_follow_the_block_table():
    blocks_RM = np.array([[5, 2], [9, 0]], dtype=np.int32)
    slots_RP = past_slots(blocks_RM, 4, np.array([6, 1]), 3)
    assert slots_RP.tolist() == [[23, 8, 9], [-1, -1, 36]]


@pytest.mark.parametrize("bounds", [[0, 2], [1, 2, 3], [0, 3, 3], [0, 1, 2]], ids=str)
def test_wrong_bounds_are_named(bounds):
    with pytest.raises(InputError, match="chunks: expected"):
        Chunks(torch.zeros(3), np.array(bounds), np.arange(3), np.full((2, 2), -1))


def test_a_slot_takes_an_id_and_the_conv_inputs():
    assert slot_bytes(make_memory().config) == 4 + 2 * 16 * 4
    assert slot_bytes(make_memory(kernel=0).config) == 4


def test_slots_of_another_width_are_named():
    config = make_memory().config
    with pytest.raises(InputError, match=r"float32 \[blocks, lines, 33\]"):
        Slots(config, torch.zeros(2, 4, 32))
    with pytest.raises(InputError, match="side by side"):
        Slots(config, torch.zeros(2, 33, 4).transpose(1, 2))


def test_a_forward_before_the_slots_is_named():
    served = ServedMemory(make_memory(), torch.device("cpu"), torch.float32)
    chunks = Chunks(torch.tensor([3]), np.array([0, 1]), np.array([0]), np.full((1, 9), -1))
    with pytest.raises(StoreError, match="before the first forward"):
        served.begin(chunks)


def test_another_layer_is_named():
    served = serve(make_memory(), 8)
    chunks = Chunks(torch.tensor([3]), np.array([0, 1]), np.array([0]), np.full((1, 9), -1))
    with pytest.raises(ConfigError, match="layer 3 has no memory"):
        served.begin(chunks).fuse(3, torch.zeros(1, 16))


def test_another_memory_is_served_from_the_next_forward_on():
    served = serve(make_memory(), 8)
    old, new = served.memory, make_memory()
    fill(new, seed=9).eval()
    served.replace(new)
    hidden_VD = torch.randn(VOCAB, 16)
    chunks = Chunks(torch.tensor([3, 4]), np.array([0, 2]), np.arange(2), np.full((1, 9), -1))
    out_LTD = run(served.begin(chunks), served, hidden_VD, chunks)
    torch.testing.assert_close(out_LTD, expected(new, [3, 4], hidden_VD))
    with pytest.raises(StoreError, match="closed"):
        old.lookup(torch.tensor([[3]]))


def test_a_memory_of_other_addresses_is_refused_and_closed():
    served = serve(make_memory(), 8)
    other = make_memory(kernel=0)
    with pytest.raises(DigestMismatch, match="and the same layers"):
        served.replace(other)
    with pytest.raises(StoreError, match="closed"):
        other.lookup(torch.tensor([[3]]))
    chunks = Chunks(torch.tensor([3]), np.array([0, 1]), np.array([0]), np.full((1, 9), -1))
    served.begin(chunks).fuse(1, torch.zeros(1, 16))
