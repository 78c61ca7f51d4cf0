"""Weights that travel in torch's own ways are refused beside other rows than their own."""

from __future__ import annotations

import copy

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, load_model, save_model
from torch.distributed import checkpoint as dcp
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM

import engraphy
from engraphy import EngramMemory, Table
from engraphy.errors import ConfigError, DigestMismatch
from engraphy.hf.composite import save_pretrained
from engraphy.train import RowAdam
from tests.tools.tiny_training import (
    BEST_OF_EVERY_STEP,
    attach_tiny,
    rows_of,
    tiny_model,
    tiny_trainer,
    token_data,
    weights_of,
)

IDS_BT = torch.stack([each["input_ids"] for each in token_data(2)])
KEY = "engraphy._extra_state"
OTHER_ROWS = "its weights belong to the rows .* load them with engraphy.load"


def with_memory(seed: int = 0):
    """(model, memory): the model is the same each time, the memory and its rows are the seed's."""
    model = tiny_model()
    return model.eval(), attach_tiny(model, seed)


def train_rows(model, memory, steps: int = 1) -> None:
    rows = RowAdam(memory, lr=0.1)
    torch.manual_seed(0)  # dropout
    model.train()
    for _ in range(steps):
        model(IDS_BT, labels=IDS_BT).loss.backward()
        rows.step()
    model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS_BT).logits


def through_torch(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    return lambda other: other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


def through_safetensors(model, tmp_path):
    save_model(model, str(tmp_path / "model.safetensors"))
    return lambda other: load_model(other, tmp_path / "model.safetensors")


def through_accelerate(model, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))

    def load(other):
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(other)
        accelerator.load_state(str(tmp_path / "state"))

    return load


def through_a_distributed_checkpoint(model, tmp_path):
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)

    def load(other):
        state = {"model": other.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
        other.load_state_dict(state["model"])

    return load


def through_a_checkpoint_that_is_not_strict(model, _):
    state = copy.deepcopy(model.state_dict())
    return lambda other: other.load_state_dict(state, strict=False)


def through_assignment(model, _):
    state = copy.deepcopy(model.state_dict())
    return lambda other: other.load_state_dict(state, assign=True)


WAYS = [
    through_torch,
    through_safetensors,
    through_accelerate,
    through_a_distributed_checkpoint,
    through_a_checkpoint_that_is_not_strict,
    through_assignment,
]


@pytest.mark.parametrize("way", WAYS)
def test_weights_beside_other_rows_are_refused_whatever_carried_them(way, tmp_path):
    model, _ = with_memory()
    load = way(model, tmp_path)
    other, memory = with_memory(seed=1)
    before = copy.deepcopy(weights_of(memory))
    with pytest.raises(DigestMismatch, match=OTHER_ROWS):
        load(other)
    if way is not through_a_distributed_checkpoint:  # which reads into the tensors that are there
        assert all(torch.equal(value, before[name]) for name, value in weights_of(memory).items())


@pytest.mark.parametrize("way", WAYS)
def test_weights_beside_their_own_rows_load_and_the_logits_are_the_same(way, tmp_path):
    model, memory = with_memory()
    train_rows(model, memory)
    memory.save(tmp_path / "memory")
    expected, load = logits(model), way(model, tmp_path)
    for store in (None, "ram:"):
        other = tiny_model(seed=3).eval()
        engraphy.load(other, tmp_path / "memory", store)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        load(other)
        assert torch.equal(logits(other), expected)


def test_weights_saved_before_the_memory_was_belong_to_its_rows_too(tmp_path):
    model, memory = with_memory()
    train_rows(model, memory)
    state = copy.deepcopy(model.state_dict())
    memory.save(tmp_path / "memory")
    other = tiny_model().eval()
    loaded = engraphy.load(other, tmp_path / "memory", "ram:")
    other.load_state_dict(state)
    model.load_state_dict(state)
    for each, its in ((model, memory), (other, loaded)):
        train_rows(each, its)
        with pytest.raises(DigestMismatch, match=OTHER_ROWS):
            each.load_state_dict(state)


def test_the_best_weights_come_back_only_while_the_rows_are_as_they_were():
    model, memory = with_memory()
    best = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.load_state_dict(best)  # the rows have not learned
    train_rows(model, memory)
    with pytest.raises(DigestMismatch, match=OTHER_ROWS):
        model.load_state_dict(best)


def test_a_fresh_memory_of_the_same_seed_has_the_same_rows():
    model, _ = with_memory()
    other, memory = with_memory()
    other.load_state_dict(model.state_dict())
    memory.init_rows(0.02, 1)
    with pytest.raises(DigestMismatch, match=OTHER_ROWS):
        other.load_state_dict(model.state_dict())
    memory.init_rows(0.02, 0)
    other.load_state_dict(model.state_dict())


def test_rows_that_have_learned_are_those_of_one_memory_alone():
    """Even of copies that learned alike: what was written is not looked at, so a write costs
    nothing."""
    (model, memory), (other, twin) = with_memory(), with_memory()
    train_rows(model, memory, 3)
    train_rows(other, twin, 3)
    learned = copy.deepcopy(model.state_dict())
    model.load_state_dict(learned)
    with pytest.raises(DigestMismatch, match=OTHER_ROWS):
        other.load_state_dict(learned)
    memory.stores[1].scatter(torch.tensor([5]).numpy(), rows_of(memory)[1][:1])
    with pytest.raises(DigestMismatch, match="layer 1: its weights belong"):
        model.load_state_dict(learned)


def test_a_table_trained_in_place_is_named_by_what_it_was_sealed_as(tmp_path):
    model, memory = with_memory()
    memory.write_table(tmp_path / "table")
    engraphy.detach(model)

    def serve(mode):
        table = Table.open(tmp_path / "table", mode)
        served = tiny_model().eval()
        return served, EngramMemory(memory.config, memory.vocab, table), table

    trained, inside, table = serve("w")
    engraphy.attach(trained, inside)
    before = copy.deepcopy(trained.state_dict())
    train_rows(trained, inside)
    open_ = copy.deepcopy(trained.state_dict())
    table.seal()
    sealed = copy.deepcopy(trained.state_dict())
    trained.load_state_dict(open_)
    table.close()
    for mode in ("r", "w"):
        again, inside, table = serve(mode)
        engraphy.attach(again, inside)
        again.load_state_dict(sealed)
        with pytest.raises(DigestMismatch, match=OTHER_ROWS):
            again.load_state_dict(before)
        table.close()


def test_a_memory_of_other_addresses_or_another_row_format_is_refused():
    model, memory = with_memory()
    state = copy.deepcopy(model.state_dict())
    engraphy.detach(model)
    engraphy.attach(model, memory.config, row_format="bf16")
    with pytest.raises(DigestMismatch, match="expected row_format bf16 8, found f32 8"):
        model.load_state_dict(state)
    engraphy.detach(model)
    other = engraphy.EngramConfig.for_model(
        model.config, layers=(1, 2), heads=2, rows_per_head=103, dim=8
    )
    engraphy.attach(model, other)
    with pytest.raises(DigestMismatch, match="expected address_digest"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda state: (state.float() + state.float().flip(0)) / 2,
        lambda state: state + state,
        lambda state: None,
        lambda state: {"rows": {}},
        lambda state: state[:100],
        lambda state: torch.zeros_like(state, device="meta"),
    ],
    ids=["averaged", "summed", "none", "other", "cut", "meta"],
)
def test_an_extra_state_that_is_damaged_is_a_named_error(make):
    model, _ = with_memory()
    state = model.state_dict()
    with pytest.raises(
        DigestMismatch, match="expected _extra_state as EngramMemory.state_dict gives it"
    ):
        model.load_state_dict(state | {KEY: make(state[KEY])})


def test_weights_that_do_not_say_which_rows_they_belong_to_are_noticed():
    model, _ = with_memory()
    state = model.state_dict()
    del state[KEY]
    with pytest.warns(UserWarning, match="not known which rows"):
        with pytest.raises(RuntimeError, match=f'Missing.*"{KEY}"'):
            model.load_state_dict(state)
    with pytest.warns(UserWarning, match="not known which rows"):
        model.load_state_dict(state, strict=False)
    bare = {name: value for name, value in state.items() if not name.startswith("engraphy.")}
    assert KEY in model.load_state_dict(bare, strict=False).missing_keys


def test_averaged_weights_are_those_of_the_dense_layers_alone():
    model, memory = with_memory()
    with pytest.raises(ConfigError, match="a memory is not copied with its model"):
        AveragedModel(model)
    averaged = AveragedModel(memory.blocks)
    averaged.update_parameters(memory.blocks)
    memory.blocks.load_state_dict(averaged.module.state_dict())
    (one, _), (two, _) = with_memory(), with_memory()
    mean = {
        name: value if name == KEY else (value + two.state_dict()[name]) / 2
        for name, value in one.state_dict().items()
    }
    two.load_state_dict(mean)
    as_bfloat16 = {name: value.bfloat16() for name, value in one.state_dict().items()}
    two.load_state_dict(as_bfloat16)  # bytes are exact in it


def test_the_extra_state_keeps_out_of_what_the_backbone_and_adapters_save(tmp_path):
    model, memory = with_memory()
    model.save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    memory.save(tmp_path / "memory")
    save_pretrained(model, tmp_path / "whole")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    for name in (
        "backbone/model",
        "given/model",
        "memory/memory",
        "whole/model",
        "adapter/adapter_model",
    ):
        assert not [
            key for key in load_file(tmp_path / f"{name}.safetensors") if "_extra_state" in key
        ]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(whole), logits(adapted.unload()))


def test_a_detached_model_has_the_keys_it_had():
    model = tiny_model()
    keys, ignored = list(model.state_dict()), model._keys_to_ignore_on_save
    memory = attach_tiny(model)
    assert set(model.state_dict()) - set(keys) == {
        f"engraphy.{name}" for name in memory.state_dict()
    }
    assert KEY in model._keys_to_ignore_on_save
    engraphy.detach(model)
    assert (
        list(model.state_dict()) == keys
        and not model._keys_to_ignore_on_save == {KEY}
        and not ignored
    )
    model.load_state_dict(tiny_model().state_dict())


def test_the_trainer_finds_its_best_model_though_the_rows_have_learned_since(tmp_path, caplog):
    model, memory = with_memory()
    run = tiny_trainer(
        model,
        memory,
        tmp_path,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        **BEST_OF_EVERY_STEP,
    )
    run.train()
    assert run.state.best_global_step < 4
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)
    assert not [line for line in caplog.messages if "missing keys" in line]


def test_distributed_data_parallel_carries_it_like_the_model_inside(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model, memory = with_memory()
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        state = copy.deepcopy(parallel.state_dict())
        parallel.load_state_dict(state)
        train_rows(model, memory)
        with pytest.raises(DigestMismatch, match=OTHER_ROWS):
            parallel.load_state_dict(state)
    finally:
        dist.destroy_process_group()


def test_its_size_is_that_of_the_config_so_that_it_can_be_read_into_place():
    model, memory = with_memory()
    sizes = {memory.get_extra_state().numel()}
    for _ in range(6):
        train_rows(model, memory)
        sizes.add(memory.get_extra_state().numel())
    assert len(sizes) == 1
