"""A model saved with its memory as one: what loads is what was saved, and what does not belong
together is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import engraphy
from engraphy import EngramConfig
from engraphy.errors import ConfigError, DigestMismatch, TableError
from engraphy.hf import save_pretrained, trainer_kwargs
from tests.tools.hf_saved import logits, remembering


@pytest.fixture(scope="module")
def model(whole):
    return whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"store": "ram:"},
        {"low_cpu_mem_usage": True},
        {"device_map": {"": "cpu"}},
        {"dtype": "auto"},
        {"dtype": torch.float32},
    ],
    ids=str,
)
def test_what_loads_is_what_was_saved_bit_for_bit(model, saved, ids_BT, options):
    loaded = AutoModelForCausalLM.from_pretrained(saved, **options)
    assert type(loaded) is type(model) and not loaded.training and not loaded.engraphy.training
    assert torch.equal(logits(loaded, ids_BT), logits(model, ids_BT))
    same = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    assert {key: loaded.config.to_dict()[key] for key in same} == same


def test_saving_leaves_the_model_as_it_is(base, ids_BT, tmp_path):
    model = remembering(base)
    before, config = logits(model, ids_BT), model.config.to_dict()
    attention = model.config._attn_implementation
    save_pretrained(model, tmp_path / "one")
    assert torch.equal(logits(model, ids_BT), before)
    assert model.config.to_dict() == config and model.config._attn_implementation == attention


def test_the_backbones_file_holds_the_backbone_and_the_table_lies_beside_it(model, saved):
    assert not [name for name in load_file(saved / "model.safetensors") if "engraphy" in name]
    assert set(load_file(saved / "engraphy" / "memory.safetensors")) == set(
        model.engraphy.blocks.state_dict()
    )
    assert engraphy.Table.open(saved / "engraphy" / "table").layers == (1, 2)
    assert not list(saved.rglob(".*"))


def test_the_config_says_what_it_is(saved, model):
    config = AutoConfig.from_pretrained(saved)
    assert config.model_type == "engraphy" and config.get_text_config().model_type == "llama"
    assert EngramConfig.from_json(config.memory_config) == model.engraphy.config
    assert config.address_digest == model.engraphy.address_digest
    assert str(saved.parent) not in (saved / "config.json").read_text()


def test_it_loads_beside_the_tokenizer_and_in_a_pipeline(saved):
    told = pipeline("text-generation", model=str(saved))(
        "Ada Lovelace was", max_new_tokens=4, do_sample=False
    )
    tokenizer, loaded = (
        AutoTokenizer.from_pretrained(saved),
        AutoModelForCausalLM.from_pretrained(saved),
    )
    prompt = tokenizer("Ada Lovelace was", return_tensors="pt")
    ids = loaded.generate(prompt["input_ids"], max_new_tokens=4, do_sample=False)
    assert told[0]["generated_text"] == tokenizer.decode(ids[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_it_generates_what_the_attached_model_generates(model, saved, ids_BT, options):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    prompts = ids_BT[:1] if "prompt_lookup_num_tokens" in options else ids_BT
    texts = []
    for each in (model, loaded):
        torch.manual_seed(0)
        texts.append(each.generate(prompts, max_new_tokens=6, pad_token_id=1, **options))
    assert torch.equal(*texts)


def test_left_padding_generates_the_same(model, saved, ids_BT):
    padded, mask = ids_BT.clone(), torch.ones_like(ids_BT)
    padded[1, :5], mask[1, :5] = 1, 0
    texts = [
        each.generate(
            padded, attention_mask=mask, max_new_tokens=6, pad_token_id=1, do_sample=False
        )
        for each in (model, AutoModelForCausalLM.from_pretrained(saved))
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("table", ["copy", "link"])
def test_a_loaded_model_saves_itself_as_one_again(saved, ids_BT, tmp_path, table):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "again", table=table)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids_BT), logits(loaded, ids_BT))
    assert (tmp_path / "again" / "engraphy" / "table").exists() == (table == "copy")
    assert "_name_or_path" not in (tmp_path / "again" / "config.json").read_text()


def test_a_model_saves_itself_over_the_directory_that_it_serves(mine, ids_BT):
    loaded = AutoModelForCausalLM.from_pretrained(mine)
    before = logits(loaded, ids_BT)
    with torch.no_grad():
        loaded.engraphy.blocks["1"].value.weight.mul_(2.0)
    changed = logits(loaded, ids_BT)
    assert not torch.equal(changed, before)
    loaded.save_pretrained(mine)
    assert torch.equal(logits(loaded, ids_BT), changed)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(mine), ids_BT), changed)
    with pytest.raises(ConfigError, match="which would be replaced"):
        AutoModelForCausalLM.from_pretrained(mine).save_pretrained(mine, table="link")


def test_an_interrupted_save_leaves_no_model_that_has_lost_its_memory(base, tmp_path, monkeypatch):
    model = remembering(base)

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full_disk)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            save_pretrained(model, tmp_path / "one")
        assert not (tmp_path / "one" / "config.json").exists()
    monkeypatch.undo()
    save_pretrained(model, tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


def test_weights_in_several_files_load_too(model, ids_BT, tmp_path):
    save_pretrained(model, tmp_path / "one", max_shard_size="50KB")
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 1
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), ids_BT),
        logits(model, ids_BT),
    )


def test_a_dtype_that_is_asked_for_is_the_memorys_too_and_else_it_keeps_its_own(
    base, saved, ids_BT, tmp_path
):
    half = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert logits(half, ids_BT).isfinite().all()
    mixed = remembering(base, dtype=torch.bfloat16)
    save_pretrained(mixed, tmp_path / "mixed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert (
        loaded.dtype == torch.bfloat16 and loaded.engraphy.blocks["1"].conv.dtype == torch.float32
    )
    assert torch.equal(logits(loaded, ids_BT), logits(mixed, ids_BT))


def test_a_detached_model_saves_itself_as_the_backbone_that_it_is(saved, base, ids_BT, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    engraphy.detach(loaded)
    loaded.save_pretrained(tmp_path / "bare")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "engraphy").exists() and not hasattr(again, "engraphy")
    assert torch.equal(
        logits(again, ids_BT), logits(AutoModelForCausalLM.from_pretrained(base), ids_BT)
    )
    assert not torch.allclose(
        logits(again, ids_BT), logits(AutoModelForCausalLM.from_pretrained(saved), ids_BT)
    )


def test_the_backbones_own_class_reads_the_backbone_alone(saved, base, ids_BT):
    """As docs/guide/attaching.md says: transformers finds the class's own config in this one, and
    nobody is asked."""
    loaded = LlamaForCausalLM.from_pretrained(saved)
    assert not hasattr(loaded, "engraphy")
    assert torch.equal(
        logits(loaded, ids_BT), logits(AutoModelForCausalLM.from_pretrained(base), ids_BT)
    )


def test_a_model_whose_vocabulary_was_resized_loads_as_one(base, ids_BT, tmp_path):
    model = remembering(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    save_pretrained(model, tmp_path / "wider")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "wider")
    assert torch.equal(logits(loaded, ids_BT), logits(model, ids_BT))


def test_the_memory_within_the_directory_is_named_where_the_directory_is_taken_for_it(saved, base):
    bare = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ConfigError, match="; load .*engraphy, or the whole model"):
        engraphy.load(bare, saved)
    engraphy.load(bare, saved / "engraphy")


def test_loading_tells_what_the_backbone_tells(saved):
    loaded, told = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and hasattr(loaded, "engraphy")


def test_a_name_on_the_hub_is_fetched_with_its_table(saved, model, ids_BT, tmp_path):
    repository = tmp_path / "models--someone--remembers"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(saved, repository / "snapshots" / ("a" * 40))
    loaded = AutoModelForCausalLM.from_pretrained("someone/remembers", cache_dir=tmp_path)
    assert torch.equal(logits(loaded, ids_BT), logits(model, ids_BT))


def test_a_model_in_a_subfolder_loads(saved, model, ids_BT):
    loaded = AutoModelForCausalLM.from_pretrained(saved.parent, subfolder=saved.name)
    assert torch.equal(logits(loaded, ids_BT), logits(model, ids_BT))


def test_training_goes_on_where_the_rows_are_in_ram(saved, ids_BT, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(saved, store="ram:")
    before = logits(loaded, ids_BT)
    data = [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_BT]
    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=loaded, train_dataset=data, **trainer_kwargs(loaded.engraphy, args))
    trainer.train()
    for _ in range(2):
        trainer.save_model(str(tmp_path / "trained"))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(trained, ids_BT), logits(loaded.eval(), ids_BT))
    assert not torch.equal(logits(trained, ids_BT), before)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage, error, match",
    [
        (lambda d: shutil.rmtree(d / "engraphy"), ConfigError, "memory.json"),
        (lambda d: shutil.rmtree(d / "engraphy" / "table"), TableError, "engram.json"),
        (
            lambda d: next((d / "engraphy" / "table").glob("*.safetensors")).unlink(),
            TableError,
            "safetensors",
        ),
        (lambda d: (d / "engraphy" / "memory.safetensors").unlink(), ConfigError, "dense weights"),
        (lambda d: (d / "engraphy" / "memory.json").write_text("[]"), ConfigError, "TypeError"),
        (
            lambda d: rewrite(d / "config.json", table_id="0" * 32),
            DigestMismatch,
            "belongs to the memory",
        ),
        (
            lambda d: rewrite(d / "config.json", memory_config={}),
            DigestMismatch,
            "belongs to the memory",
        ),
        (lambda d: (d / "model.safetensors").unlink(), OSError, "model.safetensors"),
    ],
)
def test_a_damaged_directory_is_a_named_error(mine, damage, error, match):
    damage(mine)
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(mine)


def test_the_table_or_memory_of_another_model_is_refused(base, mine, tmp_path):
    save_pretrained(remembering(base, seed=6), tmp_path / "other")
    table = mine / "engraphy" / "table"
    with pytest.raises(DigestMismatch, match="dense weights belong to table"):
        AutoModelForCausalLM.from_pretrained(
            mine, store=f"file:{tmp_path / 'other' / 'engraphy' / 'table'}"
        )
    shutil.rmtree(table)
    shutil.copytree(tmp_path / "other" / "engraphy" / "table", table)
    with pytest.raises(DigestMismatch, match="dense weights belong to table"):
        AutoModelForCausalLM.from_pretrained(mine)
    shutil.rmtree(mine / "engraphy")
    shutil.copytree(tmp_path / "other" / "engraphy", mine / "engraphy")
    with pytest.raises(DigestMismatch, match="config.json belongs to the memory"):
        AutoModelForCausalLM.from_pretrained(mine)


def test_layers_that_are_offloaded_have_no_memory(saved, tmp_path):
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    with pytest.raises(ConfigError, match="layer 1: expected its weights on a device"):
        AutoModelForCausalLM.from_pretrained(saved, device_map=places, offload_folder=tmp_path)


def test_what_cannot_load_as_one_is_not_saved_as_one(base, model, tmp_path):
    bare = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ConfigError, match="found none"):
        save_pretrained(bare, tmp_path / "one")
    judge = LlamaForSequenceClassification(bare.config)
    engraphy.attach(judge, model.engraphy.config)
    with pytest.raises(
        ConfigError,
        match="LlamaForSequenceClassification: expected a model that AutoModelForCausalLM",
    ):
        save_pretrained(judge, tmp_path / "one")
    for options, match in (
        ({"push_to_hub": True, "table": "link"}, "push_to_hub"),
        ({"table": "skip"}, "skip"),
        ({"table": "hardlink"}, "hardlink"),
        ({"table": "link"}, "sealed table on disk"),
    ):
        with pytest.raises(ConfigError, match=match):
            save_pretrained(model, tmp_path / "one", **options)
    assert not list(tmp_path.glob("one/*"))
    with pytest.raises(ConfigError, match="a config has no rows"):
        save_pretrained(model, tmp_path / "whole")
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "whole"))


def test_a_model_with_adapters_is_merged_first(base, ids_BT, tmp_path):
    peft = pytest.importorskip("peft")
    model = remembering(base)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    with pytest.raises(ConfigError, match="merge_and_unload"):
        save_pretrained(adapted, tmp_path / "one")
    merged = adapted.merge_and_unload()
    save_pretrained(merged, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded, ids_BT), logits(merged.eval(), ids_BT))


def test_only_the_main_process_writes(model, tmp_path):
    save_pretrained(model, tmp_path / "one", is_main_process=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
