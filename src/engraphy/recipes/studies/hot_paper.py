"""The paper's figures beside those of a study, and what follows (arXiv 2601.16531).

A verdict is about the study's own seeds: a difference counts from two standard errors on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from ...analysis.routes import COLD, HOT
from .comparison_tables import validation_loss
from .hot_values import differences, flips, over_training
from .rates import Runs
from .tables import NONE, head, mean_and_error, paired, row

ERRORS = 2.0
"""Standard errors from which a difference counts."""


def paper_table(runs: Runs) -> Iterator[str]:
    """Each figure of the paper, ours, and the verdict."""
    yield from head("figure", "paper", "here", "verdict")
    yield _gain(runs)
    yield _equal(runs)
    yield _larger(runs)
    yield from _coverage(runs)
    yield _turn(runs)
    for arm, name, step in (
        ("hot", "with a hot tier", "2000 to 2750"),
        ("hash", "with hashing", "about 3000"),
    ):
        yield _flip(runs, arm, name, step)
    yield _control(runs)
    yield _gate(runs)


def _gain(runs: Runs) -> str:
    values = paired(runs.get("hot", {}), runs.get("hash", {}), validation_loss)
    paper = "-0.0010 (4.4799 ± 0.0123 and 4.4809 ± 0.0082)"
    verdict = _verdict(values, "no difference, as in the paper", "a gain", "a loss")
    return row("loss, collision-free minus hash", paper, _shown(values), verdict)


def _equal(runs: Runs) -> str:
    tables = [_table(runs, arm) for arm in ("hash", "hot")]
    verdict = "not run"
    if None not in tables:
        verdict = "equal" if tables[0] == tables[1] else "not equal"
    shown = " and ".join(NONE if size is None else f"{size:,}" for size in tables)
    return row("table parameters, hash and collision-free", "128.0M and 128.0M", shown, verdict)


def _larger(runs: Runs) -> str:
    values = paired(runs.get("cold-140", {}), runs.get("hot", {}), validation_loss)
    verdict = _verdict(
        values, "no difference", "better, unlike the paper", "worse, as in the paper"
    )
    return row("loss, 1.6 times the slots minus collision-free", "+0.0162", _shown(values), verdict)


def _coverage(runs: Runs) -> Iterator[str]:
    covered = [result["tier"]["coverage"] for result in runs.get("hot", {}).values()]
    for order, paper in (("2", 0.55), ("3", 0.23)):
        name = f"training {order}-grams that are hot"
        if not covered:
            yield row(name, f"about {paper:.0%}", NONE, "not run")
            continue
        share = statistics.fmean(shares[order] for shares in covered)
        verdict = "more than in the paper" if share > paper else "less than in the paper"
        yield row(name, f"about {paper:.0%}", f"{share:.1%}", verdict)


def _turn(runs: Runs) -> str:
    values = over_training(runs.get("hot", {}), "loss")
    paper = "first below 0, later above"
    name = "loss with a hot tier, hot minus cold tokens"
    if not values:
        return row(name, paper, NONE, "not run")
    first, last = values[min(values)], values[max(values)]
    verdict = "as in the paper" if first < 0 < last else "not as in the paper"
    return row(name, paper, f"first {first:+.4f}, last {last:+.4f}", verdict)


def _flip(runs: Runs, arm: str, name: str, paper: str) -> str:
    values = over_training(runs.get(arm, {}), "loss")
    figure = f"step of that flip {name}"
    if not values:
        return row(figure, paper, NONE, "not run")
    steps = flips(values)
    shown = ", ".join(map(str, steps)) or "none"
    return row(figure, paper, f"{shown} of {max(values)}", "a flip" if steps else "no flip")


def _control(runs: Runs) -> str:
    """Whether what flips is the memory, or the text: the same tokens without a memory."""
    figure = "the same, less hot minus cold without a memory"
    values = differences(runs, "hot") if "hot" in runs else {}
    if not values:
        return row(figure, "not shown", NONE, "not run")
    steps = flips(values)
    shown = f"first {values[min(values)]:+.4f}, last {values[max(values)]:+.4f}"
    verdict = f"flips at {', '.join(map(str, steps))}" if steps else "no flip"
    return row(figure, "not shown", shown, verdict)


def _gate(runs: Runs) -> str:
    gates = [result["by_route"]["gate"] for result in runs.get("hot", {}).values()]
    values = [means[HOT] - means[COLD] for means in gates if HOT in means and COLD in means]
    verdict = _verdict(values, "neither", "prefers cold", "prefers hot, as in the paper")
    return row("gate at the end, hot minus cold", "above 0", _shown(values), verdict)


def _table(runs: Runs, arm: str) -> int | None:
    for result in runs.get(arm, {}).values():
        return result["tier"]["table"]
    return None


def _shown(values: Sequence[float]) -> str:
    return mean_and_error(values) if values else NONE


def _verdict(values: Sequence[float], same: str, below: str, above: str) -> str:
    """same, below or above, if there are seeds enough to tell."""
    if not values:
        return "not run"
    if len(values) < 2:
        return "one seed: no error known"
    error = statistics.stdev(values) / math.sqrt(len(values))
    middle = statistics.fmean(values)
    if abs(middle) < ERRORS * error:
        return same
    return below if middle < 0 else above
