"""A resumable queue of runs. Each run is a process of its own and leaves one small JSON file; a run
whose file exists is not run again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError, EngraphyError
from ...system.files import write_file
from ...system.signals import end_workers
from .malloc import tuned_malloc

Result = dict[str, Any]
"""What a run leaves: JSON values."""


@dataclass(frozen=True)
class Job:
    """One run of a study.

    A study adds its settings as fields of a subclass. All fields stand in the result, so a result
    of other settings is refused.

    Attributes:
        arm: What is trained.
        seed: Seed of everything random.
        lr: Learning rate.
    """

    arm: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """Name of the result file."""
        return f"{self.arm}-seed{self.seed}-lr{self.lr:g}.json"

    @property
    def fields(self) -> dict[str, Any]:
        """Its fields as a result has them: without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class ResultsByJob(Protocol):
    """Results by job: a dict of them, or a folder (`Results`)."""

    def __contains__(self, job: Any, /) -> bool: ...

    def __getitem__(self, job: Any, /) -> Result: ...


class Results:
    """The results in a folder, read when they are asked for.

    Args:
        out: The folder.
        dtype: What the runs compute in. The machine of a result ends with it.
    """

    def __init__(self, out: Path, dtype: str = "float32"):
        self.out = out
        self.dtype = dtype

    def __contains__(self, job: Job, /) -> bool:
        return (self.out / job.name).exists()

    def __getitem__(self, job: Job, /) -> Result:
        """The result of a run.

        Raises:
            ConfigError: The file is damaged, or of other settings, or of another dtype.
        """
        path = self.out / job.name
        result = read_json(path, job.fields)
        dtype = str(result.get("machine")).rpartition(", ")[2]
        if dtype != self.dtype:
            raise ConfigError(f"{path}: expected a result in {self.dtype}, found one of {dtype}")
        return result

    def of(self, jobs: Iterable[Job]) -> dict[Job, Result]:
        """The results of `jobs`, as far as they exist. Raises ConfigError as indexing does."""
        return {job: self[job] for job in jobs if job in self}


class Named(Protocol):
    """What the queue needs of a job: the name of its result file."""

    @property
    def name(self) -> str: ...


def run_missing(
    plan: Callable[[], Sequence[Any]],
    out: Path,
    workers: int,
    run: Callable[[Any], str],
    report: Callable[[str], None],
) -> None:
    """Runs what has no result in `out`.

    On Ctrl-C or SIGTERM every run is asked to end, and saves what it can; on a second signal it is
    killed.

    Args:
        plan: Returns all jobs (`Named`), the first to run first. It is called before each start,
            since results may bring new jobs.
        out: Folder of the result files.
        workers: Number of runs at a time.
        run: Takes a job, writes its result, returns a line to print. It must be picklable.
        report: Takes the line of each finished run.

    Raises:
        EngraphyError: A run failed; the message names it. No other run is started then; those
            beside it finish.
    """
    with tuned_malloc():
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            _follow(pool, plan, out, workers, run, report)
        except BaseException as error:
            running = list(pool._processes.values())
            pool.shutdown(wait=False, cancel_futures=True)
            # SIGTERM is one too, and reaches this process alone.
            if isinstance(error, KeyboardInterrupt):
                end_workers(running)
            raise
        pool.shutdown()


def write_result(result: Result, path: Path) -> None:
    """Writes a result, which appears whole or not at all. Raises WriteFailed."""
    write_file(path, json.dumps(result, indent=1) + "\n")


def read_json(path: Path, job: dict[str, Any] | None = None) -> Result:
    """The result of a run with the fields `job`, None = of any. Raises ConfigError if the file is
    damaged, or the result of other settings."""
    try:
        result = json.loads(path.read_text())
        fields = result["job"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected the result of a run, found {type(error).__name__}: {error}"
        ) from None
    if job is not None and fields != job:
        raise ConfigError(f"{path}: expected a result of {job}, found one of {fields}")
    return result


def _follow(
    pool: ProcessPoolExecutor,
    plan: Callable[[], Sequence[Named]],
    out: Path,
    workers: int,
    run: Callable[[Any], str],
    report: Callable[[str], None],
) -> None:
    running = dict[Future[str], Named]()

    def start() -> bool:
        """Starts the next run. Returns False if none is left."""
        busy = [job.name for job in running.values()]
        for job in plan():
            if job.name not in busy and not (out / job.name).exists():
                running[pool.submit(run, job)] = job
                return True
        return False

    while True:
        # No more than there are workers: what the pool has fetched ahead would still run after an
        # interrupt.
        while len(running) < workers and start():
            pass
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            try:
                report(future.result())
                if not (out / job.name).exists():
                    raise ConfigError(f"expected it to leave {out / job.name}")
            except Exception as error:
                beside = f" ({len(running)} runs beside it finish first)" if running else ""
                raise EngraphyError(
                    f"{job.name}: {type(error).__name__}: {error}{beside}"
                ) from error
