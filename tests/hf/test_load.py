"""load: what was saved comes back, and what does not belong together is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

import engraphy
from engraphy import EngramMemory
from engraphy.errors import ConfigError, DigestMismatch, TableError
from tests.tools.hf_models import wake
from tests.tools.tiny_training import VOCAB


def test_a_saved_memory_gives_the_same_logits_on_a_fresh_copy_of_the_model(
    model, config, ids_BT, tmp_path
):
    bare = copy.deepcopy(model)
    memory = wake(engraphy.attach(model, config))
    memory.save(tmp_path / "memory")
    for store in (None, "ram:"):
        loaded = engraphy.load(bare, tmp_path / "memory", store)
        assert torch.equal(bare(ids_BT).logits, model(ids_BT).logits)
        assert engraphy.detach(bare) is loaded


def test_a_memory_of_another_model_is_refused_unless_that_is_said(model, config, ids_BT, tmp_path):
    memory = wake(engraphy.attach(model, config))
    memory.save(tmp_path / "memory")
    engraphy.detach(model)
    wider = copy.deepcopy(model)
    wider.resize_token_embeddings(VOCAB + 3)
    mistral = AutoModelForCausalLM.from_config(
        MistralConfig(
            **{
                name: getattr(model.config, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                )
            }
        )
    )
    narrower = copy.deepcopy(model)
    narrower.resize_token_embeddings(VOCAB - 1)
    for other, told in ((narrower, "'vocab_size': 96"), (mistral, "'model_type': 'mistral'")):
        for call in (
            lambda other=other: engraphy.load(other, tmp_path / "memory"),
            lambda other=other: engraphy.attach(other, memory),
        ):
            with pytest.raises(DigestMismatch, match=told):
                call()
        assert not hasattr(other, "engraphy")
    engraphy.attach(wider, memory)
    memory.save(tmp_path / "wider")
    wider.resize_token_embeddings(VOCAB + 4)
    memory.save(tmp_path / "wider yet")
    wider.resize_token_embeddings(VOCAB + 3)
    for name, size in (("wider", VOCAB + 3), ("wider yet", VOCAB + 4)):
        assert EngramMemory.load(tmp_path / name).made_for["vocab_size"] == size
    assert engraphy.detach(wider).made_for == {"model_type": "llama", "vocab_size": VOCAB + 3}
    body = json.loads((tmp_path / "memory" / "memory.json").read_text())
    del body["made_for"]  # as memories were once saved
    (tmp_path / "memory" / "memory.json").write_text(json.dumps(body))
    engraphy.load(mistral, tmp_path / "memory")


@pytest.mark.parametrize(
    "damage, error",
    [
        (lambda d: (d / "memory.safetensors").unlink(), ConfigError),
        (lambda d: (d / "memory.json").unlink(), ConfigError),
        (lambda d: (d / "vocab.json").unlink(), ConfigError),
        (
            lambda d: (d / "memory.safetensors").write_bytes(
                (d / "memory.safetensors").read_bytes()[:-100]
            ),
            ConfigError,
        ),
        (lambda d: next((d / "table").glob("*.safetensors")).unlink(), TableError),
        (lambda d: shutil.rmtree(d / "table"), TableError),
        (lambda d: truncate(next((d / "table").glob("*.safetensors"))), TableError),
    ],
)
def test_a_damaged_memory_is_a_named_error_and_nothing_is_half_attached(
    model, config, tmp_path, damage, error
):
    wake(engraphy.attach(model, config)).save(tmp_path / "memory")
    engraphy.detach(model)
    damage(tmp_path / "memory")
    with pytest.raises(error):
        engraphy.load(model, tmp_path / "memory")
    assert not hasattr(model, "engraphy") and not model.model._forward_pre_hooks


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def test_the_shard_of_another_table_is_refused(model, config, tmp_path):
    for name in ("a", "b"):
        wake(engraphy.attach(model, config)).save(tmp_path / name)
        engraphy.detach(model)
    shard = next((tmp_path / "a" / "table").glob("*.safetensors"))
    shutil.copy(tmp_path / "b" / "table" / shard.name, shard)
    with pytest.raises(TableError, match="table"):
        engraphy.load(model, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "table")
    shutil.copytree(tmp_path / "b" / "table", tmp_path / "a" / "table")
    with pytest.raises(DigestMismatch, match="dense weights belong to table"):
        engraphy.load(model, tmp_path / "a")


def test_weights_of_another_shape_are_refused(model, config, tmp_path):
    wake(engraphy.attach(model, config)).save(tmp_path / "memory")
    engraphy.detach(model)
    body = json.loads((tmp_path / "memory" / "memory.json").read_text())
    body["config"]["layer"]["kernel"] = 2
    (tmp_path / "memory" / "memory.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="expected tensors"):
        engraphy.load(model, tmp_path / "memory")
