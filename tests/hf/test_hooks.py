"""What a forward with a memory takes, and what it refuses. Decoding is test_matrix's."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import engraphy
from engraphy.errors import InputError
from tests.tools.hf_models import cache_of, cached, wake
from tests.tools.tiny_model import small_config
from tests.tools.tiny_training import VOCAB


@torch.no_grad()
def test_new_ids_of_a_resized_model_are_dead_and_change_no_address(model, config, ids_BT, tmp_path):
    memory = wake(engraphy.attach(model, config))
    digest, expected = memory.address_digest, model(ids_BT).logits
    memory.save(tmp_path / "memory")
    model.resize_token_embeddings(VOCAB + 3)
    torch.testing.assert_close(model(ids_BT).logits[..., :VOCAB], expected)
    new_BT = torch.tensor([[5, VOCAB, 7, VOCAB + 2]])
    found, trace = model(new_BT).logits, engraphy.Trace()
    cache = model(new_BT[:, :2], use_cache=True).past_key_values
    one_by_one = [model(new_BT[:, [at]], past_key_values=cache).logits for at in (2, 3)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), found[:, 2:], rtol=0, atol=1e-5)
    model(new_BT, engraphy_trace=trace)
    for gates_BTS in trace.gates.values():
        assert (gates_BTS[0, [1, 3]] == 0).all() and (gates_BTS[0, [0, 2]] > 0).all()
    with pytest.raises(InputError, match=f"expected 0 to {VOCAB + 2}, found {VOCAB + 3}"):
        model(new_BT + 1)
    assert (
        memory.address_digest == digest and memory.vocab.digest == memory.vocab.widened(999).digest
    )
    engraphy.detach(model)
    for path in (tmp_path / "memory", tmp_path / "again"):
        loaded = engraphy.load(model, path)
        assert loaded.address_digest == digest
        assert torch.equal(model(new_BT).logits, found)
        if path.name == "memory":
            loaded.save(tmp_path / "again")
        engraphy.detach(model)
    assert (tmp_path / "memory" / "vocab.json").read_text() == (
        tmp_path / "again" / "vocab.json"
    ).read_text()


def test_a_block_that_did_not_take_from_the_memory_is_noticed(model, config, ids_BT):
    wake(engraphy.attach(model, config))
    model.config.num_hidden_layers = (
        2  # as drafting by an early exit does: layer 2 is not meant to run
    )
    model(ids_BT, use_cache=False)
    model.config.num_hidden_layers = 4
    model.model.layers[2]._forward_pre_hooks.clear()
    with pytest.raises(InputError, match="layer 2: expected its block to read"):
        model(ids_BT)


def test_embeddings_without_ids_are_an_error(model, config, ids_BT):
    engraphy.attach(model, config)
    with pytest.raises(InputError, match="inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids_BT))


def test_a_mask_that_cannot_be_read_is_an_error(model, config, ids_BT):
    engraphy.attach(model, config)
    with pytest.raises(InputError, match="position_ids"):
        model(ids_BT, attention_mask=torch.zeros(2, 1, 12, 12))
    with pytest.raises(InputError, match="attention_mask"):
        model(ids_BT, attention_mask=torch.ones(2, 5))


def test_an_id_beyond_the_vocabulary_is_an_error(model, config, ids_BT):
    engraphy.attach(model, config)
    with pytest.raises(InputError):
        model(torch.full((1, 3), VOCAB))
    with pytest.raises(InputError):
        model(torch.full((1, 3), -1))


def test_a_cache_that_the_memory_has_not_seen_is_an_error(model, config, ids_BT):
    cache = DynamicCache(config=model.config)
    model(ids_BT, **cached(cache))
    engraphy.attach(model, config)
    with pytest.raises(InputError, match="came with 12 tokens that the memory has not seen"):
        model(ids_BT[:, :1], **cached(cache))


def test_a_cache_of_another_memory_is_an_error(model, config, ids_BT):
    engraphy.attach(model, config)
    cache = cache_of(model(ids_BT, use_cache=True))
    engraphy.detach(model)
    engraphy.attach(
        model,
        small_config(model, rows_per_head=103),
    )
    with pytest.raises(InputError, match="address digest"):
        model(ids_BT[:, :1], **cached(cache))


def test_a_block_called_by_itself_is_an_error(model, config):
    engraphy.attach(model, config)
    with pytest.raises(InputError, match="called by itself"):
        model.model.layers[1](torch.zeros(1, 3, 32))


def test_training_with_nothing_trainable_warns_once(model, config, ids_BT):
    memory = engraphy.attach(model, config)
    model.requires_grad_(False).train()
    with pytest.warns(UserWarning, match="nothing trainable"):
        model(ids_BT)
    model(ids_BT)
    engraphy.detach(model)
    memory.rows_require_grad = False
    engraphy.attach(model, memory)
    model(ids_BT)
