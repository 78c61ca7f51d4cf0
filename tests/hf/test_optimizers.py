"""The optimiser of a memory outside `trainer_kwargs`: trainers that take an optimiser alone, and
accelerate."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from engraphy.errors import ConfigError
from engraphy.hf import MemoryAdamW, trainer_kwargs, trainer_optimizers
from engraphy.train import RowAdagrad
from tests.tools.tiny_training import (
    arguments,
    attach_tiny,
    rows_of,
    same,
    tiny_model,
    tiny_trainer,
    token_data,
    weights_of,
)

pytestmark = pytest.mark.slow

LONG = dict(save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.5)


def optimizer_trainer(folder, rows=None, seed=0, **changes):
    """(Trainer that was given an optimiser, its memory)."""
    model = tiny_model(seed)
    memory = attach_tiny(model, seed)
    parts = trainer_optimizers(memory, arguments(folder, **changes), model, rows and rows(memory))
    assert set(parts) == {"args", "optimizers", "callbacks"} and parts["optimizers"][1] is None
    return Trainer(
        model=model, train_dataset=token_data(), eval_dataset=token_data(4, seed=2), **parts
    ), memory


@pytest.mark.parametrize(
    "rows", [None, lambda memory: RowAdagrad(memory, lr=0.1)], ids=["adam", "adagrad"]
)
def test_an_optimiser_that_is_given_trains_as_the_one_that_trainer_makes(rows, tmp_path):
    run, memory = optimizer_trainer(tmp_path / "a", rows, lr_scheduler_type="cosine", **LONG)
    run.train()
    model = tiny_model()
    twin = attach_tiny(model)
    other = tiny_trainer(
        model, twin, tmp_path / "b", rows and rows(twin), lr_scheduler_type="cosine", **LONG
    )
    other.train()
    assert same(weights_of(run.model), weights_of(model)) and same(rows_of(memory), rows_of(twin))
    rates = [
        [line["learning_rate"] for line in each.state.log_history if "learning_rate" in line]
        for each in (run, other)
    ]
    assert rates[0] == rates[1] and rates[0][-1] < rates[0][0]


def test_a_run_with_an_optimiser_that_is_given_resumes_bit_for_bit(tmp_path):
    run, memory = optimizer_trainer(tmp_path, **LONG)
    run.train()
    again, other = optimizer_trainer(tmp_path, seed=5, **LONG)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights_of(run.model), weights_of(again.model)) and same(
        rows_of(memory), rows_of(other)
    )


def test_what_trainer_kwargs_refuses_is_refused(tmp_path):
    model, args = tiny_model(), arguments(tmp_path)
    memory = attach_tiny(model)
    with pytest.raises(ConfigError, match="found no memory"):
        trainer_optimizers(memory, args, tiny_model())
    with pytest.raises(ConfigError, match="optim: expected adamw_torch"):
        trainer_optimizers(memory, arguments(tmp_path, optim="adafactor"), model)
    assert args.max_grad_norm == 1.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_accelerate_prepares_model_and_optimiser_and_trains_as_a_plain_loop_does(
    accumulation, tmp_path
):
    ends = []
    for accelerated in (False, True):
        model = tiny_model().eval()
        memory = attach_tiny(model).train()
        _, settings = trainer_kwargs(memory, arguments(tmp_path))["optimizer_cls_and_kwargs"]
        optimizer = MemoryAdamW(model, **settings)
        batches = [
            torch.stack([each["input_ids"] for each in token_data(8)[2 * at : 2 * at + 2]])
            for at in range(4)
        ]
        if accelerated:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
            prepared, optimizer = accelerator.prepare(model, optimizer)
            for ids_BT in batches:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(ids_BT, labels=ids_BT).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            for at, ids_BT in enumerate(batches, start=1):
                (model(ids_BT, labels=ids_BT).loss / accumulation).backward()
                if at % accumulation == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        assert memory.row_grads == []
        ends.append((weights_of(model), rows_of(memory)))
    fresh = attach_tiny(tiny_model())
    assert same(ends[0][0], ends[1][0]) and same(ends[0][1], ends[1][1])
    assert not same(ends[0][1], rows_of(fresh))
