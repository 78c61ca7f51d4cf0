"""An attached memory under transformers' Trainer: an optimiser that steps the rows too, and
checkpoints that hold them.

    args = TrainingArguments("runs/a", learning_rate=2e-4, max_grad_norm=1.0, bf16=True)
    trainer = Trainer(model=model, train_dataset=data, **trainer_kwargs(memory, args))

Trainer knows parameters only. The rows join it in two places. `MemoryAdamW` (optimizer.py) takes
their gradients into the norm and the step. `MemoryCallback` puts `memory/` into each checkpoint
folder (checkpoints.py). This folder and optimizer.pt name the same state id, which is drawn anew
after every step. So a checkpoint whose parts do not belong together is refused, whatever cut its
writing short.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from ..memory import saved
from ..memory.memory import EngramMemory
from ..system.files import check_folder
from ..train.adam import RowAdam
from ..train.optimizer import RowOptimizer
from ..train.replicated import replica_group
from . import checkpoints
from .gates import GateCallback
from .optimizer import MemoryAdamW

_ROW_RATE_SCALE = 5.0  # the table's rate over the base rate (arXiv 2601.07372)


class MemoryCallback(TrainerCallback):
    """Writes and reads the memory's part of checkpoints: `memory/` in each folder checkpoint-N.

    The process that writes the rest of a checkpoint writes the part. It does so before the rest if
    it can, so that an older checkpoint is not rotated away before this one is complete.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read rows, moments and dense weights if training is resumed.

        Raises:
            ConfigError: They are missing, or the arguments or the optimiser are not those of
                `trainer_kwargs`.
            WriteFailed: There is too little disk for a checkpoint.
        """
        optimizer = _memory_optimizer(kwargs["optimizer"])
        if args.max_grad_norm:
            raise ConfigError(
                "expected the args that trainer_kwargs gives: its optimiser clips, by the norm of "
                "dense and row gradients together; found max_grad_norm = "
                f"{args.max_grad_norm} left to Trainer"
            )
        if state.global_step > 0:
            _resume(optimizer, args, state)
        if args.should_save and args.save_strategy != "no":
            needed = checkpoints.bytes_needed(optimizer.memory, optimizer.rows)
            check_folder(Path(args.output_dir) / checkpoints.FOLDER, needed, replace=True)
        optimizer.memory.drain_row_grads()
        optimizer.folder = os.path.abspath(args.output_dir)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the part of a checkpoint that Trainer is about to save.

        If Trainer decides later, `on_save` writes it.
        """
        optimizer = _memory_optimizer(kwargs["optimizer"])
        checkpoint = _checkpoint_of(args, state)
        if not (control.should_save and args.should_save) or _is_written(optimizer, checkpoint):
            return
        checkpoints.tidy(checkpoint.parent)
        _write(optimizer, checkpoints.place_beside(checkpoint), args)
        optimizer.beside = checkpoint
        # If an older run has left a checkpoint of this name, it gets another state id, and does not
        # count as whole from here on.
        optimizer.put_in_place()

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete a checkpoint that Trainer has saved."""
        optimizer = _memory_optimizer(kwargs["optimizer"])
        checkpoint = _checkpoint_of(args, state)
        optimizer.put_in_place()
        if args.should_save and not _is_written(optimizer, checkpoint):
            _write(optimizer, checkpoints.place_in(checkpoint), args)
        if optimizer.replicas is not None:
            dist.barrier(group=optimizer.replicas)  # no process reads it before it is complete

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With load_best_model_at_end: read the rows and dense weights of the best checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            optimizer = _memory_optimizer(kwargs["optimizer"])
            saved.restore(optimizer.memory, checkpoints.place_in(Path(state.best_model_checkpoint)))
            optimizer.set_state_id(None)


def trainer_kwargs(
    memory: EngramMemory,
    args: TrainingArguments,
    rows: RowOptimizer | None = None,
    *,
    log_gates: bool = False,
) -> dict[str, Any]:
    """What a Trainer needs to train `memory` with its model.

    Started by torchrun, every process trains a copy of the table (`replica_group`).

    Args:
        memory: The memory, attached to the model that is trained.
        args: As for any training. learning_rate, weight_decay, adam_* and the schedule mean what
            they always do. max_grad_norm is the norm of dense and row gradients together.
        rows: The row optimiser, whose lr the schedule scales. Default: RowAdam at
            5 * learning_rate, or none if `memory.rows_require_grad` is False.
        log_gates: Adds the mean gates and the shares of rows that have learned to Trainer's log
            (GateCallback).

    Returns:
        The keyword arguments `args`, `optimizer_cls_and_kwargs` and `callbacks` of Trainer. More
        callbacks: `trainer.add_callback`. `args` is a copy in which max_grad_norm is 0, because the
        optimiser clips. The grad_norm in Trainer's log is that of the dense gradients.

    Raises:
        ConfigError: The arguments ask for something unsupported: another optimiser, fp16, FSDP,
            DeepSpeed, or several devices in one process.
    """
    args, settings, callbacks = _parts(memory, args, rows, log_gates)
    return {
        "args": args,
        "optimizer_cls_and_kwargs": (lambda: MemoryAdamW, settings),
        "callbacks": callbacks,
    }


def trainer_optimizers(
    memory: EngramMemory,
    args: TrainingArguments,
    model: nn.Module,
    rows: RowOptimizer | None = None,
    *,
    log_gates: bool = False,
) -> dict[str, Any]:
    """`trainer_kwargs` for a trainer without optimizer_cls_and_kwargs, such as TRL's DPOTrainer.

    Args:
        memory: As in `trainer_kwargs`.
        args: As in `trainer_kwargs`. Trainer makes the scheduler from them.
        model: What is trained, on its device and with its adapters. The optimiser steps the
            parameters that require grad now.
        rows: As in `trainer_kwargs`.
        log_gates: As in `trainer_kwargs`.

    Returns:
        The keyword arguments `args`, `optimizers` = (an optimiser over `model`, None) and
        `callbacks`.

    Raises:
        ConfigError: As in `trainer_kwargs`; or `memory` is not attached to `model`.
    """
    args, settings, callbacks = _parts(memory, args, rows, log_gates)
    return {
        "args": args,
        "optimizers": (MemoryAdamW(model, **settings), None),
        "callbacks": callbacks,
    }


def _parts(
    memory: EngramMemory, args: TrainingArguments, rows: RowOptimizer | None, log_gates: bool
) -> tuple[TrainingArguments, dict[str, Any], list[TrainerCallback]]:
    """(args without clipping, arguments of MemoryAdamW but the model, callbacks)."""
    _check_args(args)
    if rows is None and memory.rows_require_grad is not False:
        rows = RowAdam(
            memory,
            _ROW_RATE_SCALE * args.learning_rate,
            (args.adam_beta1, args.adam_beta2),
            args.adam_epsilon,
        )
    if rows is not None and rows.memory is not memory:
        raise ConfigError("rows: expected a row optimiser of the memory, found another memory's")
    settings = {
        "memory": memory,
        "rows": rows,
        "clip": args.max_grad_norm or None,
        "replicas": replica_group(memory) if args.world_size > 1 else None,
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "fused": args.optim == "adamw_torch_fused",
    }
    args = copy.copy(args)
    args.max_grad_norm = 0.0
    callbacks: list[TrainerCallback] = [MemoryCallback()]
    if log_gates:
        callbacks.append(GateCallback(memory))
    return args, settings, callbacks


def _check_args(args: TrainingArguments) -> None:
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ConfigError(f"optim: expected adamw_torch or adamw_torch_fused, found {args.optim}")
    if args.fp16:
        raise ConfigError(
            "fp16: expected bf16 or float32; fp16 scales the loss, and with it the rows' gradients"
        )
    if args.fsdp or args.deepspeed:
        raise ConfigError(
            "expected DistributedDataParallel for several processes, found FSDP or DeepSpeed"
        )
    if args.n_gpu > 1:
        raise ConfigError(f"expected one device a process (torchrun), found {args.n_gpu}")


def _memory_optimizer(optimizer: Any) -> MemoryAdamW:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not isinstance(inner, MemoryAdamW):
        raise ConfigError(f"expected the optimiser of trainer_kwargs, found {type(inner).__name__}")
    return inner


def _checkpoint_of(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / _checkpoint_name(state)


def _checkpoint_name(state: Any) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _is_written(optimizer: MemoryAdamW, checkpoint: Path) -> bool:
    return checkpoints.state_id_of(checkpoints.place_in(checkpoint)) == optimizer.state_id


def _write(optimizer: MemoryAdamW, part: Path, args: Any) -> None:
    with_moments = not args.save_only_model
    checkpoints.write_part(part, optimizer.memory, optimizer.rows, optimizer.state_id, with_moments)


def _resume(optimizer: MemoryAdamW, args: Any, state: Any) -> None:
    """Read the memory's part of the checkpoint that the run resumes from.

    Trainer does not say which checkpoint that is, so it is found by its state id.
    """
    loaded = optimizer.loaded or {"state_id": "?", "folder": ""}
    folders = [
        Path(args.resume_from_checkpoint or ""),
        _checkpoint_of(args, state),
        Path(loaded["folder"]) / _checkpoint_name(state),
    ]
    part = checkpoints.find_part(loaded["state_id"], state.global_step, folders)
    checkpoints.read_part(part, optimizer.memory, optimizer.rows)
    optimizer.set_state_id(checkpoints.state_id_of(part))
    if optimizer.replicas is not None:
        dist.barrier(group=optimizer.replicas)  # all processes have read it before it moves
    if args.should_save and checkpoints.is_beside(part):
        checkpoints.move_in(part)
