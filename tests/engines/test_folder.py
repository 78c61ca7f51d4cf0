"""The directory of a model and its memory, as engines read it: everything that does not fit is
named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import engraphy
from engraphy import hf
from engraphy.engines.config import register_config
from engraphy.engines.folder import open_memory, read_folder
from engraphy.errors import ConfigError, DigestMismatch
from tests.tools.tiny_model import fill, small_config
from tests.tools.tiny_training import tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    model = tiny_model()
    fill(engraphy.attach(model, small_config(model)))
    path = tmp_path_factory.mktemp("composite") / "whole"
    hf.save_pretrained(model, path)
    return path


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "folder"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_memory_of_a_folder_is_the_saved_one(whole):
    composite = read_folder(whole)
    assert composite.architecture == "LlamaForCausalLM"
    saved = engraphy.EngramMemory.load(whole / "engraphy")
    with open_memory(composite) as memory, saved:
        ids_BT = torch.tensor([[3, 4, 5]])
        x_BTD = torch.randn(1, 3, 32)
        out_BTD = memory.fuse(1, x_BTD, memory.lookup(ids_BT))
        assert torch.equal(out_BTD, saved.fuse(1, x_BTD, saved.lookup(ids_BT)))
        assert not any(parameter.requires_grad for parameter in memory.parameters())
        assert memory.stores.info.kind == "file"


def test_the_environment_goes_before_the_folder_and_the_folder_before_the_table(
    folder, monkeypatch
):
    change(folder / "config.json", engraphy_store="ram:")
    assert read_folder(folder).store == "ram:"
    url = f"file:{folder / 'engraphy' / 'table'}?read=pread"
    monkeypatch.setenv("ENGRAPHY_STORE", url)
    assert read_folder(folder).store == url
    with open_memory(read_folder(folder)) as memory:
        assert memory.stores.info.reads.startswith("pread")


def test_new_ids_of_the_backbone_are_dead(folder):
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", text_config=text_config | {"vocab_size": 120})
    with open_memory(read_folder(folder)) as memory:
        lookup = memory.lookup(torch.tensor([[3, 119]]))
        assert lookup.live is not None and lookup.live.tolist() == [[True, False]]


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(ConfigError, match="as a folder on this machine"):
        read_folder(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="expected model_type 'engraphy'.* found 'llama'"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "engraphy"}')
    with pytest.raises(ConfigError, match="with its architectures in text_config"):
        read_folder(tmp_path)


def test_a_memory_of_other_weights_is_named(folder):
    change(folder / "config.json", table_id="another")
    with pytest.raises(DigestMismatch, match="config.json belongs to the memory"):
        read_folder(folder)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_hidden_layers", 2, "expected layers 0 to 1, found layer 2"),
        ("hidden_size", 48, r"expected a memory with .* = \(48, 1\), found \(32, 1\)"),
    ],
)
def test_a_backbone_of_other_sizes_is_named(folder, field, value, message):
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", text_config=text_config | {field: value})
    with pytest.raises(ConfigError, match=message):
        read_folder(folder)


def test_a_memory_of_another_kind_of_model_is_named(folder):
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", text_config=text_config | {"model_type": "qwen3"})
    with pytest.raises(DigestMismatch, match="which the memory was made for"):
        open_memory(read_folder(folder))


def test_another_table_is_named(folder, tmp_path, monkeypatch):
    model = tiny_model()
    memory = fill(engraphy.attach(model, small_config(model)), seed=4)
    memory.write_table(tmp_path / "other")
    monkeypatch.setenv("ENGRAPHY_STORE", f"file:{tmp_path / 'other'}")
    with pytest.raises(DigestMismatch, match="the dense weights belong to table"):
        open_memory(read_folder(folder))


def test_engines_see_the_config_of_the_backbone(whole, monkeypatch):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "engraphy", hf.composite.EngraphyConfig)
    register_config(["LlamaForCausalLM"])
    config = AutoConfig.from_pretrained(whole)
    assert config.model_type == "llama"
    assert config.architectures == ["EngraphyLlamaForCausalLM"]
    assert config.hidden_size == 32
    register_config(["Qwen3ForCausalLM"])
    with pytest.raises(ConfigError, match="expected a backbone of Qwen3ForCausalLM, found Llama"):
        AutoConfig.from_pretrained(whole)
