"""The models that these tests share. A file that needs another one has its own fixture `model`."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoTokenizer

from engraphy.hf import save_pretrained
from tests.tools.hf_saved import remembering
from tests.tools.tiny_model import small_config, write_model
from tests.tools.tiny_training import VOCAB, tiny_model


@pytest.fixture
def model():
    """A model of four layers without a memory."""
    return tiny_model(num_hidden_layers=4).eval()


@pytest.fixture
def config(model):
    """That of a memory for `model`."""
    return small_config(model)


@pytest.fixture
def ids_BT():
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model without a memory, and its tokenizer."""
    return write_model(tmp_path_factory.mktemp("models") / "base", attention_dropout=0.125)


@pytest.fixture(scope="module")
def whole(base):
    """The model in `base` with a memory that has learned something."""
    return remembering(base)


@pytest.fixture(scope="module")
def saved(whole, base, tmp_path_factory):
    """`whole` as one directory, its tokenizer with it."""
    folder = tmp_path_factory.mktemp("models") / "one"
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    save_pretrained(whole, folder)
    return folder


@pytest.fixture
def mine(saved, tmp_path):
    """A copy of `saved` to damage."""
    return shutil.copytree(saved, tmp_path / "mine")
