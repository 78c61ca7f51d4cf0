"""Checkpoints of a memory under Trainer: a run continues bit for bit, also after a crash."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import engraphy
from engraphy.errors import ConfigError, DigestMismatch, TableError, WriteFailed
from engraphy.hf import MemoryCallback, trainer_kwargs
from engraphy.system import files
from engraphy.train import RowAdagrad, RowAdam
from tests.tools.tiny_training import (
    BEST_OF_EVERY_STEP,
    arguments,
    attach_tiny,
    moments_of,
    optimizer_of,
    rows_of,
    same,
    tiny_model,
    tiny_trainer,
    weights_of,
)

pytestmark = pytest.mark.slow

LONG = dict(
    max_steps=4,
    save_strategy="steps",
    save_steps=2,
    gradient_accumulation_steps=2,
    max_grad_norm=0.5,
)


def learned(trainer_: Trainer, memory) -> dict:
    """Parameters and rows."""
    return {**weights_of(trainer_.model), **rows_of(memory)}


def everything(trainer_: Trainer, memory) -> dict:
    """All that training changes: parameters, rows, moments of both kinds, steps, rates."""
    optimizer = optimizer_of(trainer_)
    state = {
        f"adamw {index} {name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    rates = torch.tensor([optimizer.rows.steps, *(group["lr"] for group in optimizer.param_groups)])
    return {
        **learned(trainer_, memory),
        **state,
        "rates": rates,
        **{f"moments {layer}": value for layer, value in moments_of(optimizer.rows).items()},
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps with checkpoints at 2 and 4: (folder, moved since, everything at its end,
    losses)."""
    folder = tmp_path_factory.mktemp("straight")
    model = tiny_model()
    memory = attach_tiny(model)
    run = tiny_trainer(model, memory, folder / "run", **LONG)
    run.train()
    assert memory.row_grads == []
    os.rename(folder / "run", folder / "kept")
    return (
        folder / "kept",
        everything(run, memory),
        [line["loss"] for line in run.state.log_history if "loss" in line],
    )


def other_trainer(folder, **changes):
    """A Trainer over a model and a memory that hold other values, as a new process would before it
    resumes."""
    model = tiny_model(seed=5)
    memory = attach_tiny(model, seed=6)
    return tiny_trainer(model, memory, folder, **(LONG | changes)), memory


def test_a_resumed_run_equals_one_that_was_not_interrupted_bit_for_bit(straight, tmp_path):
    folder, expected, losses = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    run, memory = other_trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert same(everything(run, memory), expected)
    assert [line["loss"] for line in run.state.log_history if "loss" in line] == losses


@pytest.mark.parametrize(
    "adagrad, changes", [(True, {}), (False, {"bf16": True})], ids=["row adagrad", "bf16"]
)
def test_other_rows_optimisers_and_bf16_resume_bit_for_bit(adagrad, changes, tmp_path):
    ends = []
    for resume in (0, 1):
        model = tiny_model(seed=resume)
        memory = attach_tiny(model, seed=resume)
        run = tiny_trainer(
            model,
            memory,
            tmp_path,
            RowAdagrad(memory, lr=0.1) if adagrad else None,
            **LONG,
            **changes,
        )
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        ends.append(everything(run, memory))
    assert same(*ends)


def test_the_same_trainer_can_be_taken_back_to_its_checkpoint(straight, tmp_path):
    _, expected, _ = straight
    model = tiny_model()
    memory = attach_tiny(model)
    run = tiny_trainer(model, memory, tmp_path, **LONG)
    run.train()
    memory.init_rows(1.0, 9)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(everything(run, memory), expected)


def test_a_checkpoint_is_found_in_another_runs_folder_and_by_name_where_it_has_moved(
    straight, tmp_path
):
    _, expected, _ = straight
    model = tiny_model()
    tiny_trainer(model, attach_tiny(model), tmp_path / "a", **LONG).train()
    run, memory = other_trainer(tmp_path / "b")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(everything(run, memory), expected)

    moved = str(tmp_path / "moved")
    os.rename(tmp_path / "a" / "checkpoint-2", moved)
    shutil.rmtree(tmp_path / "b")
    run, memory = other_trainer(tmp_path / "b")
    with pytest.raises(ConfigError, match="expected a checkpoint of step 2 .* it has moved"):
        run.train(resume_from_checkpoint=moved)
    run, memory = other_trainer(tmp_path / "b", resume_from_checkpoint=moved)
    run.train(resume_from_checkpoint=moved)
    assert same(everything(run, memory), expected)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_the_best_checkpoint_brings_back_rows_and_weights_of_the_memory(strategy, tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    evaluation = {"save_strategy": strategy}
    if strategy == "epoch":
        evaluation["eval_strategy"] = "epoch"
    run = tiny_trainer(
        model,
        memory,
        tmp_path,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_steps=6,
        per_device_train_batch_size=8,
        **BEST_OF_EVERY_STEP | evaluation,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_total_limit=1,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert run.state.best_global_step < 6 and not list(tmp_path.rglob(".*"))
    stored = engraphy.EngramMemory.load(best / "memory")
    assert same(rows_of(stored), rows_of(memory)) and same(weights_of(stored), weights_of(memory))
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)


def test_old_checkpoints_are_rotated_with_their_tables(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    run = tiny_trainer(model, memory, tmp_path, **(LONG | dict(save_steps=1, save_total_limit=2)))
    run.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    assert all((tmp_path / name / "memory" / "moments").is_dir() for name in kept)


@pytest.mark.parametrize("early", [True, False], ids=["before-the-rest", "after-the-rest"])
@pytest.mark.parametrize("place", ["moments", "rename"])
def test_a_crash_while_a_checkpoint_is_written_never_leaves_one_that_resumes_wrongly(
    straight, tmp_path, monkeypatch, place, early
):
    folder, expected, _ = straight
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    stale = tmp_path / "checkpoint-4"  # of a run that came this far before
    exchange = files._exchange

    def crash(*args, **kwargs):
        raise OSError("power cut")

    run, memory = other_trainer(tmp_path)
    with monkeypatch.context() as patch:
        if place == "moments":
            patch.setattr(RowAdam, "save", crash)
        else:
            patch.setattr(
                files,
                "_exchange",
                lambda a, b: crash() if b == stale / "memory" else exchange(a, b),
            )
        if not early:
            patch.setattr(MemoryCallback, "on_step_end", TrainerCallback.on_step_end)
        with pytest.raises(OSError, match="power cut"):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run, memory = other_trainer(tmp_path)
    if early:  # nothing new is in its place yet: the older run's checkpoint is whole
        run.train(
            resume_from_checkpoint=True
        )  # Trainer takes one step more then, at a rate of zero
    else:
        with pytest.raises(ConfigError, match="was not written to the end"):
            run.train(resume_from_checkpoint=True)
        run, memory = other_trainer(tmp_path)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not list(tmp_path.rglob(".*"))
    assert same(learned(run, memory), {name: expected[name] for name in learned(run, memory)})


def test_the_only_older_checkpoint_is_kept_until_the_new_one_has_its_table(
    straight, tmp_path, monkeypatch
):
    folder, expected, _ = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    run, memory = other_trainer(tmp_path, save_total_limit=1)
    with monkeypatch.context() as patch:
        patch.setattr(RowAdam, "save", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    run, memory = other_trainer(tmp_path, save_total_limit=1)
    run.train(resume_from_checkpoint=True)
    assert same(everything(run, memory), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_disk_that_fills_up_leaves_no_folder_that_counts_as_the_last_checkpoint(
    straight, tmp_path, monkeypatch
):
    folder, expected, _ = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    run, memory = other_trainer(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("engraphy.memory.saved.save_file", full)
        with pytest.raises(
            WriteFailed,
            match=r"checkpoint-4: it cannot be written .*No space left.* bytes are free",
        ):
            run.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    run, memory = other_trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert same(everything(run, memory), expected)


def test_too_little_disk_is_said_before_the_first_step(tmp_path, monkeypatch):
    model = tiny_model()
    memory = attach_tiny(model)
    run = tiny_trainer(model, memory, tmp_path, **LONG)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WriteFailed, match="bytes of free disk, found 1000"):
        run.train()
    assert run.state.global_step == 0 and not os.listdir(tmp_path)


def test_a_memory_that_a_kill_left_beside_its_checkpoint_is_found_and_joins_it(straight, tmp_path):
    """Killed after Trainer has written checkpoint-2, before the memory has joined it."""
    folder, expected, _ = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    os.rename(tmp_path / "checkpoint-2" / "memory", tmp_path / ".memory-of-checkpoint-2")
    run, memory = other_trainer(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert same(everything(run, memory), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "checkpoint-2" / "memory" / "state.json").exists()


def test_what_crashes_left_beside_checkpoints_is_tidied_and_none_loses_its_memory(
    straight, tmp_path
):
    folder, _, _ = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-3")
    os.rename(tmp_path / "checkpoint-3" / "memory", tmp_path / ".memory-of-checkpoint-3")
    shutil.copytree(folder / "checkpoint-4" / "memory", tmp_path / ".memory-of-checkpoint-9")
    run, _ = other_trainer(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert all((path / "memory" / "state.json").exists() for path in tmp_path.iterdir())


def test_a_checkpoint_put_together_from_two_is_refused(straight, tmp_path):
    folder, _, _ = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-2" / "memory")
    shutil.copytree(folder / "checkpoint-4" / "memory", tmp_path / "checkpoint-2" / "memory")
    run, _ = other_trainer(tmp_path)
    with pytest.raises(ConfigError, match="expected a checkpoint of step 2 whose rows have state"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "damage, error",
    [
        (lambda memory, other: shutil.rmtree(memory / "moments"), ConfigError),
        (
            lambda memory, other: (memory / "moments" / "optimizer.json").write_text("{"),
            ConfigError,
        ),
        (lambda memory, other: (memory / "memory.safetensors").unlink(), ConfigError),
        (lambda memory, other: shutil.copy(other / "memory.safetensors", memory), DigestMismatch),
        (
            lambda memory, other: (
                shutil.rmtree(memory / "moments"),
                shutil.copytree(other / "moments", memory / "moments"),
            ),
            DigestMismatch,
        ),
        (
            lambda memory, other: next((memory / "table").glob("*.safetensors")).write_bytes(b""),
            TableError,
        ),
    ],
    ids=["no moments", "moments cut", "no weights", "other weights", "other moments", "table cut"],
)
def test_a_damaged_checkpoint_is_a_named_error(straight, tmp_path, damage, error):
    folder, _, _ = straight
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    damage(tmp_path / "checkpoint-2" / "memory", folder / "checkpoint-4" / "memory")
    with pytest.raises(error):
        other_trainer(tmp_path)[0].train(resume_from_checkpoint=True)


def test_rows_are_not_trained_from_a_checkpoint_that_only_the_dense_part_was_read_from(
    straight, tmp_path
):
    folder, _, _ = straight
    run, _ = other_trainer(tmp_path)
    run.callback_handler.callbacks = [
        each for each in run.callback_handler.callbacks if not isinstance(each, MemoryCallback)
    ]
    with pytest.raises(ConfigError, match="give the Trainer all of trainer_kwargs"):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_checkpoint_of_weights_alone_holds_no_moments_and_does_not_resume(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    run = tiny_trainer(
        model, memory, tmp_path, save_strategy="steps", save_steps=2, save_only_model=True
    )
    run.train()
    assert same(
        rows_of(engraphy.EngramMemory.load(tmp_path / "checkpoint-4" / "memory")), rows_of(memory)
    )
    assert not (tmp_path / "checkpoint-4" / "memory" / "moments").exists()
    with pytest.raises(ConfigError, match="save_only_model"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_rows_of_a_sealed_table_on_disk_stay_there_and_are_not_copied_into_checkpoints(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    memory.save(tmp_path / "first")
    engraphy.detach(model)
    memory = engraphy.load(model, tmp_path / "first")
    memory.rows_require_grad = False
    run = tiny_trainer(model, memory, tmp_path / "run", save_strategy="steps", save_steps=2)
    run.train()
    assert not (tmp_path / "run" / "checkpoint-2" / "memory" / "table").exists()
    expected = weights_of(model)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(weights_of(model), expected)
    memory.rows_require_grad = None
    with pytest.raises(ConfigError, match="expected a writable store"):
        trainer_kwargs(memory, arguments(tmp_path))
