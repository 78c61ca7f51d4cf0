"""Tasks of lm-evaluation-harness (the PyPI package lm-eval), with one number an item where there is
one.

This is the only module that imports the harness, and only when it is called. It loads tasks before
a model is loaded, so that a task whose data is not here is said at once. It runs no code that a
model wrote: HumanEval has a module of its own.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataUnavailable

PAPER: Mapping[str, str] = {
    "MMLU": "mmlu",
    "CMMLU": "cmmlu",
    "C-Eval": "ceval-valid",
    "BBH": "bbh",
    "ARC-C": "arc_challenge",
    "HumanEval": "humaneval",
    "MATH": "minerva_math",
    "GSM8K": "gsm8k",
}
"""Benchmarks of the paper's table, and the harness's names of them."""
HUMANEVAL = PAPER["HumanEval"]
"""Not run by the harness."""
_INSTALL = 'pip install "engraphy[eval]"'
_BOOTSTRAP = 1000  # samples for the error of a metric that is no mean


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: Its name, or that of a group of tasks.
        metric: Such as acc.
        filter: How the answer was read out of the text; "none" where there is one way.
        items: Number of items.
        shots: Examples before each; None for a group.
        value: The metric.
        error: Its standard error, if there is one.
        each: The metric of each item, in order; None where an item has no number of its own.
    """

    task: str
    metric: str
    filter: str
    items: int
    shots: int | None
    value: float
    error: float | None
    each: tuple[float, ...] | None


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks.

    Attributes:
        names: As asked for, folders replaced by the tasks in them.
        manager: The harness's manager of tasks.
        place: The folder that file names in the tasks are relative to.
    """

    names: tuple[str, ...]
    manager: Any
    place: Path


def load(names: Sequence[str], include: str | os.PathLike[str] | None = None) -> Tasks:
    """Loads tasks with their data.

    Args:
        names: Names of tasks, groups or tags of the harness or of `include`; or one folder of task
            files, which stands for all tasks in it.
        include: A folder of task files. File names in them are relative to that folder.

    Raises:
        DataUnavailable: The harness, or the data of a task, is not here. The message names every
            missing data set.
        ConfigError: There is no such task, or a task would run code.
    """
    new_manager = _module("lm_eval.tasks").TaskManager
    folder = None
    # A folder that merely shares the name of a task, beside --include or other names, is none.
    if len(names) == 1 and include is None and Path(names[0]).is_dir():
        folder = Path(names[0])
    place = Path(folder or include or ".").resolve()
    manager = None
    if folder is not None or include is not None:
        if not place.is_dir():
            raise ConfigError(f"{place}: expected a folder of task files, found none")
        manager = new_manager(include_path=str(place), include_defaults=False)
        if folder is not None:
            names = manager.all_subtasks
        if not names:
            raise ConfigError(f"{place}: expected task files (*.yaml), found none")
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = new_manager(include_path=None if manager is None else str(place))
    _check_names(names, manager.all_tasks)
    with contextlib.chdir(place):
        _check_data(names, manager)
    return Tasks(tuple(names), manager, place)


def run(
    tasks: Tasks,
    model: Any,
    tokenizer: Any,
    batch: int = 8,
    limit: int | None = None,
    shots: int | None = None,
) -> list[Score]:
    """Evaluates a model on tasks.

    Args:
        tasks: What `load` returned.
        model: A causal language model of transformers, with or without a memory.
        tokenizer: Its tokenizer.
        batch: Texts at a time.
        limit: The first items of each task only.
        shots: Examples before each item; None = as the task says.

    Returns:
        The metrics of each task, then of each group of tasks.
    """
    judged = _module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch
    )
    with contextlib.chdir(tasks.place):
        results = _module("lm_eval").simple_evaluate(
            model=judged,
            tasks=list(tasks.names),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP,
            task_manager=tasks.manager,
        )
    return list(_scores(results))


def _module(name: str) -> Any:
    """A module of the harness, or of what it needs. Raises DataUnavailable if it is not
    installed."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise DataUnavailable(
            f"tasks: expected the package lm-eval, found {error}; {_INSTALL}"
        ) from None
    # It warns of what is meant here: a model that is loaded already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return module


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ConfigError(
                f"tasks: expected tasks of the harness, or one folder alone, found {name!r}{hint}"
            )


def _check_data(names: Sequence[str], manager: Any) -> None:
    """Loads every task once; the data stays in the cache of the package datasets."""
    missing: dict[str, str] = {}
    here = []
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                loaded = manager.load([name])["tasks"]
            except ImportError as error:
                missing[name] = f"{' '.join(str(error).split())}; {_how(manager, name)}"
            except (OSError, ValueError, RuntimeError) as error:
                missing[name] = f"{_reason(error)}; {_how(manager, name)}"
                # The hub is asked for seconds, five times; of one that is away once is enough.
                if isinstance(error, ConnectionError):
                    stack.enter_context(_offline())
            else:
                here.append(name)
                _refuse_code(loaded)
    if missing:
        lines = [f"{name}: {why}" for name, why in missing.items()]
        found = f"; the data of these is here: {','.join(here)}" if here else ""
        raise DataUnavailable(
            f"tasks: expected the data of {', '.join(names)}, found {len(missing)} without"
            f"{found}\n" + "\n".join(lines)
        )


def _refuse_code(loaded: Mapping[str, Any]) -> None:
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"tasks: expected tasks that run no code, found {name}; "
                f"{HUMANEVAL} is run in a sandbox, the others are not run here"
            )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _how(manager: Any, name: str) -> str:
    """How to get the data of a task."""
    path, part = _dataset(manager, name)
    if path is None:
        return "see the task's file for its data"
    if path == "json":
        return "file names are relative to the folder of the tasks"
    arguments = ", ".join(repr(value) for value in (path, part) if value)
    return (
        f'with a network, once: python -c "import datasets; datasets.load_dataset({arguments})"; '
        "then copy ~/.cache/huggingface (HF_HOME) here"
    )


def _dataset(manager: Any, name: str) -> tuple[str | None, str | None]:
    """Path and name of the data set of a task, or of the first task of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return None, None
    config = entry.cfg or {}
    if config.get("dataset_path"):
        return config["dataset_path"], config.get("dataset_name")
    children = config.get("task")
    if not isinstance(children, list):
        children = sorted(entry.tags)  # of a tag: its tasks
    names = [child for child in children if isinstance(child, str) and child != name]
    return _dataset(manager, names[0]) if names else (None, None)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Has the package datasets ask the hub for nothing."""
    config = _module("datasets.config")
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    """The metrics of each task, then of each group."""
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, way = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{way}")
            each = _each(results["samples"].get(name), metric, way)
            yield Score(
                name,
                metric,
                way,
                _items(results, name, each),
                results["n-shot"].get(name),
                float(value),
                float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                each,
            )


def _items(results: Mapping[str, Any], name: str, each: Sequence[float] | None) -> int:
    if each is not None:
        return len(each)
    counts = results["n-samples"]
    if name in counts:
        return int(counts[name]["effective"])
    return int(results["results"].get(name, {}).get("sample_len", 0))


def _each(
    samples: Sequence[Mapping[str, Any]] | None, metric: str, way: str
) -> tuple[float, ...] | None:
    """The metric of each item; None if there are none or they are no numbers."""
    values: list[Any] = [sample.get(metric) for sample in samples or () if sample["filter"] == way]
    if not values or not all(isinstance(value, bool | int | float) for value in values):
        return None
    return tuple(float(value) for value in values)
