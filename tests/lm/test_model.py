"""The reference model: what may see what, losses, decoding, saving."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, Trace, VocabMap
from engraphy.errors import ConfigError, InputError
from engraphy.lm import LM, LMConfig
from engraphy.lm.cross_entropy import mean_cross_entropy, token_cross_entropy

VOCAB, HIDDEN, DIM = 50, 24, 4
DENSE = LMConfig(VOCAB, HIDDEN, layers=3, heads=2, ffn=20, max_tokens=32)
MOE = dataclasses.replace(DENSE, moe_layers=(1, 2), experts=4, top_k=2, expert_ffn=8, shared_ffn=10)


def make_memory(
    layers: tuple[int, ...] = (1,), hidden: int = HIDDEN, streams: int = 1
) -> EngramMemory:
    """A memory that says something: rows, conv and value projection are not zero."""
    spec = HashSpec.demo(layers, (2, 3), 2, 53, vocab_size=30, pad_id=0)
    config = EngramConfig(spec, LayerSpec(hidden, spec.columns * DIM, streams), DIM)
    memory = EngramMemory(config, VocabMap(np.arange(VOCAB) % 30))
    memory.init_rows(std=1.0, seed=0)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return memory


def make(config: LMConfig = MOE, memory: bool = True, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    return LM(config, make_memory() if memory else None).eval()


def sample(
    batch: int = 3, tokens: int = 16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=random)
    targets = torch.randint(0, VOCAB, (batch, tokens), generator=random)
    return ids, targets, torch.rand(batch, tokens, generator=random) < 0.2


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("config", [DENSE, MOE])
def test_packed_documents_get_the_logits_that_each_gets_alone(config, memory):
    model, (ids, _, _) = make(config, memory), sample(batch=1, tokens=20)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 7, 8, 15]] = True
    packed = model(ids, starts)
    for begin, end in ((0, 7), (7, 8), (8, 15), (15, 20)):
        torch.testing.assert_close(
            packed[:, begin:end], model(ids[:, begin:end]), rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(packed[:, 8:], model(ids)[:, 8:], atol=1e-3)


@pytest.mark.parametrize("memory", [False, True])
def test_a_later_token_changes_no_earlier_logits(memory):
    model, (ids, _, starts) = make(memory=memory), sample()
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % VOCAB
    before, after = model(ids, starts), model(changed, starts)
    # Not bit for bit: other tokens make other groups of experts, and so other matmul shapes.
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-5)
    assert not torch.equal(before[:, 9], after[:, 9])


def test_a_first_start_changes_nothing():
    model, (ids, _, _) = make(), sample()
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    torch.testing.assert_close(model(ids, starts), model(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_cross_entropy_of_the_logits(tied):
    model = make(dataclasses.replace(MOE, tie_embeddings=tied))
    ids, targets, starts = sample()
    targets[0, :5] = -100
    weights = list(model.parameters())
    loss = model.loss(ids, targets, starts)
    plain = F.cross_entropy(model(ids, starts).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, plain)
    for found, expected in zip(
        torch.autograd.grad(3 * loss, weights), torch.autograd.grad(3 * plain, weights), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_cross_entropy_in_chunks_equals_whole_logits_when_fresh_buffers_are_poisoned():
    torch.manual_seed(0)
    x, weight = torch.randn(600, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    target = torch.randint(0, 30, (600,))
    target[::7] = -100
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        loss = mean_cross_entropy(x, weight, target)
        found = torch.autograd.grad(loss, (x, weight))
        losses = token_cross_entropy(x, weight, target)
    finally:
        torch.use_deterministic_algorithms(False)
    plain = F.cross_entropy(x @ weight.t(), target)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(
        losses, F.cross_entropy(x @ weight.t(), target, reduction="none").detach()
    )
    for ours, expected in zip(found, torch.autograd.grad(plain, (x, weight)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_token_losses_average_to_the_loss_and_are_zero_where_ignored():
    model, (ids, targets, starts) = make(), sample()
    targets[1, 3:] = -100
    losses, kept = model.token_losses(ids, targets, starts), targets >= 0
    assert losses.shape == ids.shape and not losses.requires_grad
    torch.testing.assert_close(losses[kept].mean(), model.loss(ids, targets, starts).detach())
    assert (losses[~kept] == 0).all() and (losses[kept] > 0).all()


@pytest.mark.parametrize("memory", [False, True])
def test_autocast_to_bfloat16_stays_close_and_gives_gradients(memory):
    model, (ids, targets, starts) = make(memory=memory).train(), sample()
    plain = model.loss(ids, targets, starts)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets, starts)
        losses = model.token_losses(ids, targets, starts)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0.02)
    assert losses.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_reaches_the_rows_and_the_memory_is_applied_before_its_block():
    model, (ids, targets, starts) = make().train(), sample()
    assert model.memory is not None
    seen: dict[str, torch.Tensor] = {}
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.update(before=out))
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.update(after=args[0]))
    model.loss(ids, targets, starts).backward()
    (grad,) = model.memory.drain_row_grads()
    assert grad.layer == 1 and np.abs(grad.grad).sum() > 0
    lookup = model.memory.lookup(ids, starts=starts)
    expected = model.memory.apply(1, seen["before"][:, :, None], lookup)[:, :, 0]
    torch.testing.assert_close(seen["after"], expected)
    assert not torch.allclose(seen["after"], seen["before"])


def test_a_trace_holds_what_the_memory_did():
    model, (ids, _, starts) = make(), sample()
    trace = Trace()
    traced = model(ids, starts, trace=trace)
    assert torch.equal(traced, model(ids, starts))
    assert trace.gates[1].shape == (3, 16, 1) and trace.row_ids[1].shape == (3, 16, 4)


def test_greedy_decoding_takes_the_likeliest_token_at_each_step():
    model = make()
    prompt = [3, 1, 4]
    found = model.generate(prompt, 5)
    assert len(found) == 5
    for length in range(5):
        row = torch.tensor([prompt + found[:length]])
        assert found[length] == int(model(row)[0, -1].argmax())


def test_sampling_repeats_with_its_seed_and_stays_within_the_top_k():
    model = make()
    first = model.generate([3, 1, 4], 12, temperature=2.0, seed=5)
    assert first == model.generate([3, 1, 4], 12, temperature=2.0, seed=5)
    assert first != model.generate([3, 1, 4], 12, temperature=2.0, seed=6)
    assert model.generate([3, 1, 4], 5, temperature=2.0, top_k=1, seed=5) == model.generate(
        [3, 1, 4], 5
    )


def test_decoding_stops_before_the_stop_token_and_outlives_the_longest_row():
    model = make()
    found = model.generate([3, 1, 4], 40)
    assert len(found) == 40 > model.config.max_tokens
    stop = found[2]
    assert model.generate([3, 1, 4], 40, stop_id=stop) == found[: found.index(stop)]


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([], {}, "prompt_ids"),
        ([VOCAB], {}, "ids"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": 1.0, "top_k": 0}, "top_k"),
    ],
)
def test_decoding_that_cannot_be_meant_is_refused(prompt, options, named):
    with pytest.raises(InputError, match=named):
        make().generate(prompt, 3, **options)


def test_weights_survive_a_file_and_tied_embeddings_are_stored_once(tmp_path):
    for config in (MOE, dataclasses.replace(DENSE, tie_embeddings=True)):
        model, other = make(config, seed=0).train(), make(config, seed=1)
        ids, targets, starts = sample()
        model.loss(ids, targets, starts).backward()  # moves the balance of the experts
        save_file(model.eval().state_dict(), tmp_path / "model.safetensors")
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(model(ids, starts), other(ids, starts))


def test_max_load_tells_the_fullest_expert_of_the_last_training_step():
    assert make(DENSE).max_load() is None
    model, (ids, targets, starts) = make().train(), sample()
    assert model.max_load() is None
    model.loss(ids, targets, starts)
    model.rebalance()
    told = model.max_load()
    assert told is not None and 1 <= told <= MOE.experts / MOE.top_k
    with torch.no_grad():
        model.eval()(ids[:, :2])
    assert model.max_load() == told


def test_config_survives_json():
    assert LMConfig.from_json(json.loads(json.dumps(MOE.to_json()))) == MOE
    with pytest.raises(ConfigError, match="LMConfig"):
        LMConfig.from_json({**MOE.to_json(), "depth": 3})


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 5},
        {"heads": 8},
        {"layers": 0},
        {"vocab_size": 2.5},
        {"moe_layers": (3,)},
        {"moe_layers": (1, 1)},
        {"top_k": 5},
        {"experts": 0},
        {"moe_layers": ()},
        {"eps": 0.0},
        {"shared_ffn": -1},
    ],
)
def test_sizes_that_do_not_fit_are_refused(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(MOE, **change)


@pytest.mark.parametrize(
    "memory",
    [
        {"hidden": 12},
        {"streams": 2},
        {"layers": (1, 3)},
    ],
)
def test_a_memory_for_another_model_is_refused(memory):
    with pytest.raises(ConfigError, match="memory"):
        LM(MOE, make_memory(**memory))


def test_wrong_inputs_are_named():
    model, (ids, targets, starts) = make(), sample()
    for bad in (
        ids + VOCAB,
        ids - VOCAB,
        ids.int(),
        ids[0],
        torch.zeros(1, 33, dtype=torch.int64),
        ids[:, :0],
    ):
        with pytest.raises(InputError, match="ids"):
            model(bad)
    for bad in (starts.int(), starts[:, :4]):
        with pytest.raises(InputError, match="starts"):
            model(ids, bad)
    for bad in (targets[:, :4], targets.int(), targets + VOCAB, targets - VOCAB):
        with pytest.raises(InputError, match="targets"):
            model.loss(ids, bad, starts)
    with pytest.raises(InputError, match="trace"):
        make(memory=False)(ids, trace=Trace())
