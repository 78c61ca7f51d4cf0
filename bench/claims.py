"""What a benchmark claims, as JSON: figures beside their goals. `make bench` collects them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Claim:
    """One figure beside its goal.

    Attributes:
        what: what was measured, and beside what.
        found: the figure, a ratio of medians of one run.
        unit: "x" (times), "%" or another unit.
        goal: what the figure should reach; None = it is shown without a goal.
        sense: "at least" or "at most".
        limit: what a C program reaches in the same run, in the same unit; None = not probed.
        error: standard error of `found`; None = not estimated.
    """

    what: str
    found: float
    unit: str = "x"
    goal: float | None = None
    sense: str = "at least"
    limit: float | None = None
    error: float | None = None

    @property
    def effective_goal(self) -> float | None:
        """The goal. If the C program does not reach it, what the C program reaches."""
        if self.goal is None or self.limit is None:
            return self.goal
        return (
            min(self.goal, self.limit) if self.sense == "at least" else max(self.goal, self.limit)
        )

    @property
    def met(self) -> bool | None:
        """Whether the figure reaches its effective goal; None without a goal."""
        goal = self.effective_goal
        if goal is None:
            return None
        return self.found >= goal if self.sense == "at least" else self.found <= goal


def median_and_error(values: ArrayLike) -> tuple[float, float]:
    """The median of a sample, and its standard error (bootstrap)."""
    sample = np.asarray(values)
    again = np.random.default_rng(0).choice(sample, (1000, len(sample)))
    return float(np.median(sample)), float(np.median(again, axis=1).std())


def write(path: Path | None, bench: str, machine: dict[str, Any], claims: list[Claim]) -> None:
    """Writes the claims of a benchmark to a JSON file; nothing if `path` is None."""
    if path is None:
        return
    content = {
        "bench": bench,
        "machine": machine,
        "claims": [dataclasses.asdict(claim) for claim in claims],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Claim]]:
    """The machine and the claims that `write` wrote. Fields that a Claim lacks are left out."""
    content = json.loads(path.read_text())
    names = {field.name for field in dataclasses.fields(Claim)}
    claims = [
        Claim(**{name: value for name, value in item.items() if name in names})
        for item in content["claims"]
    ]
    return content["machine"], claims
