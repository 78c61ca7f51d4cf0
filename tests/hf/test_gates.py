"""Gates and rows in Trainer's log: the numbers are those of the forwards, and the training does not
notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from engraphy import Trace
from engraphy.hf import GateCallback, trainer_kwargs
from tests.tools.tiny_training import (
    arguments,
    attach_tiny,
    rows_of,
    same,
    tiny_model,
    token_data,
    weights_of,
)

pytestmark = pytest.mark.slow

GATES = ["engraphy/gate_layer_1", "engraphy/gate_layer_2"]
ROWS = ["engraphy/rows_layer_1", "engraphy/rows_layer_2"]


def run_of(folder, log_gates=True, data=None, callbacks=(), **changes):
    """(Trainer after its run, memory)."""
    model = tiny_model()
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.0  # its random numbers depend on the length of a row
    memory = attach_tiny(model)
    parts = trainer_kwargs(memory, arguments(folder, **changes), log_gates=log_gates)
    parts["callbacks"] += callbacks
    trainer = Trainer(
        model=model, train_dataset=data or token_data(), eval_dataset=token_data(4, seed=2), **parts
    )
    trainer.train()
    return trainer, memory


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, {"bf16": True}],
    ids=str,
)
def test_training_is_equal_bit_for_bit_with_and_without(changes, tmp_path):
    (run, memory), (bare, other) = (
        run_of(tmp_path, log_gates, **changes) for log_gates in (True, False)
    )
    assert same(weights_of(run.model), weights_of(bare.model)) and same(
        rows_of(memory), rows_of(other)
    )
    for line, plain in zip(lines_of(run), lines_of(bare), strict=True):
        assert line["loss"] == plain["loss"] and set(line) - set(plain) == {*GATES, *ROWS}
    assert not [
        name for line in bare.state.log_history for name in line if name.startswith("engraphy/")
    ]


class FirstForward(TrainerCallback):
    """Keeps the gates and rows that a trace finds for each batch, before the weights move."""

    def __init__(self):
        self.traces = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def trace(module, arguments, keywords):
            keywords["engraphy_trace"] = self.traces.append(Trace()) or self.traces[-1]
            return arguments, keywords

        self.handle = model.register_forward_pre_hook(trace, with_kwargs=True)

    def on_train_end(self, *args, **kwargs):
        self.handle.remove()


def test_a_line_holds_the_mean_since_the_last_and_the_rows_since_the_beginning(tmp_path):
    traces = FirstForward()
    run, memory = run_of(
        tmp_path, callbacks=[traces], logging_steps=2, gradient_accumulation_steps=2
    )
    lines = lines_of(run)
    assert len(lines) == 2 and len(traces.traces) == 8
    for at, line in enumerate(lines):
        for layer in memory.layers:
            gates = torch.cat(
                [trace.gates[layer].flatten() for trace in traces.traces[4 * at : 4 * at + 4]]
            )
            assert line[f"engraphy/gate_layer_{layer}"] == pytest.approx(
                gates.double().mean().item(), abs=1e-7
            )
            ids = [
                trace.row_ids[layer][:, :-1].ravel()  # a sequence's last token predicts nothing
                for trace in traces.traces[: 4 * at + 4]
            ]
            share = len(np.unique(np.concatenate(ids))) / memory.stores[layer].info.rows
            assert line[f"engraphy/rows_layer_{layer}"] == pytest.approx(share)


def test_padding_and_evaluation_do_not_count(tmp_path):
    whole = token_data(8)
    padded = [
        {
            "input_ids": torch.cat([each["input_ids"], torch.zeros(20, dtype=torch.long)]),
            "labels": torch.cat([each["labels"], torch.full((20,), -100)]),
            "attention_mask": torch.cat(
                [torch.ones(12, dtype=torch.long), torch.zeros(20, dtype=torch.long)]
            ),
        }
        for each in whole
    ]
    settings = dict(max_steps=1, eval_strategy="steps", eval_steps=1)
    (plain, _), (wide, _) = (run_of(tmp_path, data=data, **settings) for data in (whole, padded))
    for name in (*GATES, *ROWS):
        assert lines_of(wide)[0][name] == pytest.approx(lines_of(plain)[0][name], abs=1e-6)
    (line,) = [line for line in wide.state.log_history if "eval_loss" in line]
    assert not set(line) & set(GATES)


def test_callbacks_that_come_later_see_the_numbers_and_no_hook_or_tensor_stays(tmp_path):
    seen = []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    run, memory = run_of(tmp_path, callbacks=[Reader()])
    assert all(set(GATES) <= set(line) for line in seen if "loss" in line)
    assert not any(block._forward_hooks for block in memory.blocks.values())
    (callback,) = [
        each for each in run.callback_handler.callbacks if isinstance(each, GateCallback)
    ]
    assert not callback._sums


def test_a_table_that_does_not_learn_logs_its_gates_alone(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    memory.rows_require_grad = False
    trainer = Trainer(
        model=model,
        train_dataset=token_data(),
        **trainer_kwargs(memory, arguments(tmp_path), log_gates=True),
    )
    trainer.train()
    assert all(set(GATES) <= set(line) and not set(line) & set(ROWS) for line in lines_of(trainer))


def test_a_training_that_ended_with_an_error_leaves_no_second_hook_to_the_next(tmp_path):
    model = tiny_model()
    memory = attach_tiny(model)
    callback = GateCallback(memory)
    for _ in range(2):
        callback.on_train_begin(None, None, None)
    assert [len(block._forward_hooks) for block in memory.blocks.values()] == [1, 1]
