"""The search over learning rates, and the runs that it asks for.

Each arm first runs at some rates on the first seed, and goes on beyond the best one while that is
the lowest or the highest tried. The other seeds then run at the best one. Everything here is a
function of the results that are there, so a search that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .queue import Result, ResultsByJob

Runs = Mapping[str, Mapping[int, Result]]
"""Results at the chosen rates, by arm and seed."""


@dataclass(frozen=True)
class Rates:
    """The learning rates of an arm.

    Attributes:
        steps: All that the arm may try, ascending.
        first: What it tries in any case, in this order.
    """

    steps: tuple[float, ...]
    first: tuple[float, ...]

    @classmethod
    def fixed(cls, *rates: float) -> Rates:
        """These rates and no others. A single one needs no search."""
        return cls(rates, rates)

    @classmethod
    def around(cls, scale: tuple[float, ...], middle: float, beyond: int) -> Rates:
        """`middle`, the rate below and the rate above it, then up to `beyond` more on one side.

        Args:
            scale: Ascending rates; `middle` is one of them, with enough on each side.
        """
        at = scale.index(middle)
        steps = scale[at - 1 - beyond : at + 2 + beyond]
        return cls(steps, (middle, scale[at - 1], scale[at + 1]))

    def to_try(self, losses: Mapping[float, float]) -> list[float]:
        """The rates that the arm tries, as far as they are known, in the order of their runs.

        Args:
            losses: Losses of the rates that have run; rates outside of the search are ignored.
        """
        wanted = list(self.first)
        while all(lr in losses for lr in wanted):
            beyond = self._beyond(min(wanted, key=lambda lr: losses[lr]), wanted)
            if beyond is None:
                break
            wanted.append(beyond)
        return wanted

    def best(self, losses: Mapping[float, float]) -> float | None:
        """The rate of the lowest loss; None while a rate to try has not run."""
        tried = self.to_try(losses)
        if len(self.steps) == 1:
            return self.steps[0]
        if not all(lr in losses for lr in tried):
            return None
        return min(tried, key=lambda lr: losses[lr])

    def _beyond(self, best: float, wanted: list[float]) -> float | None:
        """The rate after the best one, on its side; None if the best one is not at an end, or has
        none after it."""
        at = self.steps.index(best)
        if best == min(wanted):
            return self.steps[at - 1] if at > 0 else None
        if best == max(wanted):
            return self.steps[at + 1] if at + 1 < len(self.steps) else None
        return None


@dataclass(frozen=True)
class RateSearch:
    """The runs of arms over learning rates and seeds.

    Attributes:
        rates: Rates of each arm that searches, in the order of the arms.
        seeds: The first one chooses the rates.
        job: Makes a run of an arm, a seed and a rate.
        loss: Takes a result, returns the value that should be low.
        like: An arm that does not search -> the arm whose best rate it runs at.
    """

    rates: Mapping[str, Rates]
    seeds: tuple[int, ...]
    job: Callable[[str, int, float], Any]
    loss: Callable[[Result], float]
    like: Mapping[str, str] = field(default_factory=dict)

    def losses(self, arm: str, results: ResultsByJob) -> dict[float, float]:
        """Loss on the first seed by rate, of the rates that have run."""
        jobs = {lr: self.job(arm, self.seeds[0], lr) for lr in self.rates[arm].steps}
        return {lr: self.loss(results[job]) for lr, job in jobs.items() if job in results}

    def chosen(self, results: ResultsByJob) -> dict[str, float]:
        """The best rate of each arm whose search is over, and of those that run at it as well."""
        best = {arm: rates.best(self.losses(arm, results)) for arm, rates in self.rates.items()}
        best |= {arm: best[other] for arm, other in self.like.items()}
        return {arm: lr for arm, lr in best.items() if lr is not None}

    def jobs(self, results: ResultsByJob) -> list[Any]:
        """All runs that the results ask for so far, arm by arm."""
        chosen = self.chosen(results)
        jobs = []
        for arm, rates in self.rates.items():
            tried = rates.to_try(self.losses(arm, results))
            jobs += [self.job(arm, self.seeds[0], lr) for lr in tried]
            if arm in chosen:
                jobs += [self.job(arm, seed, chosen[arm]) for seed in self.seeds[1:]]
        for arm in self.like:
            if arm in chosen:
                jobs += [self.job(arm, seed, chosen[arm]) for seed in self.seeds]
        return jobs

    def runs(self, results: ResultsByJob) -> Runs:
        """Results at the chosen rates, by arm and seed. An arm without any is left out."""
        runs: dict[str, dict[int, Result]] = {}
        for arm, lr in self.chosen(results).items():
            jobs = {seed: self.job(arm, seed, lr) for seed in self.seeds}
            by_seed = {seed: results[job] for seed, job in jobs.items() if job in results}
            if by_seed:
                runs[arm] = by_seed
        return runs
