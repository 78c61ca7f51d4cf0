"""An attached memory under transformers' Trainer: an optimiser that steps the rows too, and its
part of a checkpoint.

    args = TrainingArguments("runs/a", learning_rate=2e-4, max_grad_norm=1.0, bf16=True)
    trainer = Trainer(model=model, train_dataset=data, **trainer_kwargs(memory, args))

Trainer knows parameters only. The rows join it in two places: `MemoryAdamW` takes their gradients
into the norm and the step, and `MemoryCallback` puts `memory/` into each checkpoint folder: what
`memory.save` writes, and the moments. Such a folder and the optimiser's own state in optimizer.pt
name the same state id, drawn anew after every step, so that a checkpoint in which they do not
belong together is refused, whatever cut its writing short.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from ..memory import saved
from ..memory.memory import EngramMemory
from ..system.files import check_folder, publish_folder, put_folder
from ..train import (
    RowAdam,
    RowOptimizer,
    clip_together,
    drain_mean,
    replica_group,
    weight_decay_groups,
)
from .backbone import unwrapped
from .gates import GateCallback

_FOLDER = "memory"  # not "engraphy": that is where the model itself puts it that was loaded with its memory as one
_BESIDE = ".memory-of-"  # and the checkpoint's name: where it waits until Trainer has made the checkpoint's folder
_ROW_RATE_SCALE = (
    5.0  # the paper's (arXiv 2601.07372): the table learns at five times the base rate
)


class MemoryAdamW(torch.optim.AdamW):
    """AdamW for the parameters of a model, and a row optimiser for its memory's table, as one torch
    optimiser.

    The last parameter group is empty: its learning rate is the rows', so a scheduler drives both.
    Matrices decay; norms, convs, biases and rows do not. rows: None = the table stays as it is.
    clip: largest allowed norm of dense and row gradients together, None = any. replicas: as in
    OptimizerPair. adamw: lr, betas, eps, fused. Raises ConfigError where `memory` is not attached
    to `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: EngramMemory,
        rows: RowOptimizer | None,
        clip: float | None,
        replicas: dist.ProcessGroup | None,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        found = getattr(unwrapped(model), "engraphy", None)
        if found is not memory:
            raise ConfigError(
                f"{type(model).__name__}: expected the memory attached to it, found "
                f"{'no memory' if found is None else f'another {type(found).__name__}'} (a memory is not "
                "one of PEFT's modules_to_save)"
            )
        self.memory, self.rows, self.clip, self.replicas = memory, rows, clip, replicas
        self.folder = ""  # where the run keeps its checkpoints; only a hint to find them again
        self.loaded: dict[str, str] | None = (
            None  # state_id and folder of a loaded state, until the next step
        )
        self.beside: Path | None = None  # the checkpoint whose part of the memory waits beside it
        self._state_id: str | None = None
        groups = weight_decay_groups(model, weight_decay)
        if rows is not None:
            groups.append({"params": [], "lr": rows.lr, "weight_decay": 0.0})
        super().__init__(groups, **adamw)

    @property
    def state_id(self) -> str:
        """Name of the rows and moments as they are: random, a new one after each change."""
        if self._state_id is None:
            self._state_id = secrets.token_hex(16)
        return self._state_id

    def set_state_id(self, state_id: str | None) -> None:
        """The rows are others now: those of a checkpoint by its id, or None for rows that have no
        name yet."""
        self._state_id = state_id

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of parameters and rows from the gradients since the last; row gradients are
        gone afterwards.

        Raises ConfigError for a closure, and after `load_state_dict` until the rows of that state
        are there; InputError where a gradient is not finite: nothing is updated then.
        """
        if closure is not None:
            raise ConfigError("MemoryAdamW.step: expected no closure")
        if self.loaded is not None and self.loaded["state_id"] != self.state_id:
            raise ConfigError(
                f"the optimiser's state was loaded, the rows that belong to it (state "
                f"{self.loaded['state_id']}) were not: give the Trainer all of trainer_kwargs"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        summed = {} if self.rows is None else drain_mean(self.memory, self.replicas)
        _, summed = clip_together(parameters, summed, self.clip)
        super().step()
        if self.rows is not None:
            self.rows.lr = self.param_groups[-1]["lr"]
            self.rows.step(summed)
        self.loaded = None
        self.set_state_id(None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of parameters and rows."""
        super().zero_grad(set_to_none)
        self.memory.drain_row_grads()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the state id of rows and moments, which lie in the checkpoint folder.

        Trainer saves it into a checkpoint's folder, and then may upload that: the memory joins it
        now.
        """
        self.put_in_place()
        return {
            **super().state_dict(),
            "engraphy": {"state_id": self.state_id, "folder": self.folder},
        }

    def put_in_place(self) -> None:
        """Move what waits beside a checkpoint into it, if its folder is there. Raises WriteFailed."""
        if self.beside is not None and self.beside.is_dir():
            put_folder(_place_beside(self.beside), self.beside / _FOLDER)
            self.beside = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`, save for rows and moments: the callback reads those.

        Raises ConfigError for the state of another optimiser.
        """
        if "engraphy" not in state_dict:
            raise ConfigError(
                "expected an optimiser state of a run with this memory, found one without"
            )
        super().load_state_dict(state_dict)
        self.loaded = dict(state_dict["engraphy"])


class MemoryCallback(TrainerCallback):
    """Writes and reads the memory's part of checkpoints: `memory/` in each folder checkpoint-N.

    It is written whole by the process that writes the rest of the checkpoint, and where possible
    before the rest, so that an older checkpoint is not rotated away before this one is complete.
    Until Trainer has made checkpoint-N it waits beside it: a folder of that name would count as the
    last checkpoint, even after a crash. A crash between the two leaves it there, where it is found
    again.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads rows, moments and dense weights where training is resumed. Raises ConfigError where
        they are missing, and for arguments and optimisers other than those of `trainer_kwargs`."""
        optimizer = _memory_optimizer(kwargs["optimizer"])
        if args.max_grad_norm:
            raise ConfigError(
                "expected the args that trainer_kwargs gives: its optimiser clips, by the norm of dense "
                f"and row gradients together; found max_grad_norm = {args.max_grad_norm} left to Trainer"
            )
        if state.global_step > 0:
            _resume(optimizer, _find_part(args, state, optimizer), args.should_save)
        if args.should_save and args.save_strategy != "no":
            check_folder(Path(args.output_dir) / _FOLDER, _needed(optimizer), replace=True)
        optimizer.memory.drain_row_grads()
        optimizer.folder = os.path.abspath(args.output_dir)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes early what is about to be saved; what is decided on later is written by `on_save`."""
        optimizer = _memory_optimizer(kwargs["optimizer"])
        folder = _checkpoint_of(args, state)
        if (
            control.should_save
            and args.should_save
            and _state_id_of(folder / _FOLDER) != optimizer.state_id
        ):
            _tidy(folder.parent)
            _write(optimizer, _place_beside(folder), with_moments=not args.save_only_model)
            optimizer.beside = folder
            optimizer.put_in_place()  # into an older run's checkpoint, which is thereby no longer taken for whole

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = _memory_optimizer(kwargs["optimizer"])
        folder = _checkpoint_of(args, state)
        optimizer.put_in_place()
        if args.should_save and _state_id_of(folder / _FOLDER) != optimizer.state_id:
            _write(optimizer, folder / _FOLDER, with_moments=not args.save_only_model)
        if optimizer.replicas is not None:
            dist.barrier(group=optimizer.replicas)  # nobody reads what is not there yet

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With load_best_model_at_end: the rows and dense weights of the best checkpoint, as
        Trainer loads the model's."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            optimizer = _memory_optimizer(kwargs["optimizer"])
            saved.restore(optimizer.memory, Path(state.best_model_checkpoint) / _FOLDER)
            optimizer.set_state_id(None)


def trainer_kwargs(
    memory: EngramMemory,
    args: TrainingArguments,
    rows: RowOptimizer | None = None,
    *,
    log_gates: bool = False,
) -> dict[str, Any]:
    """What a Trainer needs to train `memory` with its model: the keyword arguments `args`,
    `optimizer_cls_and_kwargs` and `callbacks` (more of the latter: `trainer.add_callback`).

    args: as for any training; learning_rate, weight_decay, adam_*, max_grad_norm and the schedule
    mean what they always do, max_grad_norm the norm of dense and row gradients together. What is
    returned is a copy of them in which max_grad_norm is 0, since the optimiser clips; the grad_norm
    in Trainer's log is that of the dense gradients. rows: the row optimiser, whose lr the schedule
    scales; default: RowAdam at 5 * learning_rate, or none where `memory.rows_require_grad` is
    False. Started by torchrun, every process trains a copy of the table (replica_group). log_gates:
    add the mean gates and the shares of rows that have learned to Trainer's log (GateCallback).
    Raises ConfigError for what cannot be: another optimiser, fp16, FSDP, DeepSpeed, several devices
    in one process.
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
    """`trainer_kwargs` for a trainer that takes no optimizer_cls_and_kwargs, such as TRL's
    DPOTrainer: the keyword arguments `args`, `optimizers` = (an optimiser over `model`, None) and
    `callbacks`. Trainer makes the scheduler from `args`.

    model: what is trained, on its device and with its adapters: the optimiser steps the parameters
    that require grad now. Raises as `trainer_kwargs`, and ConfigError where `memory` is not
    attached to `model`.
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
    """(args without clipping, what MemoryAdamW takes beside the model, callbacks)."""
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
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _place_beside(folder: Path) -> Path:
    return folder.parent / f"{_BESIDE}{folder.name}"


def _find_part(args: Any, state: Any, optimizer: MemoryAdamW) -> Path:
    """The memory's part of the checkpoint that the run resumes from, which Trainer does not tell:
    known by its state id."""
    name, loaded = (
        f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
        optimizer.loaded or {"state_id": "?", "folder": ""},
    )
    places = [
        Path(args.resume_from_checkpoint or ""),
        Path(args.output_dir) / name,
        Path(loaded["folder"]) / name,
    ]
    for place in places:
        for part in (place / _FOLDER, _place_beside(place)):
            if _state_id_of(part) == loaded["state_id"]:
                return part
    raise ConfigError(
        f"expected a checkpoint of step {state.global_step} whose rows have state {loaded['state_id']}, "
        f"found none in {list(map(str, places))}: its {_FOLDER}/ was not written to the end, its "
        "optimizer.pt is missing (save_only_model), or it has moved: then name it in TrainingArguments("
        "resume_from_checkpoint=)"
    )


def _resume(optimizer: MemoryAdamW, part: Path, main: bool) -> None:
    table_id = saved.restore(optimizer.memory, part)
    if optimizer.rows is not None:
        optimizer.rows.load(part / "moments", table_id)
    optimizer.set_state_id(_state_id_of(part))
    if optimizer.replicas is not None:
        dist.barrier(group=optimizer.replicas)  # all have read it before it moves
    if main and part.name.startswith(_BESIDE):
        put_folder(part, part.with_name(part.name.removeprefix(_BESIDE)) / _FOLDER)


def _tidy(output: Path) -> None:
    """What crashes have left beside checkpoints: their part of the memory if they lack it, else
    nothing."""
    for part in output.glob(f"{_BESIDE}*"):
        folder = part.with_name(part.name.removeprefix(_BESIDE))
        if folder.is_dir() and not (folder / _FOLDER).exists():
            put_folder(part, folder / _FOLDER)
        else:
            shutil.rmtree(part)


def _table_choice(optimizer: MemoryAdamW) -> str:
    """A sealed table that nothing changes need not be copied."""
    info = next(iter(optimizer.memory.stores.values())).info
    sealed = optimizer.rows is None and info.table_id is not None and not info.writable
    return "link" if sealed else "copy"


def _needed(optimizer: MemoryAdamW) -> int:
    """Bytes of the memory's part of a checkpoint."""
    moments = 0 if optimizer.rows is None else optimizer.rows.moment_bytes
    return moments + saved.bytes_of(optimizer.memory, _table_choice(optimizer))


def _write(optimizer: MemoryAdamW, part: Path, with_moments: bool) -> None:
    choice = _table_choice(optimizer)
    saved.check_choice(optimizer.memory, choice)
    with publish_folder(part, replace=True, last="state.json") as partial:
        table_id = saved.write(optimizer.memory, partial, choice)
        if optimizer.rows is not None and with_moments:
            optimizer.rows.save(partial / "moments", table_id)
        (partial / "state.json").write_text(json.dumps({"state_id": optimizer.state_id}))


def _state_id_of(part: Path) -> str | None:
    try:
        return json.loads((part / "state.json").read_text())["state_id"]
    except (OSError, ValueError, KeyError):
        return None
