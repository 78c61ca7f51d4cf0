"""The queue of runs: asked anew before each start, nothing twice, what fails is named."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from engraphy.errors import EngraphyError
from engraphy.recipes.studies.queue import run_missing

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Named:
    name: str


def work(job: Named, out: Path, seconds: float = 0.0) -> str:
    time.sleep(seconds)
    if job.name != "lost":
        (out / job.name).open("x").close()  # a second run of the same job fails
    return job.name


def test_results_bring_new_runs_and_none_runs_twice(tmp_path):
    def plan() -> list[Named]:
        names = "ab" + "cd" * (tmp_path / "a").exists() + "e" * (tmp_path / "d").exists()
        return [Named(name) for name in names]

    told: list[str] = []
    run_missing(plan, tmp_path, 2, partial(work, out=tmp_path, seconds=0.2), told.append)
    assert sorted(told) == ["a", "b", "c", "d", "e"]
    assert told.index("a") < min(told.index("c"), told.index("d")) and told.index("d") < told.index(
        "e"
    )
    run_missing(plan, tmp_path, 2, partial(work, out=tmp_path), told.append)
    assert len(told) == 5


def test_a_run_that_leaves_no_result_is_an_error(tmp_path):
    with pytest.raises(EngraphyError, match="lost: ConfigError: expected it to leave .*lost"):
        run_missing(lambda: [Named("lost")], tmp_path, 1, partial(work, out=tmp_path), print)
