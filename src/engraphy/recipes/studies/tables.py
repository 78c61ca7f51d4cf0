"""Markdown tables of studies: losses by rate, means with their standard errors over seeds, and
differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from .queue import Result

NONE = "–"
"""A cell without a value."""


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
    """Mean of values of different seeds, and its standard error if there are two or more."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


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
