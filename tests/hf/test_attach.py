"""attach, detach, load: what they take, what they leave, and what they refuse. Decoding is
test_hf_matrix's."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import engraphy
from engraphy import EngramConfig, EngramMemory, VocabMap
from engraphy.errors import ConfigError, DigestMismatch, InputError, TableError
from tests.tools.hf_models import FAMILIES, build, cache_of, cached

VOCAB = 97


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def config(model):
    return EngramConfig.for_model(model.config, layers=(1, 2), heads=2, rows_per_head=101, dim=8)


@pytest.fixture
def ids_BT():
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def wake(memory):
    """Weights and rows as after training: everything takes part."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    if all(store.info.writable for store in memory.stores.values()):
        memory.init_rows(1.0, 3)
    return memory


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

    def answers():
        text = model.generate(
            ids_BT,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.cat([model(ids_BT).logits, torch.stack(text.logits, 1)], 1)

    before, weights = answers(), {name: value.clone() for name, value in model.state_dict().items()}
    config = EngramConfig.for_model(model.config, layers=(1, 2), heads=2, rows_per_head=101, dim=8)
    wake(engraphy.attach(model, config)).eval()
    assert not torch.equal(answers(), before)
    engraphy.detach(model)
    assert torch.equal(answers(), before)
    engraphy.attach(model, config)
    assert torch.equal(answers(), before)
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


def test_the_cost_is_told_before_anything_is_allocated(model, config, caplog):
    with caplog.at_level("INFO", logger="engraphy"):
        memory = engraphy.attach(model, config)
    told = engraphy.hf.cost(config)
    first, then = (record.getMessage() for record in caplog.records)
    assert str(told) in first and "MB of RAM are free" in first and then.startswith("serving")
    assert told.table_bytes == sum(store.info.bytes for store in memory.stores.values())
    assert told.dense_parameters == sum(parameter.numel() for parameter in memory.parameters())


def test_a_table_beyond_the_ram_is_refused_and_the_model_is_as_it_was(model):
    huge = EngramConfig.for_model(model.config, layers=(1,), rows_per_head=10**12, dim=64)
    with pytest.raises(ConfigError, match="of RAM are free"):
        engraphy.attach(model, huge)
    assert not hasattr(model, "engraphy")


def test_a_table_beyond_what_a_control_group_leaves_is_refused(model, config, monkeypatch):
    takes = engraphy.hf.cost(config)
    monkeypatch.setenv("ENGRAPHY_FREE_MEMORY", str(takes.table_bytes))  # but not the dense layers
    with pytest.raises(ConfigError, match="of RAM are free.*ENGRAPHY_FREE_MEMORY says otherwise"):
        engraphy.attach(model, config)
    monkeypatch.setenv("ENGRAPHY_FREE_MEMORY", str(takes.table_bytes + takes.dense_bytes))
    engraphy.attach(model, config)


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


def test_a_block_that_did_not_take_from_the_memory_is_noticed(model, config, ids_BT):
    wake(engraphy.attach(model, config))
    model.config.num_hidden_layers = (
        2  # as drafting by an early exit does: layer 2 is not meant to run
    )
    model(ids_BT, use_cache=False)
    model.config.num_hidden_layers = 4
    model.model.layers[2]._forward_pre_hooks.clear()
    with pytest.raises(InputError, match="layer 2: expected its block to take"):
        model(ids_BT)


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
    with pytest.raises(ConfigError, match="layers 0 to 3, the memory has layer 7"):
        engraphy.attach(model, deep)
    assert not hasattr(model, "engraphy")


def test_a_vocabulary_map_of_another_size_is_refused(model, config):
    with pytest.raises(
        DigestMismatch, match="vocab_size: the hash spec says 97 ids, the vocabulary map gives 50"
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
        EngramConfig.for_model(model.config, layers=(1, 2), heads=2, rows_per_head=103, dim=8),
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
