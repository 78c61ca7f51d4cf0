"""Progress of arms that train side by side: bars in a terminal, a line now and then in a log;
curves afterwards."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ..lm.loop import StepReport

_LOG_SECONDS = 30.0


class ArmProgress:
    """Shows `step` reports of several arms; a context manager."""

    def __init__(self, console: Console, labels: Mapping[str, str]):
        self.console, self.labels = console, labels
        self._bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "loss {task.fields[loss]}  held-out {task.fields[heldout]}  {task.fields[speed]:>6} tokens/s"
            ),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._heldout: dict[str, str] = {}
        self._logged: dict[str, float] = {}

    def __enter__(self) -> ArmProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, name: str, told: StepReport) -> None:
        """Take one step's report of an arm."""
        if told.heldout is not None:
            self._heldout[name] = f"{told.heldout:.3f}"
        shown: dict[str, Any] = {
            "loss": f"{told.loss:.3f}",
            "heldout": self._heldout.get(name, "  -  "),
            "speed": f"{told.tokens_per_second:,.0f}",
        }
        label = self.labels[name]
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(label, total=told.steps, **shown)
        self._bars.update(self._tasks[name], completed=told.step, **shown)
        now = time.monotonic()
        if not self.console.is_terminal and (
            told.step == told.steps or now - self._logged.get(name, 0) > _LOG_SECONDS
        ):
            self._logged[name] = now
            self.console.print(
                f"{label:<20} step {told.step}/{told.steps}  loss {shown['loss']}  "
                f"held-out {shown['heldout']}  {shown['speed']} tokens/s"
            )


def curves(folder: Path) -> dict[str, Any]:
    """What the metrics of a run say about it, resumed parts included. folder: where `lm.loop.train`
    wrote.

    curve, heldout_curve: [tokens, nats a token] of steps and of held-out text. seconds: spent in
    steps, held-out losses and checkpoints left out. tokens_per_second: median of whole steps,
    optimiser included. max_expert_load: highest of the second half, over the mean load of an
    expert; None without experts.
    """
    with open(folder / "metrics.jsonl") as file:
        steps = [json.loads(line) for line in file]
    loads = [step["max_load"] for step in steps[len(steps) // 2 :] if step["max_load"] is not None]
    return {
        "curve": [[step["tokens"], step["loss"]] for step in steps],
        "heldout_curve": [
            [step["tokens"], step["heldout"]] for step in steps if step["heldout"] is not None
        ],
        "max_expert_load": max(loads, default=None),
        "seconds": sum(step["tokens"] / step["step"] / step["tokens_per_second"] for step in steps),
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
    }
