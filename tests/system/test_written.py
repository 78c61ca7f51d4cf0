"""Whatever Engraphy writes: modes by the umask, whole or not at all, refused early where that can
be known."""

from __future__ import annotations

import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import engraphy
from engraphy import EngramConfig, EngramMemory, Table, VocabMap
from engraphy.data.corpus import Corpus, CorpusConfig, prepare
from engraphy.errors import ConfigError, EngraphyError, WriteFailed
from engraphy.hf import save_pretrained, write_card
from engraphy.lm.loop import train
from engraphy.recipes.studies.queue import write_result
from engraphy.report import page as report
from engraphy.store import open_store
from engraphy.table.quantize import quantize
from engraphy.train import RowAdam
from tests.lm.test_loop import make_run
from tests.memory.test_memory import make_memory
from tests.report.test_page import sample as report_of_a_run
from tests.tools.tiny_model import write_model
from tests.tools.tiny_training import attach_tiny, tiny_trainer
from tests.tools.tiny_training import tiny_model as training_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def model(base):
    found = AutoModelForCausalLM.from_pretrained(base)
    config = EngramConfig.for_model(found.config, layers=(1, 2), heads=2, rows_per_head=101, dim=8)
    engraphy.attach(found, config, dtype=torch.float32)
    return found


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of a file, as it refuses on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Everything that is written, by name.


def a_memory(place: Path, model) -> None:
    make_memory().save(place / "memory")


def a_linked_memory(place: Path, model) -> None:
    make_memory().save(place / "memory")
    EngramMemory.load(place / "memory").save(place / "linked", table="link")


def a_model(place: Path, model) -> None:
    save_pretrained(model, place / "model")
    save_pretrained(model, place / "model")  # over itself: file by file


def a_card(place: Path, model) -> None:
    a_memory(place, model)
    write_card(place / "memory", make_memory())


def a_table(place: Path, model) -> None:
    a_memory(place, model)
    quantize(place / "memory" / "table", place / "int8", "int8")
    table = Table.open(place / "int8", "w")
    table.write_rows(1, 0, np.zeros((1, table.row_bytes), np.uint8))
    table.close()  # unsealed


def a_pool(place: Path, model) -> None:
    a_memory(place, model)
    open_store(f"pool:{place}/pool?from={place}/memory/table", layer=1).close()


def moments(place: Path, model) -> None:
    RowAdam(make_memory(), lr=0.1).save(place / "moments", "0" * 32)


def a_trainers_checkpoint(place: Path, model) -> None:
    fresh = training_model()
    tiny_trainer(
        fresh, attach_tiny(fresh), place / "run", max_steps=1, save_strategy="steps", save_steps=1
    ).train()
    os.rename(place / "run" / "checkpoint-1" / "memory", place / "memory")  # the rest is Trainer's
    shutil.rmtree(place / "run")


def a_loops_checkpoint(place: Path, model) -> None:
    train(make_run(tokens=64), place / "loop")


def a_corpus(place: Path, model) -> None:
    if not (place / "text.txt").exists():
        (place / "text.txt").write_text(
            "One text of words.\fAnother one, of other words.\fA third." * 9
        )
    corpus = prepare(CorpusConfig(str(place / "text.txt"), vocab_size=270, batch=1, length=8))
    corpus.save(place / "corpus")
    Corpus.load(place / "corpus")


def small_files(place: Path, model) -> None:
    VocabMap.identity(3).save(place / "vocab.json")
    write_result({"job": 1}, place / "result.json")
    report.write(report_of_a_run(), place / "page")


EVERYTHING = (
    a_memory,
    a_linked_memory,
    a_model,
    a_card,
    a_table,
    a_pool,
    moments,
    a_trainers_checkpoint,
    a_loops_checkpoint,
    a_corpus,
    small_files,
)
Write = Callable[[Path, torch.nn.Module], None]
ON_PURPOSE = {a_pool: "pool/*.safetensors"}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], ids=oct)
@pytest.mark.parametrize("write", EVERYTHING)
def test_modes_are_what_the_umask_leaves_of_0666_and_0777(tmp_path, model, write: Write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path, model)
    finally:
        os.umask(before)
    read_only = set(tmp_path.glob(ON_PURPOSE.get(write, "none")))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o444 for path in read_only)
    found = {
        str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in tmp_path.rglob("*")
        if path not in read_only
    }
    assert found
    assert found == {
        name: oct((0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask) for name in found
    }


@pytest.mark.parametrize("write", EVERYTHING)
def test_nothing_but_what_was_asked_for_is_left(tmp_path, model, write: Write):
    write(tmp_path, model)
    assert not [
        path for path in tmp_path.rglob("*") if path.name == "writer.lock" and write is not a_table
    ]
    assert [path.name for path in tmp_path.rglob(".*")] == (
        [".pool.lock"] if write is a_pool else []
    )


def test_the_files_of_others_in_a_folder_keep_their_modes(tmp_path, model):
    save_pretrained(model, tmp_path)
    (tmp_path / "mine.safetensors").touch(0o600)
    save_pretrained(model, tmp_path)
    assert stat.S_IMODE((tmp_path / "mine.safetensors").stat().st_mode) == 0o600


# A disk that refuses.


@pytest.mark.parametrize("size", [100, 5_000, 20_000, 60_000, 200_000])
@pytest.mark.parametrize(
    "write", [write for write in EVERYTHING if write is not a_trainers_checkpoint]
)
def test_a_refused_write_is_an_error_with_a_name_and_leaves_nothing_half_written(
    tmp_path, model, write: Write, size
):
    """Whatever stands under a name afterwards stands there in a run without errors, too, and can be
    read."""
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole, model)
    place = tmp_path / "place"
    place.mkdir()
    if write is a_corpus:
        shutil.copy(whole / "text.txt", place)
    try:
        with no_file_over(size):
            write(place, model)
    except EngraphyError as error:
        assert str(place) in str(error) and "File too large" in str(error)
    expected = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(place) for path in place.rglob("*")} <= expected
    for folder in place.rglob("memory.json"):
        EngramMemory.load(folder.parent)


@pytest.mark.parametrize("size", [5_000, 60_000])
def test_a_model_that_cannot_be_saved_leaves_the_folder_as_it_was(tmp_path, model, size):
    with (
        no_file_over(size),
        pytest.raises(WriteFailed, match="new/model: it cannot be written .*too large.*; nothing"),
    ):
        save_pretrained(model, tmp_path / "new" / "model")
    assert not os.listdir(tmp_path)


def test_an_old_memory_stays_where_a_new_one_cannot_be_saved_over_it(tmp_path, model):
    save_pretrained(model, tmp_path / "m")
    with (
        no_file_over(5_000),
        pytest.raises(WriteFailed, match="it cannot be written .*File too large"),
    ):
        save_pretrained(model, tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


# Targets are judged before the work.


def refused(path: Path) -> list[tuple[Callable[[], object], str]]:
    memory = make_memory()
    return [
        (lambda: memory.save(path), "memory"),
        (lambda: RowAdam(memory, lr=0.1).save(path, "0" * 32), "moments"),
        (lambda: memory.write_table(path), "table"),
    ]


@pytest.mark.parametrize("name", ["file", "full", "file/below", "lost", "n" * 300])
def test_an_impossible_target_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "lost").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))

    def worked(*_, **__):
        raise AssertionError("the work had begun")

    for module in ("memory.saved", "train.optimizer", "memory.memory"):
        monkeypatch.setattr(f"engraphy.{module}.write_layer", worked, raising=False)
    monkeypatch.setattr("engraphy.memory.saved.write", worked)
    for act, _ in refused(tmp_path / name):
        with pytest.raises(EngraphyError, match="expected a|too long"):
            act()
    assert sorted(tmp_path.rglob("*")) == before


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    memory = make_memory()
    needed = memory.config.table_bytes(memory.format.row_bytes)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=needed)
    )  # but the dense layers
    with pytest.raises(
        WriteFailed, match=rf"expected {needed + 1}|bytes of free disk, found {needed}"
    ):
        memory.save(tmp_path / "m")
    with pytest.raises(WriteFailed, match="bytes of free disk"):
        save_pretrained(model, tmp_path / "model")
    with pytest.raises(WriteFailed, match="bytes of free disk"):
        RowAdam(memory, lr=0.1).save(tmp_path / "moments", "0" * 32)
    assert not os.listdir(tmp_path)


def test_a_link_to_an_empty_folder_is_followed(tmp_path, model):
    for name, write in (
        ("memory", make_memory().save),
        ("model", lambda path: save_pretrained(model, path)),
    ):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
    assert EngramMemory.load(tmp_path / "elsewhere" / "memory").layers == (1, 3)
    assert "\n# model\n" in (tmp_path / "elsewhere" / "model" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_taken_folder_keeps_its_class_of_error(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError, match="new or empty"):
        make_memory().save(tmp_path)
