"""The paper's models: printed totals, counted on the meta device; shrunken ones keep the recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engraphy import EngramMemory, VocabMap
from engraphy.data.packing import Batches
from engraphy.errors import ConfigError
from engraphy.lm import LM, NAMES, LMConfig, backbone, count_parameters, parts, scaled, three_arms
from engraphy.lm.configs import INFERRED, RULE, Backbone, notes
from engraphy.lm.loop import Run, TrainConfig, checkpoints, train
from engraphy.lm.sizes import EMBEDDING, ROUTED, TABLE, expert_share, on_meta, total
from engraphy.lm.tables import as_json, memory_sizes, model_sizes, size_rows
from tests.lm.test_loop import VOCAB, assert_same, documents

PAPER = ("Dense-4B", "MoE-27B", "Engram-27B", "Engram-40B")


def sums(found: Backbone) -> tuple[int, int]:
    counted = parts(found.model, found.memory)
    return sum(part.total for part in counted), sum(part.activated for part in counted)


@pytest.mark.parametrize(
    ("name", "printed", "table"),
    [
        ("Dense-4B", "4.1", None),
        ("MoE-27B", "26.7", None),
        ("Engram-27B", "26.7", "5.79"),
        ("Engram-40B", "39.5", "18.53"),
    ],
)
def test_the_papers_models_have_the_printed_parameters(name, printed, table):
    found = backbone(name)
    everything, used = sums(found)
    assert f"{everything / 1e9:.1f}" == printed
    assert 3.75e9 <= used <= 3.85e9 and f"{used / 1e9:.1f}" == "3.8"
    counted = parts(found.model, found.memory)
    if table is None:
        assert total(counted, TABLE) == 0 and found.memory is None
    else:
        assert f"{total(counted, TABLE) / 1e9:.2f}" == table
    # "without the token embedding": a token copies one row of it.
    assert total(counted, EMBEDDING) == 129_280 * 2560


def test_nothing_of_a_model_on_the_meta_device_has_storage():
    found = backbone("Engram-27B")
    model, blocks = on_meta(found.model, found.memory)
    assert model is not None and set(blocks) == {"1", "14"}
    for module in (model, blocks):
        assert all(parameter.is_meta for parameter in module.parameters())


def test_deepseek_v41_is_its_memory_alone():
    found = backbone("deepseek-v4.1")
    assert found.model is None and model_sizes(found) == {}
    assert f"{total(parts(None, found.memory), TABLE) / 1e9:.1f}" == "196.6"
    with pytest.raises(ConfigError, match="scale"):
        scaled(found, 4)


@pytest.mark.parametrize("scale", [20, 80])
@pytest.mark.parametrize("name", PAPER)
def test_a_shrunken_model_keeps_the_recipe(name, scale):
    large, small = backbone(name), scaled(backbone(name), scale)
    one, other = large.model, small.model
    assert one is not None and other is not None
    assert (other.streams, other.vocab_size, len(other.moe_layers)) == (
        one.streams,
        one.vocab_size,
        other.layers - 1 if one.moe_layers else 0,
    )
    assert other.heads * 32 == other.hidden_size
    assert other.mla is not None and (other.mla.plain, other.mla.value) == (32, 32)
    if one.moe_layers:
        share, smaller = one.top_k / one.experts, other.top_k / other.experts
        assert smaller == pytest.approx(share, rel=0.03)
        assert other.ffn == other.top_k * other.expert_ffn + other.shared_ffn
    if large.memory is not None and small.memory is not None:
        counted = [parts(found.model, found.memory) for found in (large, small)]
        assert expert_share(counted[1]) == pytest.approx(expert_share(counted[0]), abs=0.005)
        layers = small.memory.hash.layer_ids
        assert layers[0] == 1 and layers[1] == pytest.approx(14 * other.layers / 30, abs=0.7)
        assert small.memory.layer.width * 2 == other.hidden_size
        assert small.memory.dim >= 8 and small.memory.layer.streams == 4


def test_shrunken_models_stay_in_the_order_of_the_published_ones():
    found = {name: sums(backbone(name, 20, vocab_size=2048)) for name in PAPER}
    used = [activated for _, activated in found.values()]
    assert max(used) < 1.1 * min(used)
    assert found["Engram-27B"][0] == pytest.approx(found["MoE-27B"][0], rel=0.03)
    assert found["Dense-4B"][0] < 0.4 * found["MoE-27B"][0]
    assert found["Engram-40B"][0] > 1.3 * found["Engram-27B"][0]


def test_three_arms_of_a_shrunken_mixture_have_equal_parameters():
    moe = backbone("MoE-27B", 20, vocab_size=512).model
    assert moe is not None
    arms = three_arms(moe, 400, pad_id=1)
    assert arms.memory.memory is not None and arms.memory.memory.layer.streams == 4
    for arm in arms:
        assert arm.parameters.activated == pytest.approx(arms.moe.parameters.activated, rel=0.01)
    assert arms.memory.parameters.total == pytest.approx(arms.moe.parameters.total, rel=0.01)


@pytest.mark.parametrize("scale", [0, 81, 2.5])
def test_scales_that_cannot_be_meant_are_refused(scale):
    with pytest.raises(ConfigError, match="scale"):
        backbone("MoE-27B", scale)


def test_a_plain_model_of_a_file_is_a_backbone_too(tmp_path):
    config = LMConfig(64, 16, layers=3, heads=2, ffn=40)
    (tmp_path / "small.json").write_text(json.dumps(config.to_json()))
    found = backbone(tmp_path / "small.json")
    assert (found.name, found.model, found.memory) == ("small", config, None)
    assert sums(found)[0] == count_parameters(LM(config)).total
    assert dict(size_rows(found))["hidden size"] == "16"
    with pytest.raises(ConfigError, match=r"scale.*small"):
        scaled(found, 2)
    with pytest.raises(ConfigError, match="expected one of Dense-4B"):
        backbone(tmp_path / "none.json")


@pytest.mark.parametrize("name", NAMES)
def test_all_sizes_of_a_backbone_can_be_printed(name):
    found = backbone(name, vocab_size=1000)
    rows = dict(size_rows(found))
    everything, used = sums(found)
    assert rows["parameters, total"] == f"{everything:,}, {used:,} activated"
    assert rows.keys() >= model_sizes(found).keys() | memory_sizes(found).keys()
    assert all(isinstance(value, str) and value for value in rows.values())
    values = json.loads(json.dumps(as_json(found)))
    assert sum(part["total"] for part in values["parameters"].values()) == everything
    if found.model is not None:
        assert LMConfig.from_json(values["model"]) == found.model


def test_notes_name_sizes_that_are_printed():
    engram = backbone("Engram-27B", 20)
    printed = model_sizes(engram) | memory_sizes(engram)
    assert RULE.keys() <= printed.keys() and INFERRED.keys() <= printed.keys()
    assert notes(engram, 20) == RULE and notes(backbone("Engram-27B"), 1) == INFERRED
    assert notes(backbone("demo"), 1) == {}


def make_run(tokens: int = 64 * 60) -> tuple[Run, Backbone]:
    found = backbone("Engram-27B", 80, vocab_size=VOCAB)
    assert found.model is not None and found.memory is not None
    torch.manual_seed(0)
    memory = EngramMemory(found.memory, VocabMap.identity(VOCAB))
    memory.init_rows(0.02, seed=0)
    batches = Batches(documents(), end_id=0, batch=4, tokens=16, seed=0)
    settings = TrainConfig(tokens, lr=1e-2, warmup=0.1)
    return Run(LM(found.model, memory), batches, settings), found


def test_parts_are_those_of_the_model_as_built():
    run, found = make_run()
    counted = count_parameters(run.model)
    assert sums(found) == (counted.total, counted.activated)
    by_part = parts(found.model, found.memory)
    assert (total(by_part, TABLE), total(by_part, EMBEDDING)) == (counted.table, counted.embedding)
    experts = [block.ffn for block in run.model.blocks if hasattr(block.ffn, "gate_up")][1:]
    one = sum(moe.gate_up.numel() + moe.down.numel() for moe in experts)
    assert total(by_part, ROUTED) == one and one > 0


@pytest.mark.slow
def test_a_shrunken_paper_model_trains():
    run, _ = make_run(tokens=64 * 100)
    rows = run.pair.rows
    assert rows is not None and rows.lr == pytest.approx(5 * 1e-2)
    losses = [run.step()[0] for _ in range(100)]
    assert losses[0] == pytest.approx(np.log(VOCAB), abs=1.0)
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    assert run.model.max_load() is not None


@pytest.mark.slow
def test_its_training_resumes_bit_for_bit(tmp_path):
    straight, _ = make_run(tokens=64 * 6)
    train(straight, tmp_path / "straight")
    broken, _ = make_run(tokens=64 * 6)
    for _ in range(3):
        broken.step()
    broken.save(tmp_path / "broken")
    resumed, _ = make_run(tokens=64 * 6)
    resumed.resume(checkpoints(tmp_path / "broken")[-1])
    while not resumed.done:
        resumed.step()
    assert_same(straight, resumed)


def test_rows_learn_without_decay():
    """A row that no token reads stays, bit for bit, while the dense weights decay."""
    run, _ = make_run(tokens=64 * 3)
    assert run.model.memory is not None
    store = run.model.memory.stores[1]
    everything = np.arange(store.info.rows)
    before = store.gather(everything).copy()
    read = set()
    for step in range(3):
        ids, _, starts = run.batches[step]
        rows = run.model.memory.addresser.rows(ids.numpy(), layer=1, starts=starts.numpy())
        read |= set(rows.ravel().tolist())
        run.step()
    after = store.gather(everything)
    changed = set(np.flatnonzero((before != after).any(1)).tolist())
    assert changed and changed <= read < set(everything.tolist())
