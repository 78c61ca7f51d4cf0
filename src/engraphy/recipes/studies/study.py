"""The engine of all studies. A study is one record, and two functions work on it: `run_study` runs
what is missing, `study_table` shows the results.

A study says which runs its config and the results so far ask for, how to do one of them, and how to
put the results into a table. The engine has the rest: the queue, resuming, the checks of results,
and what every result says about version, commit and machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import __version__, _native
from ...errors import ConfigError
from ...system import cpu, provenance
from ...system.files import make_folder
from .queue import Job, Result, Results, ResultsByJob, run_missing, write_result


def _prepare_nothing(config: Any, jobs: Sequence[Any], work: Path) -> None:
    pass


def _same_nowhere(job: Any, config: Any, out: Path) -> tuple[Path, Result] | None:
    return None


def _cost_unknown(config: Any, results: ResultsByJob) -> str:
    return ""


@dataclass(frozen=True)
class Study:
    """A comparison of many runs.

    Attributes:
        name: Its name in `STUDIES`.
        config: Class of its settings, a frozen dataclass.
        jobs: (config, results so far) -> all runs that they ask for, the first to run first. A pure
            function.
        run: (job, config, work) -> the result of one run, JSON values. It is called in a process of
            its own with one thread, so it must be a module-level function.
        line: result -> what is printed about a finished run.
        table: (config, jobs, their results, out) -> Markdown.
        prepare: (config, runs about to start, work) -> None. Writes what the runs share on disk. It
            is called before they start, in the parent process.
        dtype: What all runs compute in.
        cost: (config, results so far) -> runs, tokens and hours that are missing, as text; "" = the
            study cannot tell.
        same: (job, config, out) -> the file and the result of another study's run that is the same,
            which is then taken; None = there is none.
    """

    name: str
    config: type
    jobs: Callable[[Any, ResultsByJob], list[Any]]
    run: Callable[[Any, Any, Path], Result]
    line: Callable[[Result], str]
    table: Callable[[Any, Sequence[Any], dict[Job, Result], Path], str]
    prepare: Callable[[Any, Sequence[Any], Path], None] = _prepare_nothing
    dtype: str = "float32"
    cost: Callable[[Any, ResultsByJob], str] = _cost_unknown
    same: Callable[[Any, Any, Path], tuple[Path, Result] | None] = _same_nowhere


def run_study(
    study: Study,
    config: Any,
    out: Path,
    workers: int,
    report: Callable[[str], None],
    work: Path | None = None,
) -> None:
    """Runs what is missing of a study. The same call continues a study that was stopped.

    Args:
        study: What to run.
        config: Its settings.
        out: Folder of the result files, one a run.
        workers: Number of runs at a time, one thread each.
        report: Takes a line about each finished run.
        work: Folder of what can be made again, such as corpora and checkpoints. None = runs/NAME.

    Raises:
        ConfigError: A result in `out` has other settings, or workers is below 1.
        EngraphyError: A run failed; the message names it. After that no further run starts.
    """
    if workers < 1:
        raise ConfigError(f"workers: expected 1 or more, found {workers}")
    make_folder(out)
    work = Path("runs") / study.name if work is None else work
    results = Results(out, study.dtype)
    prepared: set[Job] = set()

    def plan() -> list[Job]:
        jobs = study.jobs(config, results)
        results.of(jobs)  # reads them all: a result with other settings is an error
        new = [job for job in jobs if job not in results and job not in prepared]
        if new:
            study.prepare(config, new, work)
            prepared.update(new)
        return jobs

    run = partial(run_one, study=study, config=config, out=out, work=work)
    run_missing(plan, out, workers, run, report)


def run_one(job: Job, study: Study, config: Any, out: Path, work: Path) -> str:
    """One run, in this process: writes `out`/NAME.json and returns a line to print."""
    same = study.same(job, config, out)
    if same is not None:
        path, result = same
        write_result(result | {"job": job.fields}, out / job.name)
        return f"{job.name}: the same as {path}"
    torch.set_num_threads(1)
    commit = provenance.commit()  # before a long run, during which the checkout may change
    result = {"job": job.fields, **study.run(job, config, work)}
    result |= {
        "version": __version__,
        "commit": commit,
        "machine": f"{cpu.name()}, {_native.level()}, one thread, {study.dtype}",
    }
    write_result(result, out / job.name)
    return f"{job.name}: {study.line(result)}"


def study_cost(study: Study, config: Any, out: Path) -> str:
    """What is missing of a study costs so many runs, tokens and hours; "" if it cannot tell.

    Raises ConfigError as `run_study` does for the results in `out`.
    """
    return study.cost(config, Results(out, study.dtype))


def study_table(study: Study, config: Any, out: Path) -> str:
    """Returns Markdown: the results of a study in `out`, and which runs are missing.

    Raises:
        ConfigError: A result is damaged or has other settings, or there is none to show.
    """
    results = Results(out, study.dtype)
    jobs = study.jobs(config, results)
    return study.table(config, jobs, results.of(jobs), out)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ConfigError unless there are seeds, all different and none negative."""
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"seeds: expected one or more, all different and none negative, found {seeds}"
        )
