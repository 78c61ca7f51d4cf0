"""A resumable queue of runs: each is a process with one thread and leaves one small JSON file."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError, EngraphyError
from ...system.files import write_file
from ...system.signals import end_workers
from .demo_arms import tuned_malloc


class Job(Protocol):
    """What a queue needs of a run. name: of its result file."""

    @property
    def name(self) -> str: ...


def run_missing(
    plan: Callable[[], Sequence[Any]],
    out: Path,
    workers: int,
    run: Callable[[Any], str],
    report: Callable[[str], None],
) -> None:
    """Run what has no result in `out`, `workers` at a time. plan: all jobs, what comes first first;
    it is asked before each start, since results may bring new ones. run: takes a job, writes its
    result, returns a line; it has to be picklable.

    On Ctrl-C or SIGTERM every run is asked to end, and saves what it can; on a second signal it is
    killed. Raises EngraphyError naming the first run that fails; no other is started then, those
    beside it finish.
    """
    with tuned_malloc():
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            _follow(pool, plan, out, workers, run, report)
        except BaseException as error:
            running = list(pool._processes.values())
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(
                error, KeyboardInterrupt
            ):  # SIGTERM too, which reaches this process alone
                end_workers(running)
            raise
        pool.shutdown()


def write_result(result: dict[str, Any], path: Path) -> None:
    """The result appears complete or not at all. Raises WriteFailed."""
    write_file(path, json.dumps(result, indent=1) + "\n")


def read_json(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The result of a run of these settings. Raises ConfigError for a damaged file and for one of
    others."""
    try:
        result = json.loads(path.read_text())
        found = result["job"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected the result of a run, found {type(error).__name__}: {error}"
        ) from None
    if found != job:
        raise ConfigError(f"{path}: expected a result of {job}, found one of {found}")
    return result


def _follow(
    pool: ProcessPoolExecutor,
    plan: Callable[[], Sequence[Any]],
    out: Path,
    workers: int,
    run: Callable[[Any], str],
    report: Callable[[str], None],
) -> None:
    running = dict[Future[str], Any]()

    def start() -> bool:
        busy = [job.name for job in running.values()]
        waiting = (job for job in plan() if job.name not in busy and not (out / job.name).exists())
        job = next(waiting, None)
        if job is not None:
            running[pool.submit(run, job)] = job
        return job is not None

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
