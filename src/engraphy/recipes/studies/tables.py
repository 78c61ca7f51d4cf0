"""Markdown tables of studies: losses by rate, means with their standard errors over seeds, and
differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from .queue import Result

NONE = "–"
"""A cell without a value."""
CHANCE = 0.05
"""Differences whose p-value is below this get a star."""
LEGEND = "± is one standard error over seeds; * is beyond chance (t-test over seeds, 5 %)."
"""What stands below tables with `mean_and_error`."""


def markdown(parts: Iterable[Iterable[str]]) -> str:
    """Parts of a report, each an iterable of lines, with an empty line between them."""
    return "\n\n".join("\n".join(part) for part in parts)


def row(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield row(*cells)
    yield "|" + "---|" * len(cells)


def fixed(value: float | None, digits: int = 4) -> str:
    """A number, or NONE."""
    return NONE if value is None else f"{value:.{digits}f}"


def mean_and_error(values: Sequence[float], digits: int = 4) -> str:
    """Mean of differences of different seeds; its standard error if there are two or more, and a
    star if it is beyond chance."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    error = _error(values)
    star = " *" if p_value(values) < CHANCE else ""
    return f"{mean:+.{digits}f} ± {error:.{digits}f}{star}"


def p_value(values: Sequence[float]) -> float:
    """The two-sided t-test of two or more values: how likely is a mean as far from 0 by chance?

    The integral of Student's distribution is a finite sum for whole degrees of freedom (Abramowitz
    and Stegun, 26.7.3 and 26.7.4).
    """
    mean = abs(statistics.mean(values))
    error = _error(values)
    freedom = len(values) - 1
    if not mean:
        return 1.0
    angle = math.atan2(mean, error * math.sqrt(freedom))
    first = 1 + freedom % 2
    term = math.cos(angle) if first == 2 else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(first, freedom - 1, 2):
        term *= power / (power + 1) * math.cos(angle) ** 2
        total += term
    inside = math.sin(angle) * total
    return 1 - (inside if first == 1 else 2 / math.pi * (angle + inside))


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean of two or more values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def shared_seeds(one: Mapping[int, Result], other: Mapping[int, Result]) -> list[int]:
    """Seeds on which both arms have run, ascending."""
    return sorted(one.keys() & other.keys())


def paired(
    one: Mapping[int, Result],
    other: Mapping[int, Result],
    value: Callable[[Result], float | None],
) -> list[float]:
    """one - other on each seed on which both have run and have a value."""
    pairs = [(value(one[seed]), value(other[seed])) for seed in shared_seeds(one, other)]
    return [a - b for a, b in pairs if a is not None and b is not None]


def rate_table(
    title: str,
    labels: Mapping[str, str],
    losses: Mapping[str, Mapping[float, float]],
    rates: Sequence[float],
) -> Iterator[str]:
    """Losses of one seed: an arm a row, a rate a column.

    Args:
        title: Head of the first column.
        labels: Labels of the arms.
        losses: By arm and rate.
        rates: The columns.
    """
    yield from head(title, *(f"lr {lr:g}" for lr in rates))
    for arm, by_rate in losses.items():
        yield row(labels[arm], *(fixed(by_rate.get(lr)) for lr in rates))


def made_with(results: Iterable[Result]) -> Iterator[str]:
    """Two lines: the commits and the machines that the results come from."""
    results = list(results)
    for label, key, comma in (("Commit", "commit", ", "), ("Machine", "machine", "; ")):
        names = sorted({str(result[key] or "unknown") for result in results})
        yield f"{label}: {comma.join(names)}."


def missing(names: Sequence[str]) -> str:
    """A line that names the runs that are missing."""
    return f"Missing: {', '.join(names) or 'nothing'}."
