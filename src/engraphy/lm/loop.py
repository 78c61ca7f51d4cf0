"""The training loop: runs stop by tokens, resume bit for bit, and leave a checkpoint when
interrupted.

A checkpoint is a folder `checkpoint-NNNNNNNN` that is complete when it has that name: dense
weights, the table and its row moments as sealed tables, the dense optimiser, and where in the data
the run was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.packing import Batches
from ..errors import ConfigError, DigestMismatch
from ..eval.losses import heldout_parts, losses_of
from ..system.files import make_folder, publish_folder, write_errors, write_file
from ..system.lfs import refuse_pointer
from ..system.signals import stopping
from ..train import OptimizerPair, RowAdam, warmup_cosine, weight_decay_groups
from ..train.dtype import autocast
from .model import LM


@dataclass(frozen=True)
class TrainConfig:
    """One run. tokens: where it stops. lr: of the dense parameters; rows learn at lr *
    row_rate_scale, without decay.

    clip: largest gradient norm. warmup: share of the run. dtype: "float32" or "bfloat16"
    (autocast). heldout_every, checkpoint_every: steps between held-out losses, and between
    checkpoints (0 = only at the end).
    """

    tokens: int
    lr: float = 6e-3
    row_rate_scale: float = 5.0
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.03
    dtype: str = "float32"
    heldout_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f'expected tokens >= 1 and dtype "float32" or "bfloat16", '
                f"found {self.tokens}, {self.dtype!r}"
            )
        for name in ("lr", "row_rate_scale", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(
                    f"{name}: expected a positive number, found {getattr(self, name)}"
                )
        for name in ("weight_decay", "heldout_every", "checkpoint_every"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}")


@dataclass(frozen=True)
class StepReport:
    """What is told after each step. loss: mean nats a token of this step's batch. heldout: where it
    was measured."""

    step: int
    steps: int
    tokens: int
    loss: float
    norm: float
    tokens_per_second: float
    heldout: float | None = None
    max_load: float | None = None


class Run:
    """A model in training: what a checkpoint holds, and one step of it.

    origin: JSON values that say where the initial weights came from (a seed, an arm): a checkpoint
    of another origin is refused.
    """

    def __init__(
        self,
        model: LM,
        batches: Batches,
        config: TrainConfig,
        origin: Mapping[str, Any] | None = None,
    ):
        self.model, self.batches, self.config, self.origin = (
            model,
            batches,
            config,
            dict(origin or {}),
        )
        self._data_digest = batches.digest
        rows = (
            None
            if model.memory is None
            else RowAdam(model.memory, lr=config.lr * config.row_rate_scale)
        )
        dense = torch.optim.AdamW(
            weight_decay_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.pair = OptimizerPair(dense, rows, warmup_cosine(config.warmup), config.clip)
        self.step_index = 0
        self.steps = math.ceil(config.tokens / batches.tokens_per_step)

    @property
    def done(self) -> bool:
        return self.step_index >= self.steps

    def step(self) -> tuple[float, float]:
        """One batch forward, backward, update. Returns (loss, gradient norm)."""
        self.model.train()
        ids_BT, targets_BT, starts_BT = self.batches[self.step_index]
        with autocast(self.config.dtype):
            loss = self.model.loss(ids_BT, targets_BT, starts_BT)
        loss.backward()
        self.step_index += 1
        norm = self.pair.step(self.step_index / self.steps)
        self.model.rebalance()
        return loss.item(), norm

    def save(self, folder: Path) -> Path:
        """Write a checkpoint below `folder`, on disk under its name as a whole, then drop the older
        ones.

        Raises WriteFailed if the system refuses: the older ones are there then.
        """
        final = folder / f"checkpoint-{self.step_index:08d}"
        if final.exists():
            return final
        older = checkpoints(folder)
        with publish_folder(final, last="run.json") as partial:
            self._write(partial)
        for path in older:
            shutil.rmtree(path)
        return final

    def _write(self, partial: Path) -> None:
        table_id = ""
        if self.model.memory is not None and self.pair.rows is not None:
            table_id = self.model.memory.write_table(partial / "table")
            self.pair.rows.save(partial / "moments", table_id)
        tensors = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(tensors, partial / "dense.safetensors", metadata={"table_id": table_id})
        with open(
            partial / "optimizer.pt", "wb"
        ) as file:  # of a path torch would not say what went wrong
            torch.save(self.pair.dense.state_dict(), file)
        where = {"step": self.step_index, "table_id": table_id, **self._identity()}
        (partial / "run.json").write_text(json.dumps(where, indent=1))

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint as if the run had not stopped.

        Raises ConfigError for a damaged checkpoint or another run's, DigestMismatch where its table
        is not its own.
        """
        where = described(path)
        try:
            optimizer = torch.load(path / "optimizer.pt", weights_only=True)
            with safe_open(path / "dense.safetensors", framework="pt") as file:
                table_id = (file.metadata() or {}).get("table_id")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (
            OSError,
            ValueError,
            SafetensorError,
            RuntimeError,
            pickle.UnpicklingError,
        ) as error:
            for name in ("run.json", "optimizer.pt", "dense.safetensors"):
                refuse_pointer(path / name, ConfigError)
            raise ConfigError(
                f"{path}: expected a checkpoint, found {type(error).__name__}: {error}"
            ) from None
        mine = self._identity()
        wrong = [
            f"{key}: expected {mine[key]}, found {where.get(key)}"
            for key in mine
            if where.get(key) != mine[key]
        ]
        if wrong:
            raise ConfigError(f"{path} belongs to another run: " + "; ".join(wrong))
        if table_id != where["table_id"]:
            raise DigestMismatch(
                f"{path}: the dense weights belong to table {table_id}, "
                f"run.json to {where['table_id']}"
            )
        if self.model.memory is not None and self.pair.rows is not None:
            self.model.memory.read_table(path / "table", table_id)
            self.pair.rows.load(path / "moments", where["table_id"])
        self.model.load_state_dict(tensors)
        self.pair.dense.load_state_dict(optimizer)
        self.step_index = where["step"]

    def _identity(self) -> dict[str, Any]:
        memory = self.model.memory
        return {
            "steps": self.steps,
            "data": self._data_digest,
            "config": dataclasses.asdict(self.config),
            "model": self.model.config.to_json(),
            "memory": None if memory is None else memory.address_digest,
            "origin": self.origin,
        }


def train(
    run: Run,
    folder: str | os.PathLike[str],
    resume: bool = False,
    heldout: Batches | None = None,
    report: Callable[[StepReport], None] = lambda _: None,
) -> None:
    """Train until the run's tokens are used up; metrics.jsonl and checkpoints go to `folder`.

    resume: continue from the newest checkpoint there, if any; without it a folder that holds one is
    an error. Ctrl-C or SIGTERM finishes the step, writes a checkpoint and then raises
    KeyboardInterrupt (`signals.Terminated` for SIGTERM); a second one stops at once. Raises
    WriteFailed if the system refuses to write.
    """
    folder = Path(folder)
    make_folder(folder)
    found = checkpoints(folder)
    if found and not resume:
        raise ConfigError(
            f"{folder} holds {found[-1].name}: resume that run, or choose another folder"
        )
    if found:
        run.resume(found[-1])
    metrics = folder / "metrics.jsonl"
    _cut(metrics, run.step_index)
    with write_errors(metrics):
        file = metrics.open("ab", buffering=0)  # nothing waits for a flush that may fail
    with file, stopping() as stop:
        while not (run.done or stop):
            began = time.perf_counter()
            loss, norm = run.step()
            speed = run.batches.tokens_per_step / (time.perf_counter() - began)
            every = run.config.heldout_every
            measure = heldout is not None and (run.done or (every and run.step_index % every == 0))
            found_loss = (
                heldout_loss(run.model, heldout, run.config.dtype) if measure and heldout else None
            )
            told = StepReport(
                run.step_index,
                run.steps,
                run.step_index * run.batches.tokens_per_step,
                loss,
                norm,
                speed,
                found_loss,
                run.model.max_load(),
            )
            line = (json.dumps({**dataclasses.asdict(told), "time": time.time()}) + "\n").encode()
            with write_errors(metrics, "the checkpoints are whole"):
                while line:
                    line = line[file.write(line) :]
            report(told)
            every = run.config.checkpoint_every
            if every and run.step_index % every == 0 and not run.done:
                run.save(folder)
        run.save(folder)
        if stop and not run.done:
            raise stop.error(
                f"stopped at step {run.step_index} of {run.steps}; the checkpoint is in {folder}"
            )


def heldout_loss(model: LM, batches: Batches, dtype: str = "float32") -> float:
    """Mean nats a token over all of `batches`. Leaves the model in eval mode."""
    total, count = 0.0, 0
    for part in heldout_parts(losses_of(model, dtype), batches):
        total += float(part.losses_M.sum())
        count += len(part.losses_M)
    return total / count


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-????????"))


def described(checkpoint: Path) -> dict[str, Any]:
    """What run.json says of a checkpoint's run. Raises ConfigError if it describes none."""
    try:
        where = json.loads((checkpoint / "run.json").read_text())
        if not isinstance(where["config"]["dtype"], str):
            raise TypeError(f"a dtype of {where['config']['dtype']!r}")
        return where
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{checkpoint}: expected a checkpoint, found {found}") from None


def _cut(metrics: Path, step: int) -> None:
    """Drop lines after `step`, and one that a crash cut short: a resumed run writes them again."""
    if metrics.exists():
        whole = metrics.read_text().split("\n")[:-1]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        write_file(metrics, "".join(line + "\n" for line in kept))
