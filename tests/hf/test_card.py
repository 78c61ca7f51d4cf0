"""The card of a saved memory: its numbers, its front matter, and code that runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import engraphy
from engraphy.errors import ConfigError
from engraphy.hf import card, write_card
from tests.tools.hf_saved import logits


@pytest.fixture(scope="module")
def model(whole):
    return whole


def test_the_card_tells_the_real_numbers(model, saved):
    memory, told = model.engraphy, (saved / "README.md").read_text()
    table = sum(store.info.rows for store in memory.stores.values()) * 8
    dense = sum(parameter.numel() for parameter in memory.parameters())
    for fact in (
        f"| table | {table:,} parameters, {4 * table:,} bytes |",
        f"| dense layers | {dense:,} parameters |",
        f"| trainable | {table + dense:,} parameters",
        "| layers | 1, 2 (0-based) |",
        "| orders, heads | 2, 3; 2 heads each |",
        "| row format | f32, 8 values in 32 bytes |",
        memory.address_digest,
        engraphy.Table.open(saved / "engraphy" / "table").table_id,
    ):
        assert fact in told
    memory.requires_grad_(False)
    assert "| trainable | 0 parameters" in card(memory, "one", "id")
    memory.rows_require_grad = True
    assert f"| trainable | {table:,} parameters" in card(memory, "one", "id")
    memory.requires_grad_(True).rows_require_grad = None


def test_a_served_table_does_not_count_as_trainable(saved):
    memory = AutoModelForCausalLM.from_pretrained(saved).engraphy
    dense = sum(parameter.numel() for parameter in memory.parameters())
    assert f"| trainable | {dense:,} parameters" in card(memory, "one", "id")


def test_the_cards_front_matter_names_a_base_model_that_the_hub_knows(model, tmp_path):
    memory = model.engraphy
    named = ModelCard(card(memory, "one", "id", "someone/model")).data
    assert (named.library_name, named.base_model) == ("engraphy", "someone/model")
    assert named.base_model_relation == "adapter" and "engram" in named.tags
    for local in (str(tmp_path), str(tmp_path / "gone"), None):
        told = card(memory, "one", "id", local)
        assert ModelCard(told).data.base_model is None and str(tmp_path.parent) not in told


def code(text):
    """The one Python block of a card."""
    (block,) = text.split("```python\n")[1:]
    return block.split("```")[0]


def test_the_code_on_a_card_runs(base, model, saved, ids_BT, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(base, tmp_path / base.name).parent)
    model.engraphy.save("memory")
    write_card("memory", model.engraphy, str(base))
    shutil.copytree(saved, saved.name)
    for told in (Path("memory/README.md"), Path(saved.name) / "README.md"):
        names = {}
        exec(code(told.read_text()), names)
        assert torch.equal(logits(names["model"], ids_BT), logits(model, ids_BT)), told


def test_a_card_of_ones_own_stays(mine):
    (mine / "README.md").write_text("mine")
    AutoModelForCausalLM.from_pretrained(mine).save_pretrained(mine)
    assert (mine / "README.md").read_text() == "mine"


def test_a_card_needs_a_saved_memory(model, tmp_path):
    with pytest.raises(ConfigError, match="memory.json of a saved memory"):
        write_card(tmp_path, model.engraphy)
