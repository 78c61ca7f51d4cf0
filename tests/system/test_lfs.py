"""A Git LFS pointer in place of any file that is read is named, with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engraphy import EngramMemory, Table, VocabMap
from engraphy.addresses.tokenizers import load_tokenizer
from engraphy.data import tokens
from engraphy.errors import EngraphyError
from engraphy.memory.saved import identity_of
from engraphy.released.checkpoint import Checkpoint
from engraphy.train import RowAdam
from tests.memory.test_token_reader import SPECS, make_memory
from tests.tools.releases import write_qwen, write_v41

POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def refused(path: Path, use) -> None:
    path.chmod(0o644)
    path.write_text(POINTER)
    with pytest.raises(
        EngraphyError,
        match=rf"{path.name}: expected the file itself, found a Git LFS pointer .*pull",
    ):
        use()


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "model-00002-of-00003.safetensors",
        "tokenizer.json",
    ],
)
def test_of_a_checkpoint(tmp_path, name):
    path = write_v41(tmp_path / "c")
    refused(path / name, lambda: Checkpoint.open(path).vocab())


def test_of_a_checkpoint_in_one_file(tmp_path):
    path = write_qwen(tmp_path / "c")
    (path / "model.safetensors.index.json").unlink()
    (path / "model.safetensors").touch()
    refused(path / "model.safetensors", lambda: Checkpoint.open(path))


def test_of_a_table(tmp_path):
    make_memory(SPECS["demo"]).write_table(tmp_path / "t")
    for file in sorted((tmp_path / "t").glob("*.safetensors"))[-1], tmp_path / "t/engram.json":
        refused(file, lambda: Table.open(tmp_path / "t"))


@pytest.mark.parametrize(
    "name", ["memory.json", "vocab.json", "memory.safetensors", "table/engram.json"]
)
def test_of_a_saved_memory(tmp_path, name):
    make_memory(SPECS["demo"]).save(tmp_path / "m")
    refused(tmp_path / "m" / name, lambda: EngramMemory.load(tmp_path / "m"))
    if name == "memory.json":
        refused(tmp_path / "m" / name, lambda: identity_of(tmp_path / "m"))


def test_of_tokenizers_maps_and_moments(tmp_path):
    for file, use in (
        (tmp_path / "tokenizer.json", load_tokenizer),
        (tmp_path / "t.json", tokens.load_tokenizer),
        (tmp_path / "v.json", VocabMap.load),
    ):
        file.touch()
        refused(file, lambda file=file, use=use: use(file))
    rows = RowAdam(make_memory(SPECS["demo"]))
    rows.save(tmp_path / "moments", "0" * 32)
    refused(tmp_path / "moments/optimizer.json", lambda: rows.load(tmp_path / "moments", "0" * 32))


def test_a_file_that_is_damaged_otherwise_is_none(tmp_path):
    shutil.copytree(write_v41(tmp_path / "c"), tmp_path / "d")
    (tmp_path / "d/config.json").write_text("version 2")
    with pytest.raises(EngraphyError) as caught:
        Checkpoint.open(tmp_path / "d")
    assert "LFS" not in str(caught.value)
