"""Models, tokenizers and adapters by name: what loads, and what is said of what is missing."""

from __future__ import annotations

import sys
import tomllib

import pytest
import torch

from engraphy.errors import ConfigError, DataUnavailable
from engraphy.hf.pretrained import load_model, load_tokenizer, require_peft
from tests.tools.paths import ROOT


def test_a_model_loads_with_its_memory_in_eval_mode(saved):
    model, choice = load_model(str(saved), "float32")
    assert not model.training and model.dtype == torch.float32 and choice.name == "float32"
    assert model.engraphy.layers == (1, 2)
    assert load_tokenizer(str(saved)).eos_token == "<|endoftext|>"


def test_what_is_missing_is_named(base, tmp_path):
    with pytest.raises(DataUnavailable, match="expected a model with a tokenizer, as a folder or"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataUnavailable, match="expected a model, as a folder or a name on the hub"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        load_model(str(base), "float8")


def test_the_peft_that_is_asked_for_is_the_one_of_the_extra(monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (wanted,) = [name for name in extras["study"] if name.startswith("peft")]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DataUnavailable, match=f'adapters: expected the package peft.*"{wanted}"'):
        require_peft("adapters")
