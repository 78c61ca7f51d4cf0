"""A memory beside PEFT's adapters: who learns, who is saved where, and what merging leaves. The
memory is no tuner."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import engraphy
from engraphy.errors import ConfigError, InputError
from tests.tools.tiny_training import (
    BEST_OF_EVERY_STEP,
    attach_tiny,
    rows_of,
    same,
    tiny_model,
    tiny_trainer,
    token_data,
    weights_of,
)

IDS_BT = torch.stack([each["input_ids"] for each in token_data(2)])


def lora(**changes) -> peft.LoraConfig:
    settings = dict(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.LoraConfig(**(settings | changes))


def adapted(order: str = "attached first", **changes):
    """(PEFT model, memory), the memory trainable."""
    model = tiny_model()
    if order == "attached first":
        memory = attach_tiny(model)
        model = peft.get_peft_model(model, lora(**changes))
    else:
        model = peft.get_peft_model(model, lora(**changes))
        memory = attach_tiny(model)
    memory.requires_grad_(True)
    return model, memory


def kind(name: str) -> str:
    return "lora" if "lora_" in name else "memory" if "engraphy." in name else "backbone"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["attached first", "attached last"])
def test_adapter_and_memory_both_learn_and_the_backbone_does_not(order, tmp_path):
    model, memory = adapted(order)
    before, rows = weights_of(model), rows_of(memory)
    tiny_trainer(model, memory, tmp_path, weight_decay=0.0).train()
    after = weights_of(model)
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert {kind(name) for name in learned} == {"lora", "memory"}
    assert {name for name in before if kind(name) == "memory"} <= learned
    assert {name for name in before if "lora_B" in name} <= learned
    assert all((rows_of(memory)[layer] != rows[layer]).any() for layer in memory.layers)


def test_all_linear_leaves_the_memory_alone_and_naming_its_projections_is_an_error():
    model, memory = adapted()
    assert {kind(name) for name, _ in model.named_parameters() if "lora_" in name} == {"lora"}
    assert not [
        name for name, _ in model.named_parameters() if "lora_" in name and "engraphy" in name
    ]
    assert sorted(name for name, _ in memory.blocks["1"].named_parameters()) == [
        "conv",
        "conv_norm",
        "key.weight",
        "key_norm",
        "query_norm",
        "value.weight",
    ]
    bare = tiny_model()
    attach_tiny(bare)
    with pytest.raises(ValueError, match=r"Target module Projection\(\) is not supported"):
        peft.get_peft_model(bare, lora(target_modules=r".*(q_proj|key)"))
    bare = tiny_model()
    attach_tiny(bare)
    peft.get_peft_model(
        bare, lora(target_modules=r".*(q_proj|key)", exclude_modules=r".*engraphy.*")
    )


@pytest.mark.parametrize("what", ["memory", "memory and lora", "all"])
def test_the_right_parameters_get_gradients(what):
    if what == "memory and lora":
        model, memory = adapted()
    else:
        model = tiny_model()
        memory = attach_tiny(model)
    if what == "memory":
        model.requires_grad_(False)
        memory.requires_grad_(True)
    model.train()
    model(IDS_BT, labels=IDS_BT).loss.backward()
    found = {
        kind(name) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert (
        found
        == {
            "memory": {"memory"},
            "memory and lora": {"memory", "lora"},
            "all": {"memory", "backbone"},
        }[what]
    )
    missing = [
        name
        for name, parameter in model.named_parameters()
        if kind(name) in found and parameter.grad is None
    ]
    assert not missing
    assert sorted(grad.layer for grad in memory.row_grads) == list(memory.layers)


def test_a_memory_that_peft_froze_says_so_and_its_rows_do_not_learn():
    model = tiny_model()
    memory = attach_tiny(model)
    model = peft.get_peft_model(model, lora())
    model.train()
    with pytest.warns(
        UserWarning, match=r"call memory.requires_grad_\(True\) after get_peft_model"
    ):
        model(IDS_BT, labels=IDS_BT).loss.backward()
    assert memory.row_grads == []


def test_adapter_and_memory_are_saved_apart_and_meet_again(tmp_path):
    model, memory = adapted()
    model.eval()
    with torch.no_grad():
        expected = model(IDS_BT).logits
    model.save_pretrained(tmp_path / "adapter")
    memory.save(tmp_path / "memory")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert names and not [name for name in names if "engraphy" in name]
    assert not [
        name for name in load_file(tmp_path / "memory" / "memory.safetensors") if "lora" in name
    ]
    for memory_first in (True, False):
        again = tiny_model().eval()
        if memory_first:
            engraphy.load(again, tmp_path / "memory")
        again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
        if not memory_first:
            engraphy.load(again, tmp_path / "memory")
        with torch.no_grad():
            assert torch.equal(again(IDS_BT).logits, expected)


@pytest.mark.parametrize("order", ["attached first", "attached last"])
def test_merging_keeps_the_memory_attached_and_the_output(order):
    model, memory = adapted(order)
    model.eval()
    expected = model.generate(IDS_BT[:1], max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        logits = model(IDS_BT).logits
        merged = model.merge_and_unload()
        assert merged.engraphy is memory and not any(
            "lora" in name for name, _ in merged.named_modules()
        )
        torch.testing.assert_close(merged(IDS_BT).logits, logits, rtol=0, atol=1e-4)
        assert torch.equal(merged.generate(IDS_BT[:1], max_new_tokens=6, do_sample=False), expected)
        engraphy.detach(merged)
        assert not torch.allclose(merged(IDS_BT).logits, logits, atol=1e-2)


def test_unloading_gives_the_model_with_its_memory_back():
    model = tiny_model().eval()
    memory = attach_tiny(model)
    with torch.no_grad():
        expected = model(IDS_BT).logits
        wrapped = peft.get_peft_model(model, lora()).eval()
        assert not torch.equal(wrapped(IDS_BT).logits, expected)
        memory.follows_adapters = False
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(IDS_BT).logits, expected)
        bare = wrapped.unload()
        assert torch.equal(bare(IDS_BT).logits, expected) and bare.engraphy is memory


def test_the_memory_stays_trainable_whatever_is_done_to_adapters(tmp_path):
    model, memory = adapted()
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        pass
    model.add_adapter("other", lora(r=2))
    model.set_adapter("other")
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.delete_adapter("other")
    assert all(parameter.requires_grad for parameter in memory.parameters())
    assert model.base_model.model.engraphy is memory


def test_other_modules_are_saved_beside_the_adapter_and_the_memory_is_not_one_of_them(tmp_path):
    model, memory = adapted(modules_to_save=["lm_head"])
    before = weights_of(model)
    tiny_trainer(model, memory, tmp_path).train()
    after = weights_of(model)
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert [name for name in learned if kind(name) == "backbone"] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]
    bare = tiny_model()
    attach_tiny(bare)
    with pytest.raises(ConfigError, match="a memory is not copied with its model, nor by PEFT"):
        peft.get_peft_model(bare, lora(modules_to_save=["engraphy"]))
    with pytest.raises(ConfigError, match="detach it first"):
        copy.deepcopy(bare)


@pytest.mark.parametrize("adapter", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_virtual_tokens_which_have_no_ids_are_refused_by_what_they_are(adapter):
    model = tiny_model()
    attach_tiny(model)
    model = peft.get_peft_model(model, adapter(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(InputError, match="prefix tuning|looks up token ids"):
        model(input_ids=IDS_BT)


def test_a_second_memory_through_a_peft_model_is_refused():
    model, _ = adapted()
    with pytest.raises(ConfigError, match="a model carries one"):
        attach_tiny(model)


@pytest.mark.slow
def test_training_of_adapter_and_memory_resumes_bit_for_bit_and_the_best_comes_back(tmp_path):
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model, memory = adapted()
        with torch.no_grad():
            for parameter in model.parameters() if resume else ():
                parameter += parameter.requires_grad * 0.1
        run = tiny_trainer(model, memory, tmp_path, save_strategy="steps", save_steps=2)
        run.train(resume_from_checkpoint=resume)
        ends.append({**weights_of(model), **rows_of(memory)})
        assert {
            kind(name) for name, parameter in model.named_parameters() if parameter.requires_grad
        } == {"lora", "memory"}
    assert same(*ends)

    model, memory = adapted()
    run = tiny_trainer(model, memory, tmp_path / "best", learning_rate=0.5, **BEST_OF_EVERY_STEP)
    run.train()
    assert run.state.best_global_step < 4
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)
