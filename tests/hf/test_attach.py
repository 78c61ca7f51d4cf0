"""attach and detach: what they take, what they leave, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

import engraphy
from engraphy import EngramConfig, VocabMap
from engraphy.errors import ConfigError, DigestMismatch
from tests.tools.hf_models import FAMILIES, answers, build, wake
from tests.tools.tiny_model import small_config
from tests.tools.tiny_training import VOCAB


def test_a_fresh_memory_changes_no_logit_and_detach_gives_the_model_back(model, config, ids_BT):
    before = model(ids_BT).logits
    keys = list(model.state_dict())
    engraphy.attach(model, config)
    assert torch.equal(model(ids_BT).logits, before)
    memory = engraphy.detach(model)
    wake(memory)
    assert torch.equal(model(ids_BT).logits, before)
    assert list(model.state_dict()) == keys and not hasattr(model, "engraphy")
    for module in model.modules():
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fresh_memory_and_a_detached_one_leave_every_family_bit_for_bit(family, ids_BT):
    model = build(family, torch.float32)

    before, weights = (
        answers(model, ids_BT),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    config = small_config(model)
    wake(engraphy.attach(model, config)).eval()
    assert not torch.equal(answers(model, ids_BT), before)
    engraphy.detach(model)
    assert torch.equal(answers(model, ids_BT), before)
    engraphy.attach(model, config)
    assert torch.equal(answers(model, ids_BT), before)
    engraphy.detach(model)
    after = model.state_dict()
    assert list(after) == list(weights) and all(
        torch.equal(after[name], weights[name]) for name in weights
    )


def test_an_awake_memory_changes_the_logits_and_can_be_attached_again(model, config, ids_BT):
    before = model(ids_BT).logits
    memory = wake(engraphy.attach(model, config))
    changed = model(ids_BT).logits
    assert not torch.allclose(changed, before)
    engraphy.detach(model)
    assert engraphy.attach(model, memory) is memory
    assert torch.equal(model(ids_BT).logits, changed)


def test_rows_learn_from_the_second_step(model, config, ids_BT):
    memory = engraphy.attach(model, config)
    model.train()
    optimizer = torch.optim.SGD(memory.parameters(), lr=1.0)
    for step in range(2):
        model(ids_BT, labels=ids_BT).loss.backward()
        largest = max(abs(part.grad).max() for part in memory.drain_row_grads())
        assert (largest > 0) == (step == 1)
        optimizer.step()


def test_the_backbone_is_saved_without_the_memory(model, config, ids_BT, tmp_path):
    before = model(ids_BT).logits
    wake(engraphy.attach(model, config))
    model.save_pretrained(tmp_path / "model")
    assert not [
        name for name in load_file(tmp_path / "model" / "model.safetensors") if "engraphy" in name
    ]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(again(ids_BT).logits, before)
    engraphy.detach(model)
    assert not [name for name in model._keys_to_ignore_on_save if "engraphy" in name]


def test_a_map_that_is_forgotten_is_noticed(model):
    config = EngramConfig.for_model(
        model.config, layers=(1,), rows_per_head=101, dim=8, vocab_size=50
    )
    with pytest.raises(ConfigError, match="expected the model's 97 ids without a vocabulary map"):
        engraphy.attach(model, config)
    memory = engraphy.attach(model, config, VocabMap.identity(50))
    model(torch.tensor([[3, 96]]))
    assert memory.vocab.raw_size == VOCAB


def test_a_model_and_its_decoder_have_one_memory_between_them(model, config):
    for first, second in ((model, model.model), (model.model, model)):
        engraphy.attach(first, config)
        with pytest.raises(ConfigError, match="carries one"):
            engraphy.attach(second, config)
        engraphy.detach(first)


def test_a_memory_is_not_pickled(model, config, tmp_path):
    engraphy.attach(model, config)
    with pytest.raises(ConfigError, match="memory.save"):
        torch.save(model, tmp_path / "model.pt")


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(layers=(1, 4)), ConfigError, "layers: expected 0 to 3, found 4"),
        (dict(layers=(1, 1)), ConfigError, "distinct"),
        (dict(orders=(0,)), ConfigError, "orders"),
        (dict(orders=()), ConfigError, "orders"),
        (dict(rows_per_head=0), ConfigError, "rows_per_head"),
        (dict(heads=0), ConfigError, "heads"),
        (dict(dim=0), ConfigError, "dim"),
        (dict(streams=4), ConfigError, "streams"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(model, change, error, match):
    with pytest.raises(error, match=match):
        engraphy.attach(
            model, EngramConfig.for_model(model.config, **{"rows_per_head": 101, **change})
        )
    assert not hasattr(model, "engraphy")


def test_misspelt_options_are_refused(model, config):
    with pytest.raises(TypeError, match="rows_perhead"):
        EngramConfig.for_model(model.config, rows_perhead=3)
    with pytest.raises(TypeError, match="sdt"):
        engraphy.attach(model, config, sdt=0.1)
    with pytest.raises(ConfigError, match="expected ram:"):
        engraphy.attach(model, config, store="rma:")
    assert not hasattr(model, "engraphy")


def test_a_memory_of_another_model_is_refused(model, ids_BT):
    other = LlamaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=9, pad_token_id=0)
    with pytest.raises(ConfigError, match="hidden size"):
        engraphy.attach(model, EngramConfig.for_model(other, layers=(1,), rows_per_head=101, dim=8))
    deep = EngramConfig.for_model(
        LlamaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=9, pad_token_id=0),
        layers=(7,),
        rows_per_head=101,
        dim=8,
    )
    with pytest.raises(ConfigError, match="layers 0 to 3, found layer 7"):
        engraphy.attach(model, deep)
    assert not hasattr(model, "engraphy")


def test_a_vocabulary_map_of_another_size_is_refused(model, config):
    with pytest.raises(
        DigestMismatch,
        match="vocab_size: expected 97 compressed ids, .* found 50 in the vocabulary",
    ):
        engraphy.attach(model, config, VocabMap.identity(50))
    assert not hasattr(model, "engraphy")


def test_what_is_no_decoder_is_refused(config):
    with pytest.raises(ConfigError, match="transformers model"):
        engraphy.attach(torch.nn.Linear(2, 2), config)
    tiny = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=2)
    )
    with pytest.raises(ConfigError, match="encoder-decoder"):
        engraphy.attach(tiny, config)


def test_a_second_memory_is_refused_and_so_is_one_memory_on_two_models(model, config):
    memory = engraphy.attach(model, config)
    with pytest.raises(ConfigError, match="a model carries one"):
        engraphy.attach(model, config)
    other = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ConfigError, match="attached to a model"):
        engraphy.attach(other, memory)
    assert not hasattr(other, "engraphy")
    engraphy.detach(model)
    with pytest.raises(ConfigError, match="found none"):
        engraphy.detach(model)
