"""A path is a path: folders whose names look like URLs, markup or patterns are folders like any
other."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import engraphy
from engraphy import EngramConfig, EngramMemory, Table, VocabMap
from engraphy.cli.app import app
from engraphy.errors import ConfigError
from engraphy.hf import save_pretrained
from engraphy.released.checkpoint import Checkpoint
from engraphy.store import CacheStore, open_checkpoint, open_pool, open_store
from engraphy.train import RowAdam
from tests.tools.releases import QWEN, qwen_tensors, records, write_qwen, write_v41

NAMES = (
    "what?cache=1",
    "what?cache=1GiB",
    "50%25 off",
    "a#b",
    "a&threads=1",
    "file:x",
    "pool:y?from=z",
    "ram:",
    "[bold]c[red",
    "*",
    "~",
    "ü ö",
)
named = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4)).eval()


def attached(model) -> EngramMemory:
    config = EngramConfig.for_model(model.config, layers=(1,), heads=2, rows_per_head=101, dim=8)
    memory = engraphy.attach(model, config)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.fill_(0.1)
    return memory


def rows(memory: EngramMemory) -> np.ndarray:
    store = memory.stores[1]
    return store.gather(np.arange(store.info.rows))


@named
@torch.no_grad()
def test_a_memory_is_saved_loaded_and_attached_from_any_folder(name, tmp_path, model):
    ids, memory = torch.arange(20).reshape(2, 10), attached(model)
    expected, found = model(ids).logits, rows(memory)
    memory.save(tmp_path / name)
    engraphy.detach(model)
    for store in (None, "ram:", tmp_path / name / "table"):
        loaded = EngramMemory.load(tmp_path / name, store)
        np.testing.assert_array_equal(rows(loaded), found)
        assert not isinstance(loaded.stores[1], CacheStore)
    served = engraphy.load(model, tmp_path / name)
    assert torch.equal(model(ids).logits, expected)
    assert served.stores[1].info.path == str(tmp_path / name / "table")
    engraphy.detach(model)
    engraphy.attach(model, memory.config, store=tmp_path / name / "table")
    np.testing.assert_array_equal(rows(model.engraphy), found)


@named
@torch.no_grad()
def test_a_memory_linked_to_a_table_in_any_folder_and_a_whole_model_are_loaded(
    name, tmp_path, model
):
    ids, memory = torch.arange(20).reshape(2, 10), attached(model)
    expected, found = model(ids).logits, rows(memory)
    memory.write_table(tmp_path / name)
    served = EngramMemory(memory.config, memory.vocab, tmp_path / name)
    served.save(tmp_path / f"linked {name}", table="link")
    np.testing.assert_array_equal(rows(EngramMemory.load(tmp_path / f"linked {name}")), found)
    save_pretrained(model, tmp_path / f"whole {name}")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / f"whole {name}")
    assert torch.equal(again(ids).logits, expected)


@named
def test_tables_checkpoints_pools_and_moments_lie_in_any_folder(name, tmp_path, model):
    memory = attached(model)
    memory.write_table(tmp_path / name)
    store = open_store(tmp_path / name, layer=1)
    np.testing.assert_array_equal(store.gather(np.arange(store.info.rows)), rows(memory))
    pool = open_pool(tmp_path / f"pool {name}", 1, tmp_path / name)
    np.testing.assert_array_equal(pool.gather(np.arange(pool.info.rows)), rows(memory))
    path = write_qwen(tmp_path / f"release {name}")
    VocabMap.identity(60).save(tmp_path / f"{name}.json")
    served = open_checkpoint(path, 1, tmp_path / f"{name}.json")
    assert Checkpoint.open(path).config == EngramConfig.from_hf(QWEN)
    np.testing.assert_array_equal(
        served.gather(np.arange(served.info.rows)), records(qwen_tensors(), 1)
    )
    RowAdam(memory, moments=f"file:{tmp_path / f'moments {name}'}")
    assert Table.open(tmp_path / f"moments {name}", "w").layers == (1,)


@named
def test_the_commands_on_tables_take_any_folder_and_print_its_name(name, tmp_path):
    def said(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["table", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    table, small = tmp_path / name, tmp_path / f"small {name}"
    assert str(table) in said("convert", write_v41(tmp_path / f"release {name}"), table)
    assert str(small) in said("quantize", table, small, "--kind", "int8")
    assert "sound" in said("verify", table)
    assert said("stat", small) and said("compare", table, table)
    result = CliRunner().invoke(app, ["table", "verify", str(tmp_path / f"{name} is not here")])
    assert result.exit_code == 1 and f"{name} is not here" in result.stderr


def test_a_url_is_divided_at_its_question_mark_and_a_path_is_not(tmp_path, model):
    memory = attached(model)
    memory.write_table(tmp_path / "t?cache=1MiB")
    memory.write_table(tmp_path / "t")
    assert isinstance(open_store(f"file:{tmp_path}/t?cache=1MiB", layer=1), CacheStore)
    assert open_store(tmp_path / "t?cache=1MiB", layer=1).info.path == str(
        tmp_path / "t?cache=1MiB"
    )
    for wrong in ({"layer": None}, {"layer": 1, "rows": 3}, {"layer": 1, "mode": "x"}):
        with pytest.raises(ConfigError, match=r"store PosixPath\("):
            open_store(tmp_path / "t", **wrong)


def test_nothing_inside_makes_a_url_of_a_path():
    for path in Path(engraphy.__file__).parent.rglob("*.py"):
        assert not re.findall(r"""f["'](?:file|checkpoint|pool):\{""", path.read_text()), path
