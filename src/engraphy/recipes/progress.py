"""Progress of arms that train side by side: bars in a terminal, lines in a log, and curves
afterwards."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from operator import truediv
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

_LOG_SECONDS = 30.0  # between two lines of an arm in a log
_COLUMNS = (
    "loss {task.fields[loss]}  held-out {task.fields[heldout]}  {task.fields[speed]:>6} tokens/s"
)


class ArmProgress:
    """Shows the steps of several arms: bars in a terminal, else a line now and then.

    Use it as a context manager.

    Args:
        console: Where to print.
        labels: The label that is shown for an arm, by the arm's name.
    """

    def __init__(self, console: Console, labels: Mapping[str, str]):
        self.console = console
        self.labels = labels
        self._bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(_COLUMNS),
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

    def step(self, name: str, report: StepReport) -> None:
        """Shows one step of an arm.

        Args:
            name: Name of the arm, a key of `labels`.
            report: What the step reported.
        """
        if report.heldout is not None:
            self._heldout[name] = f"{report.heldout:.3f}"
        shown: dict[str, Any] = {
            "loss": f"{report.loss:.3f}",
            "heldout": self._heldout.get(name, "  -  "),
            "speed": f"{report.tokens_per_second:,.0f}",
        }
        label = self.labels[name]
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(label, total=report.steps, **shown)
        self._bars.update(self._tasks[name], completed=report.step, **shown)
        if not self.console.is_terminal and self._line_is_due(name, report):
            self.console.print(
                f"{label:<20} step {report.step}/{report.steps}  loss {shown['loss']}  "
                f"held-out {shown['heldout']}  {shown['speed']} tokens/s"
            )

    def _line_is_due(self, name: str, report: StepReport) -> bool:
        """True after the last step, or if the arm's last line is more than _LOG_SECONDS old."""
        now = time.monotonic()
        due = report.step == report.steps or now - self._logged.get(name, 0) > _LOG_SECONDS
        if due:
            self._logged[name] = now
        return due


def curves(folder: Path) -> dict[str, Any]:
    """Reads what the metrics of a run say about it, resumed parts included.

    Args:
        folder: Where `lm.loop.train` wrote.

    Returns:
        A dict of JSON values:
        curve: [tokens, nats a token] of each step.
        heldout_curve: [tokens, nats a token] of held-out text.
        max_expert_load: Highest load of an expert over the mean load, in the second half of the
        run; None without experts.
        seconds: Time in steps, without held-out losses and checkpoints.
        tokens_per_second: Median of whole steps, optimiser included.
    """
    steps = _steps(folder)
    loads = [step["max_load"] for step in steps[len(steps) // 2 :] if step["max_load"] is not None]
    evaluated = [step for step in steps if step["heldout"] is not None]
    speeds = [step["tokens_per_second"] for step in steps]
    step_tokens = [step["tokens"] / step["step"] for step in steps]
    return {
        "curve": [[step["tokens"], step["loss"]] for step in steps],
        "heldout_curve": [[step["tokens"], step["heldout"]] for step in evaluated],
        "max_expert_load": max(loads, default=None),
        "seconds": sum(map(truediv, step_tokens, speeds)),
        "tokens_per_second": statistics.median(speeds),
    }


def watched(folder: Path) -> list[tuple[int, Any]]:
    """The steps of a run after which something was watched (`lm.loop.Watch`), and what was
    measured."""
    steps = _steps(folder)
    return [(step["step"], step["watched"]) for step in steps if step["watched"] is not None]


def _steps(folder: Path) -> list[dict[str, Any]]:
    with open(folder / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]
