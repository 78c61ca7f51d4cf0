"""Numbers of the hot-tier study, over seeds: by route over training, and where a sign changes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from ...analysis.routes import COLD, HOT
from .queue import Result
from .rates import Runs
from .tables import shared_seeds


def mean(by_seed: Mapping[int, Result], value: Callable[[Result], float | None]) -> float | None:
    """The mean over the seeds that have a value; None if none has."""
    values = [found for result in by_seed.values() if (found := value(result)) is not None]
    return statistics.fmean(values) if values else None


def over_training(by_seed: Mapping[int, Result], kind: str) -> dict[int, float]:
    """Hot minus cold by step, the mean over seeds; {} if there is none. kind: "loss", "gate"."""
    by_step: dict[int, list[float]] = {}
    for result in by_seed.values():
        for step, value in _hot_minus_cold(result, kind).items():
            by_step.setdefault(step, []).append(value)
    return {step: statistics.fmean(values) for step, values in by_step.items()}


def differences(runs: Runs, arm: str) -> dict[int, float]:
    """Loss, hot minus cold, of an arm minus the same of that without a memory, by step: the mean
    over the seeds of both. {} for the arm without one."""
    return _less_none(runs, arm, lambda result: _hot_minus_cold(result, "loss"))


def gains(runs: Runs, arm: str, route: str) -> dict[int, float]:
    """Loss on a route of an arm minus that without a memory, by step: the mean over the seeds of
    both. {} for the arm without one."""

    def losses(result: Result) -> dict[int, float]:
        steps = result["by_step"]
        return {step: means["loss"][route] for step, means in steps if route in means["loss"]}

    return _less_none(runs, arm, losses)


def _less_none(
    runs: Runs, arm: str, values: Callable[[Result], dict[int, float]]
) -> dict[int, float]:
    """Values of an arm by step minus those of the arm without a memory, over the seeds of both."""
    none = runs.get("none", {})
    if arm == "none":
        return {}
    by_step: dict[int, list[float]] = {}
    for seed in shared_seeds(runs[arm], none):
        usual = values(none[seed])
        for step, value in values(runs[arm][seed]).items():
            if step in usual:
                by_step.setdefault(step, []).append(value - usual[step])
    return {step: statistics.fmean(found) for step, found in by_step.items()}


def flips(values: Mapping[int, float]) -> list[int]:
    """The first steps whose value has another sign than the value before. 0 has none, and is passed
    over."""
    signed = [(step, values[step] > 0) for step in sorted(values) if values[step]]
    pairs = zip(signed, signed[1:], strict=False)
    return [step for (_, before), (step, now) in pairs if now is not before]


def _hot_minus_cold(result: Result, kind: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for step, means in result["by_step"]:
        values = means.get(kind, {})
        if HOT in values and COLD in values:
            found[step] = values[HOT] - values[COLD]
    return found
