"""A memory under transformers' Trainer: the step, what learns, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from engraphy.errors import ConfigError, InputError
from engraphy.hf import MemoryAdamW, trainer_kwargs
from engraphy.memory import RowGrad
from engraphy.train import OptimizerPair, RowAdam, weight_decay_groups
from tests.tools.tiny_training import (
    arguments,
    attach_tiny,
    optimizer_of,
    rows_of,
    same,
    tiny_model,
    tiny_trainer,
    token_data,
    weights_of,
)

pytestmark = pytest.mark.slow


def test_trainer_steps_exactly_as_a_loop_over_the_pair_does(tmp_path):
    """The whole of it: accumulation, decay, the common norm of dense and rows, one schedule for
    both rates."""
    model, twin = tiny_model(), tiny_model()
    memory, twin_memory = attach_tiny(model), attach_tiny(twin)
    calls, norms = [], []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    for each in (model, twin):
        each.config.attention_dropout = 0.0
        for block in each.model.layers:
            block.self_attn.attention_dropout = 0.0
    run = tiny_trainer(
        model,
        memory,
        tmp_path,
        lr_scheduler_type="cosine",
        gradient_accumulation_steps=2,
        max_grad_norm=0.3,
    )
    run.train()
    handle.remove()

    rates = [line["learning_rate"] for line in run.state.log_history if "learning_rate" in line]
    adamw = torch.optim.AdamW(weight_decay_groups(twin, 0.1), lr=1e-2, fused=True)
    pair = OptimizerPair(
        adamw, RowAdam(twin_memory, lr=5e-2), lambda progress: rates[int(progress)] / 1e-2, clip=0.3
    )
    twin.train()
    for step in range(4):
        for call in calls[2 * step : 2 * step + 2]:
            twin(**call).loss.backward()
        assert len(twin_memory.row_grads) == 2 * len(twin_memory.layers)
        norms.append(pair.step(step))
    assert len(calls) == 8 and min(norms) > 0.3
    assert same(weights_of(twin), weights_of(model)) and same(rows_of(twin_memory), rows_of(memory))


def test_evaluation_inside_training_leaves_no_gradients_behind(tmp_path):
    pending = []

    class Look(TrainerCallback):
        def on_evaluate(self, *args, **kwargs):
            pending.append(len(memory.row_grads))

    model = tiny_model()
    memory = attach_tiny(model)
    run = tiny_trainer(model, memory, tmp_path, eval_strategy="steps", eval_steps=1)
    run.add_callback(Look)
    run.train()
    assert pending == [0] * 4 and memory.row_grads == []


def changed(before, after) -> set[str]:
    """Which of backbone, memory and rows differ."""
    kinds = {name: "memory" if str(name).startswith("engraphy.") else "backbone" for name in before}
    return {
        kinds[name] if isinstance(name, str) else "rows"
        for name in before
        if not torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name]))
    }


@pytest.mark.parametrize(
    "what", ["backbone memory rows", "memory rows", "memory", "rows", "backbone"]
)
def test_what_is_frozen_stays_and_the_rest_learns(what, tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    model.requires_grad_("backbone" in what)
    memory.requires_grad_("memory" in what)
    memory.rows_require_grad = "rows" in what
    before = {**weights_of(model), **rows_of(memory)}
    run = tiny_trainer(model, memory, tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    after = {**weights_of(model), **rows_of(memory)}
    assert changed(before, after) == set(what.split())
    assert (optimizer_of(run).rows is None) == ("rows" not in what)
    again = tiny_model(seed=5)
    other = attach_tiny(again, seed=6)
    again.requires_grad_("backbone" in what)
    other.requires_grad_("memory" in what)
    other.rows_require_grad = "rows" in what
    tiny_trainer(again, other, tmp_path).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert same({**weights_of(again), **rows_of(other)}, after)


def test_both_rates_follow_the_schedule(tmp_path):
    model = tiny_model()
    run = tiny_trainer(model, attach_tiny(model), tmp_path)
    run.train()
    optimizer = optimizer_of(run)
    decayed, kept, rows = (group["lr"] for group in optimizer.param_groups)
    assert optimizer.rows.steps == 4 and rows == pytest.approx(5 * decayed)
    assert decayed == kept < 1e-2


def test_bf16_autocast_trains_f32_rows(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    before = rows_of(memory)
    run = tiny_trainer(model, memory, tmp_path, bf16=True)
    run.train()
    for layer, rows in rows_of(memory).items():
        assert (rows != before[layer]).any() and np.isfinite(rows.view(np.float32)).all()


def test_gradient_checkpointing_gives_the_same_step(tmp_path):
    ends = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.model.layers[1].gradient_checkpointing == checkpointing
        memory = attach_tiny(model)
        tiny_trainer(model, memory, tmp_path, max_steps=2).train()
        ends.append(
            {
                **weights_of(model),
                **{layer: rows.view(np.float32) for layer, rows in rows_of(memory).items()},
            }
        )
    for name, value in ends[0].items():
        torch.testing.assert_close(
            torch.as_tensor(ends[1][name]), torch.as_tensor(value), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(
    "change, match",
    [
        (
            dict(optim="adafactor"),
            "optim: expected adamw_torch or adamw_torch_fused, found .*adafactor",
        ),
        (dict(fp16=True), "fp16: expected bf16"),
        (dict(deepspeed="zero.json"), "found FSDP or DeepSpeed"),
        (dict(fsdp=True), "found FSDP or DeepSpeed"),
        (dict(n_gpu=2), "expected one device a process .* found 2"),
    ],
)
def test_arguments_that_the_rows_cannot_follow_are_refused(monkeypatch, tmp_path, change, match):
    memory, args = attach_tiny(tiny_model()), arguments(tmp_path)
    for name, value in change.items():
        monkeypatch.setattr(TrainingArguments, name, value) if name == "n_gpu" else setattr(
            args, name, value
        )
    with pytest.raises(ConfigError, match=match):
        trainer_kwargs(memory, args)


def test_a_trainer_that_was_given_only_part_of_it_is_an_error(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    args = arguments(tmp_path)
    given = trainer_kwargs(memory, args)
    assert args.max_grad_norm == 1.0 and given["args"].max_grad_norm == 0
    with pytest.raises(ConfigError, match="found max_grad_norm = 1.0 left to Trainer"):
        Trainer(model=model, train_dataset=token_data(), **(given | {"args": args})).train()
    given.pop("optimizer_cls_and_kwargs")
    with pytest.raises(ConfigError, match="expected the optimiser of trainer_kwargs, found AdamW"):
        Trainer(model=model, train_dataset=token_data(), **given).train()


def test_a_trainer_that_was_told_nothing_of_the_memory_says_so_once_the_weights_have_moved(
    tmp_path,
):
    model = tiny_model()
    attach_tiny(model)
    with pytest.warns(UserWarning, match="row gradients wait .* hf.trainer_kwargs"):
        Trainer(
            model=model, args=arguments(tmp_path, warmup_steps=1), train_dataset=token_data()
        ).train()


def test_a_memory_that_the_model_does_not_have_is_refused(tmp_path):
    model, other = tiny_model(), tiny_model()
    memory = attach_tiny(other)
    with pytest.raises(ConfigError, match="expected the memory attached to it, found no memory"):
        tiny_trainer(model, memory, tmp_path).train()
    attach_tiny(model)
    with pytest.raises(ConfigError, match="found another EngramMemory"):
        tiny_trainer(model, memory, tmp_path).train()
    with pytest.raises(ConfigError, match="found another memory's"):
        trainer_kwargs(memory, arguments(tmp_path), RowAdam(model.engraphy))


def test_the_optimiser_alone_keeps_torchs_customs(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    _, settings = trainer_kwargs(memory, arguments(tmp_path))["optimizer_cls_and_kwargs"]
    optimizer = MemoryAdamW(model, **settings)
    before = {**weights_of(model), **rows_of(memory)}
    model.train()
    model(**{name: ids_T[None] for name, ids_T in token_data()[0].items()}).loss.backward()
    assert memory.row_grads
    optimizer.zero_grad()
    assert memory.row_grads == [] and all(
        parameter.grad is None for parameter in model.parameters()
    )
    with pytest.raises(ConfigError, match="no closure"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ConfigError, match="a run with this memory"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    memory.row_grads.append(RowGrad(1, np.array([3]), np.full((1, 8), np.nan, np.float32)))
    with pytest.raises(InputError, match="layer 1, row 3: the gradient is not finite"):
        optimizer.step()
    assert same({**weights_of(model), **rows_of(memory)}, before)
