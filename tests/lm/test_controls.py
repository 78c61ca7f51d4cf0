"""Controls: each memory lacks one thing, and has everything else."""

import numpy as np
import pytest
import torch

from engraphy import VocabMap
from engraphy.addresses import HotIndex, Ngrams
from engraphy.data.packing import Batches
from engraphy.errors import ConfigError, InputError
from engraphy.lm import LM, LMConfig, MemorySizes, count_parameters, memory_arm
from engraphy.lm.controls import (
    CONTROLS,
    add_adapters,
    add_convs,
    fixed_gate,
    hashed,
    make_memory,
)
from engraphy.lm.loop import Run, TrainConfig
from engraphy.lm.model import _document_mask
from engraphy.memory import Trace

V = 64
MOE = LMConfig(
    V,
    16,
    layers=2,
    heads=2,
    ffn=40,
    moe_layers=(0, 1),
    experts=8,
    top_k=2,
    expert_ffn=12,
    shared_ffn=60,
)
SIZES = MemorySizes(heads=2, dim=2)
VOCAB = VocabMap(np.arange(V) // 2)


def made(control="", hot=None):
    vocab = hashed(VOCAB, control)
    arm = memory_arm(MOE, 0.5, SIZES, len(vocab), 1)
    torch.manual_seed(0)
    memory = make_memory(arm.memory, vocab, 0.02, 0, control, hot)
    return LM(arm.model, memory), arm


def batch():
    ids_BT = torch.from_numpy(np.random.default_rng(0).integers(0, V, (3, 10)))
    starts_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    starts_BT[:, 0] = True
    starts_BT[1, 4] = True
    return ids_BT, starts_BT


def row_ids(memory, ids_BT, starts_BT):
    trace = Trace()
    lookup = memory.lookup(ids_BT, starts=starts_BT, trace=trace)
    return trace.row_ids[1], lookup


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_has_the_weights_of_the_memory(control):
    memory, other = made()[0].state_dict(), made(control)[0].state_dict()
    assert memory.keys() == other.keys()
    same = {name for name in memory if torch.equal(memory[name], other[name])}
    assert {name for name in memory if "blocks" in name} <= same


@pytest.mark.parametrize("control", ["one-row", "frozen", "shuffled", "constant-gate"])
def test_a_control_has_the_counts_of_the_memory(control):
    model, arm = made()
    other, other_arm = made(control)
    assert other_arm.parameters.activated == arm.parameters.activated
    assert other_arm.parameters.total == pytest.approx(arm.parameters.total, rel=0.01)
    assert count_parameters(other) == other_arm.parameters


def test_one_row_gives_every_token_of_a_document_the_same_address():
    memory = made("one-row")[0].memory
    ids_BT, _ = batch()
    rows_BTC, _ = row_ids(memory, ids_BT, None)
    assert (rows_BTC == rows_BTC[:1, :1]).all()


def test_shuffled_addresses_are_those_of_the_sequence_before():
    ids_BT, starts_BT = batch()
    rows_BTC, _ = row_ids(made()[0].memory, ids_BT, starts_BT)
    other_BTC, lookup = row_ids(made("shuffled")[0].memory, ids_BT, starts_BT)
    assert np.array_equal(other_BTC, np.roll(rows_BTC, 1, 0))
    assert torch.equal(lookup.starts, starts_BT)  # of the reader


def test_shuffled_addresses_need_two_sequences():
    ids_BT, starts_BT = batch()
    with pytest.raises(InputError, match="two sequences or more"):
        made("shuffled")[0].memory.lookup(ids_BT[:1], starts=starts_BT[:1])


@pytest.mark.parametrize(("control", "learns"), [("", True), ("frozen", False)])
def test_a_frozen_table_keeps_its_rows_and_its_layer_learns(control, learns):
    model, _ = made(control)
    store = model.memory.stores[1]
    every = np.arange(store.info.rows)
    before, key = store.gather(every), model.memory.blocks["1"].key.weight.detach().clone()
    ids = np.random.default_rng(0).integers(2, V, 400).astype(np.int32)
    run = Run(model, Batches([ids], 1, batch=2, tokens=16, seed=0), TrainConfig(64, lr=0.01))
    for _ in range(2):
        run.step()
    assert (store.gather(every) != before).any() == learns
    assert not torch.equal(model.memory.blocks["1"].key.weight, key)


def test_an_adapter_has_the_activated_parameters_of_a_memory():
    arm = memory_arm(MOE, 0.5, SIZES, len(VOCAB), 1)
    model = LM(arm.model)
    add_adapters(model, arm.memory)
    counted = count_parameters(model)
    assert counted.activated == pytest.approx(arm.parameters.activated, rel=0.01)
    assert counted.table == 0
    ids_BT, starts_BT = batch()
    model(ids_BT, starts_BT).sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks[1].adapter.parameters())
    model.train()
    model.rebalance()  # finds the experts behind the adapter


def test_raw_ids_are_hashed_without_compression():
    assert len(hashed(VOCAB)) == V // 2
    assert len(hashed(VOCAB, "uncompressed")) == V


def test_an_unknown_control_is_an_error():
    with pytest.raises(ConfigError, match="expected one of one-row, .*found 'no-rows'"):
        hashed(VOCAB, "no-rows")


# --- rows that are changed in training ------------------------------------------------------------


def hot_bigrams():
    """The bigrams of every second token of the batch."""
    ids_BT, _ = batch()
    compressed_BT = VOCAB.table[ids_BT.numpy()]
    pairs = np.stack([compressed_BT[0, :-1:2], compressed_BT[0, 1::2]], axis=-1)
    return HotIndex.build(Ngrams({2: np.unique(pairs, axis=0)}, VOCAB.digest))


def read(control, training=True, noise=0.5):
    model, _ = made(control, hot_bigrams())
    memory = model.memory.train(training)
    memory.noise = noise
    trace = Trace()
    lookup = memory.lookup(*batch()[:1], trace=trace)
    return memory, lookup.rows[1], trace


def test_noise_is_added_to_the_rows_of_hot_ngrams_and_only_in_training():
    _, plain_BTE, trace = read("")
    assert torch.equal(read("noise", training=False)[1], plain_BTE)
    memory, noisy_BTE, _ = read("noise")
    plain_BTE = plain_BTE.detach()
    assert torch.equal(read("noise")[1], noisy_BTE)  # the draw follows from the ids
    changed_BTC = (noisy_BTE != plain_BTE).view(*noisy_BTE.shape[:2], 4, -1).any(-1)
    hot_BTC = torch.from_numpy(np.stack([trace.routes[2]] * 2 + [trace.routes[3]] * 2, -1))
    assert hot_BTC.any() and torch.equal(changed_BTC, hot_BTC)
    noise = (noisy_BTE.detach() - plain_BTE).view(*changed_BTC.shape, -1)[hot_BTC]
    rows = plain_BTE.view(*changed_BTC.shape, -1)[hot_BTC]
    assert float(noise.std() / rows.square().mean().sqrt()) == pytest.approx(0.5, rel=0.3)
    noisy_BTE.sum().backward()
    assert len(memory.drain_row_grads()) == 1  # and the rows learn


def test_dropout_drops_whole_rows_and_scales_the_others():
    _, plain_BTE, _ = read("")
    memory, rows_BTE, _ = read("dropout")
    ratio_BTCd = (rows_BTE / plain_BTE).view(*rows_BTE.shape[:2], 4, -1)
    dropped_BTC = (ratio_BTCd == 0).all(-1)
    assert 0 < int(dropped_BTC.sum()) < dropped_BTC.numel() / 3
    kept = ratio_BTCd[~dropped_BTC]
    assert torch.allclose(kept, torch.full_like(kept, 1 / (1 - memory.dropout)))
    assert torch.equal(read("dropout", training=False)[1], plain_BTE)


def test_a_fixed_gate_lets_nothing_or_everything_in_and_is_gone_afterwards():
    model, _ = made()
    model.eval()
    ids_BT, starts_BT = batch()
    own = model(ids_BT, starts_BT)
    with model.memory.disabled():
        bare = model(ids_BT, starts_BT)
    with fixed_gate(model.memory, 0.0):
        assert torch.allclose(model(ids_BT, starts_BT), bare, atol=1e-6)
    trace = Trace()
    with fixed_gate(model.memory, 1.0):
        opened = model(ids_BT, starts_BT, trace=trace)
    assert (trace.gates[1] == 1).all() and not torch.equal(opened, own)
    assert torch.equal(model(ids_BT, starts_BT), own)


# --- the conv alone -------------------------------------------------------------------------------


def convolved_model(kernel=3, dilation=2):
    torch.manual_seed(0)
    model = LM(MOE)
    plain = model(*batch())
    add_convs(model, (1,), kernel, dilation)
    return model, plain


def test_a_fresh_conv_changes_nothing():
    model, plain = convolved_model()
    assert torch.equal(model(*batch()), plain)
    learned = count_parameters(model).total - count_parameters(LM(MOE)).total
    assert learned == MOE.hidden_size + 3 * MOE.hidden_size  # norm and taps


def test_the_conv_reads_its_own_positions_of_its_own_document_alone():
    model, _ = convolved_model()
    model.eval()
    block = model.blocks[1]
    block.conv.data.normal_()
    block.block = Untouched()  # what is left is the conv
    x_BTD = torch.randn(1, 10, MOE.hidden_size, requires_grad=True)
    starts_BT = torch.zeros(1, 10, dtype=torch.bool)
    starts_BT[0, 5] = True
    mask = _document_mask(starts_BT)
    for position, read in ((4, {0, 2, 4}), (6, {6}), (9, {5, 7, 9})):
        (slope,) = torch.autograd.grad(block(x_BTD, None, mask)[0, position].sum(), x_BTD)
        assert set(slope[0].abs().sum(-1).nonzero().flatten().tolist()) == read
    (slope,) = torch.autograd.grad(block(x_BTD, None, None)[0, 6].sum(), x_BTD)
    assert set(slope[0].abs().sum(-1).nonzero().flatten().tolist()) == {2, 4, 6}


def test_a_conv_has_no_cache_and_needs_taps():
    model, _ = convolved_model()
    with pytest.raises(InputError, match="conv: expected a forward over the whole text"):
        model(batch()[0], cache=model.new_cache(3))
    with pytest.raises(ConfigError, match="kernel of at least 1"):
        add_convs(LM(MOE), (1,), 0, 3)


class Untouched(torch.nn.Module):
    def forward(self, x, *_):
        return x
