"""The training loop: runs stop by tokens, resume bit for bit, and leave a checkpoint when
interrupted.

A checkpoint is a folder `checkpoint-NNNNNNNN`, which is complete once it has that name. It holds
the dense weights, the table and its row moments as sealed tables, the dense optimiser, and the
position in the data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..data.packing import Batch, Batches
from ..errors import ConfigError, DigestMismatch
from ..eval.losses import heldout_parts, losses_of
from ..system.files import make_folder, write_errors, write_file
from ..system.lfs import refuse_pointer
from ..system.signals import stopping
from ..train import OptimizerPair, RowAdagrad, RowAdam, RowNesterov, RowOptimizer
from ..train.checkpoint import (
    checkpoints,
    load_optimizers,
    read_state,
    save_checkpoint,
    write_state,
)
from ..train.dtype import autocast
from .model import LM
from .optimizers import OPTIMIZERS, SCHEDULES

ROW_OPTIMIZERS: Mapping[str, type[RowOptimizer]] = {
    "adam": RowAdam,
    "adagrad": RowAdagrad,
    "nesterov": RowNesterov,
}
"""Optimisers of a table's rows, by name."""


class TrainingBatches(Protocol):
    """What a run trains on: `data.packing.Batches`, or what gives batches by step like them."""

    @property
    def tokens_per_step(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def __getitem__(self, step: int, /) -> Batch: ...


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
        tokens: Training tokens.
        lr: Learning rate of the dense parameters.
        row_rate_scale: Rows learn at lr * row_rate_scale, without decay.
        rows: Optimiser of the rows, one of ROW_OPTIMIZERS.
        weight_decay: Weight decay of the dense parameters.
        clip: Largest gradient norm.
        warmup: Share of the run.
        optimizer: Of the dense parameters: "adamw", or "muon" for their matrices and AdamW for the
            rest.
        schedule: Of both rates after the warm-up: "cosine" to a tenth, or "step", the paper's.
        dtype: "float32", or "bfloat16" (autocast).
        heldout_every: Steps between held-out losses; 0 = only at the end.
        checkpoint_every: Steps between checkpoints; 0 = only at the end.

    Raises:
        ConfigError: A number is out of range, or the dtype unknown.
    """

    tokens: int
    lr: float = 6e-3
    row_rate_scale: float = 5.0
    rows: str = "adam"
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.03
    optimizer: str = "adamw"
    schedule: str = "cosine"
    dtype: str = "float32"
    heldout_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                'expected tokens >= 1 and dtype "float32" or "bfloat16", '
                f"found {self.tokens}, {self.dtype!r}"
            )
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("rows", ROW_OPTIMIZERS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name}: expected one of {list(known)}, found {value!r}")
        for name in ("lr", "row_rate_scale", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}: expected a positive number, found {value}")
        for name in ("weight_decay", "heldout_every", "checkpoint_every"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"{name}: expected 0 or more, found {value}")


class Watch(NamedTuple):
    """What is measured while a model trains, beside the held-out loss.

    Attributes:
        every: Steps between two times; the last step is one, too.
        measure: The model, in eval mode -> JSON values.
    """

    every: int
    measure: Callable[[LM], Any]


@dataclass(frozen=True)
class StepReport:
    """The report of a step.

    Attributes:
        step: Number of the step, from 1.
        steps: Steps of the whole run.
        tokens: Trained on so far.
        loss: Mean nats a token of this step's batch.
        norm: Norm of the gradient, before clipping.
        tokens_per_second: Tokens per second of this step.
        heldout: Mean nats a token of held-out text, if it was measured after this step.
        max_load: Load of the busiest expert over the mean load; None without experts.
        watched: What a Watch has measured after this step, if it was due.
    """

    step: int
    steps: int
    tokens: int
    loss: float
    norm: float
    tokens_per_second: float
    heldout: float | None = None
    max_load: float | None = None
    watched: Any = None


class Run:
    """A model in training: what a checkpoint holds, and one step of it.

    Args:
        model: To train.
        batches: Batches of training text.
        config: Settings of the run.
        origin: JSON values that say where the initial weights come from (a seed, an arm). A
            checkpoint of another origin is refused.

    Attributes:
        step_index: Steps that are done.
        steps: Steps of the whole run.
    """

    def __init__(
        self,
        model: LM,
        batches: TrainingBatches,
        config: TrainConfig,
        origin: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.batches = batches
        self.config = config
        self.origin = dict(origin or {})
        self._data_digest = batches.digest
        rows = None
        if model.memory is not None:
            rows = ROW_OPTIMIZERS[config.rows](model.memory, lr=config.lr * config.row_rate_scale)
        dense = OPTIMIZERS[config.optimizer](model, config.lr, config.weight_decay)
        schedule = SCHEDULES[config.schedule](config.warmup)
        self.pair = OptimizerPair(dense, rows, schedule, config.clip)
        self.step_index = 0
        self.steps = math.ceil(config.tokens / batches.tokens_per_step)

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step_index >= self.steps

    def step(self) -> tuple[float, float]:
        """Trains on one batch. Returns its loss and the gradient norm."""
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
        """Writes a checkpoint below `folder`, which appears whole, then removes the older ones.

        Returns:
            The checkpoint.

        Raises:
            WriteFailed: The system refused. The older ones are still there.
        """
        return save_checkpoint(folder, self.step_index, self._write)

    def _write(self, partial: Path) -> None:
        table_id = write_state(partial, self.model.state_dict, self.pair)
        where = {"step": self.step_index, "table_id": table_id, **self._identity()}
        (partial / "run.json").write_text(json.dumps(where, indent=1))

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint as if the run had not stopped.

        Raises:
            ConfigError: The checkpoint is damaged, or another run's.
            DigestMismatch: Its table is another one's.
        """
        where = described(path)
        state = read_state(path)
        mismatches = [
            f"{key}: expected {mine}, found {where.get(key)}"
            for key, mine in self._identity().items()
            if where.get(key) != mine
        ]
        if mismatches:
            raise ConfigError(f"{path} belongs to another run: " + "; ".join(mismatches))
        if state.table_id != where["table_id"]:
            raise DigestMismatch(
                f"{path}: the dense weights belong to table {state.table_id}, "
                f"run.json to {where['table_id']}"
            )
        load_optimizers(path, state, self.pair)
        self.model.load_state_dict(state.tensors)
        self.step_index = where["step"]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this run: all but how often it is looked
        at."""
        memory = self.model.memory
        config = dataclasses.asdict(self.config)
        for name in ("heldout_every", "checkpoint_every"):
            del config[name]
        return {
            "steps": self.steps,
            "data": self._data_digest,
            "config": config,
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
    until: float | None = None,
    watch: Watch | None = None,
) -> None:
    """Trains until the run's tokens are used up, or a held-out loss is reached.

    Ctrl-C or SIGTERM finishes the step, writes a checkpoint, then raises; a second one stops at
    once.

    Args:
        run: What to train.
        folder: For metrics.jsonl and checkpoints.
        resume: True = continue from the newest checkpoint in `folder`, if there is one. False = a
            folder that holds one is an error.
        heldout: Held-out text.
        report: Takes the report of each step.
        until: Stops after the first step whose held-out loss is at most this; None = never.
        watch: What else to measure now and then. The step's line in metrics.jsonl has it.

    Raises:
        ConfigError: `folder` holds a checkpoint, and resume is False.
        WriteFailed: The system refuses to write.
        KeyboardInterrupt: The training was interrupted; `signals.Terminated` after SIGTERM.
    """
    folder = Path(folder)
    make_folder(folder)
    saved = checkpoints(folder)
    if saved and not resume:
        raise ConfigError(
            f"{folder} holds {saved[-1].name}: resume that run, or choose another folder"
        )
    if saved:
        run.resume(saved[-1])
    metrics = folder / "metrics.jsonl"
    _cut(metrics, run.step_index)
    reached = until is not None and _least_heldout(metrics) <= until
    with write_errors(metrics):
        file = metrics.open("ab", buffering=0)  # unbuffered: no later flush can fail
    with file, stopping() as stop:
        while not (run.done or stop or reached):
            step = _step(run, heldout, watch)
            values = {**dataclasses.asdict(step), "time": time.time()}
            line = (json.dumps(values) + "\n").encode()
            with write_errors(metrics, "the checkpoints are whole"):
                while line:
                    line = line[file.write(line) :]
            report(step)
            reached = until is not None and step.heldout is not None and step.heldout <= until
            every = run.config.checkpoint_every
            if every and run.step_index % every == 0 and not run.done:
                run.save(folder)
        run.save(folder)
        if stop and not (run.done or reached):
            raise stop.error(
                f"stopped at step {run.step_index} of {run.steps}; the checkpoint is in {folder}"
            )


def _step(run: Run, heldout: Batches | None, watch: Watch | None) -> StepReport:
    """One step, and the held-out loss and what is watched if they are due."""
    began = time.perf_counter()
    loss, norm = run.step()
    speed = run.batches.tokens_per_step / (time.perf_counter() - began)
    every = run.config.heldout_every
    due = run.done or (every and run.step_index % every == 0)
    measured = None
    if heldout is not None and due:
        measured = heldout_loss(run.model, heldout, run.config.dtype)
    watched = None
    if watch is not None and (run.done or run.step_index % watch.every == 0):
        watched = watch.measure(run.model.eval())
    return StepReport(
        run.step_index,
        run.steps,
        run.step_index * run.batches.tokens_per_step,
        loss,
        norm,
        speed,
        measured,
        run.model.max_load(),
        watched,
    )


def heldout_loss(model: LM, batches: Batches, dtype: str = "float32") -> float:
    """Mean nats a token over all of `batches`. Leaves the model in eval mode."""
    total = 0.0
    count = 0
    for part in heldout_parts(losses_of(model, dtype), batches):
        total += float(part.losses_M.sum())
        count += len(part.losses_M)
    return total / count


def described(checkpoint: Path) -> dict[str, Any]:
    """What run.json says about a checkpoint's run. Raises ConfigError if there is no checkpoint, or
    its run.json is damaged."""
    try:
        where = json.loads((checkpoint / "run.json").read_text())
        if not isinstance(where["config"]["dtype"], str):
            raise TypeError(f"a dtype of {where['config']['dtype']!r}")
        return where
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse_pointer(checkpoint / "run.json", ConfigError)
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{checkpoint}: expected a checkpoint, found {found}") from None


def _least_heldout(metrics: Path) -> float:
    """The lowest held-out loss of the steps so far."""
    steps = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else ()
    losses = [step["heldout"] for step in steps if step["heldout"] is not None]
    return min(losses, default=math.inf)


def _cut(metrics: Path, step: int) -> None:
    """Drops the lines after `step`, and one that a crash cut short: a resumed run writes them
    again."""
    if metrics.exists():
        whole = metrics.read_text().split("\n")[:-1]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        write_file(metrics, "".join(line + "\n" for line in kept))
