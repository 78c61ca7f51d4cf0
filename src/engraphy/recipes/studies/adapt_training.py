"""The training of one run of the adaptation study, which goes on where it was stopped."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.packing import Batches
from ...errors import ConfigError
from ...lm.cross_entropy import mean_cross_entropy
from ...system.signals import stopping
from ...train.checkpoint import (
    checkpoints,
    load_optimizers,
    read_state,
    save_checkpoint,
    write_state,
)
from .adapt_arms import Adapted
from .adapt_run import BATCH, CONTEXT, Job, Texts, hidden
from .queue import Result

SAVED = 200
"""Steps between checkpoints."""


def train(adapted: Adapted, texts: Texts, job: Job, folder: Path) -> Result:
    """Trains on `job.tokens` tokens of the domain, shuffled by the seed. Stops at the first step
    whose loss is not finite.

    Args:
        adapted: The model; it is changed in place.
        texts: What it reads.
        job: The run.
        folder: For checkpoints, one of which is continued.

    Returns:
        sizes (with the table values that were updated), epochs, steps, step_tokens,
        training_curve (mean loss of each tenth), minutes of processor time; and diverged_at, the
        step whose loss was not finite, if there was one.

    Raises:
        ConfigError: The checkpoint is damaged, or another run's.
        KeyboardInterrupt: The run was interrupted; `signals.Terminated` after SIGTERM. It has left
            a checkpoint.
    """
    training = _Training(adapted, texts, job)
    saved = checkpoints(folder)
    if saved:
        training.resume(saved[-1])
    adapted.model.train()
    with stopping() as stop:
        while training.step():
            done = len(training.losses)
            if stop or done % SAVED == 0:
                training.save(folder)
            if stop:
                raise stop.error(f"stopped at step {done} of {training.steps}, saved in {folder}")
    return training.result()


class _Training:
    """A run: what a checkpoint holds, and one step of it."""

    def __init__(self, adapted: Adapted, texts: Texts, job: Job):
        self.adapted = adapted
        self.job = job
        self.batches = Batches(
            texts.training, texts.end_id, batch=BATCH, tokens=CONTEXT, seed=job.seed
        )
        self.steps = job.tokens // self.batches.tokens_per_step
        self.pair = adapted.optimizers(job.lr)
        self.losses: list[float] = []  # of the steps that are done
        stores = {} if adapted.memory is None else adapted.memory.stores
        # The rows that were updated, bool [rows] of each layer.
        self.used = {layer: np.zeros(store.info.rows, bool) for layer, store in stores.items()}
        self.diverged = False
        self._before = 0.0  # seconds of processor time up to the checkpoint
        self._began = time.process_time()

    @property
    def seconds(self) -> float:
        """Processor time so far."""
        return self._before + time.process_time() - self._began

    def step(self) -> bool:
        """Trains on one batch. Returns False if there is none left, or the loss is not finite."""
        done = len(self.losses)
        if done == self.steps or self.diverged:
            return False
        ids_BT, targets_BT, starts_BT = self.batches[done]
        x_BTD, head = hidden(self.adapted.model, ids_BT, starts_BT)
        loss = mean_cross_entropy(x_BTD.flatten(0, 1), head, targets_BT.flatten())
        if not torch.isfinite(loss):
            self.diverged = True
            return False
        loss.backward()
        if self.adapted.memory is not None:
            for part in self.adapted.memory.row_grads:
                self.used[part.layer][part.ids] = True
        self.pair.step(done / self.steps)
        self.losses.append(float(loss.detach()))
        return True

    def save(self, folder: Path) -> None:
        """Writes a checkpoint. Raises WriteFailed."""
        save_checkpoint(folder, len(self.losses), self._write)

    def _write(self, partial: Path) -> None:
        write_state(partial, self._trained, self.pair)
        for layer, rows in self.used.items():
            np.save(partial / f"used-{layer}.npy", rows)
        where = {**self._identity(), "losses": self.losses, "seconds": self.seconds}
        (partial / "run.json").write_text(json.dumps(where))

    def resume(self, checkpoint: Path) -> None:
        """Continues from a checkpoint. Raises ConfigError: it is damaged, or another run's."""
        try:
            where = json.loads((checkpoint / "run.json").read_text())
            for layer, rows in self.used.items():
                rows[:] = np.load(checkpoint / f"used-{layer}.npy")
            self.losses, self._before = where["losses"], where["seconds"]
            found = {name: where[name] for name in self._identity()}
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{checkpoint}: expected a checkpoint, found {cause}") from None
        if found != self._identity():
            raise ConfigError(
                f"{checkpoint}: expected a checkpoint of {self._identity()}, found one of {found}"
            )
        state = read_state(checkpoint)
        load_optimizers(checkpoint, state, self.pair)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state.tensors[name])

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this run."""
        return {"job": self.job.fields, "data": self.batches.digest}

    def _trained(self) -> dict[str, Tensor]:
        """The parameters that learn; all others are as the model has them."""
        named = self.adapted.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def result(self) -> Result:
        """What `train` returns."""
        memory, sizes = self.adapted.memory, self.adapted.sizes
        tenth = max(1, self.steps // 10)
        firsts = range(0, len(self.losses), tenth)
        parts = [self.losses[first : first + tenth] for first in firsts]
        values = 0 if memory is None else memory.config.dim * self._rows_used()
        result: Result = {
            "sizes": {
                **asdict(sizes),
                "bytes": sizes.bytes,
                "table_updated": values,
            },
            "epochs": round(self.steps / len(self.batches), 3),
            "steps": self.steps,
            "step_tokens": self.batches.tokens_per_step,
            "training_curve": [round(float(np.mean(part)), 4) for part in parts],
            "minutes": round(self.seconds / 60, 2),
        }
        if self.diverged:
            result["diverged_at"] = len(self.losses)
        return result

    def _rows_used(self) -> int:
        """Number of rows that were updated, of all layers."""
        return sum(int(rows.sum()) for rows in self.used.values())
