"""The report of the hot-tier study: tables by route, over training, of gates and interventions.

The first cell of a table says what its numbers are, and what the sign of a difference means.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from ...analysis.routes import ALL, COLD, HOT
from .comparison_tables import validation_loss
from .hot_paper import paper_table
from .hot_values import differences, flips, gains, mean, over_training
from .queue import Result
from .rates import Runs
from .tables import NONE, fixed, head, mean_and_error, paired, row

COLUMNS = 8
"""Steps that a table over training shows."""
_HELPS = " (below 0: the memory helps)"


def tables(runs: Runs, labels: Mapping[str, str]) -> list[Iterator[str]]:
    """All parts of the report.

    Args:
        runs: Results by arm and seed.
        labels: Labels of the arms.
    """
    if not runs:
        return []
    parts = [_rows(runs, labels), _routes(runs, labels)]
    courses = {
        **{
            f"loss of {route} tokens, less that without a memory{_HELPS}": _gain(route)
            for route in (ALL, HOT, COLD)
        },
        "loss, hot minus cold, less that without a memory (below 0: the memory helps hot tokens "
        "more than cold ones)": differences,
        "loss, hot minus cold (below 0: hot tokens have the lower loss)": _plain,
        "gate, hot minus cold (above 0: the gate prefers hot tokens)": _gates,
    }
    if _steps(runs):
        parts += [_course(runs, labels, title, course) for title, course in courses.items()]
    parts += [_gates_by_route(runs, labels), _gates_by_bucket(runs, labels), _noise(runs)]
    return [*parts, paper_table(runs)]


def _rows(runs: Runs, labels: Mapping[str, str]) -> Iterator[str]:
    """The tables of the arms: rows, parameters, and what the hot n-grams cover."""
    yield "One table a layer in every arm."
    yield ""
    yield from head(
        *("arm", "rows hashed", "rows hot", "table parameters", "hot 2-grams", "hot 3-grams"),
        *("2-grams covered", "3-grams covered", "taken for hot, 2-grams", "3-grams"),
    )
    for arm, by_seed in runs.items():
        tier = next(iter(by_seed.values()))["tier"]
        if not tier:
            continue
        sizes = [f"{tier[name]:,}" for name in ("hashed_rows", "hot_rows", "table")]
        if "hot" not in tier:
            yield row(labels[arm], *sizes, *[NONE] * 6)
            continue
        counts = [f"{tier['hot'][order]:,}" for order in ("2", "3")]
        covered = [f"{tier['coverage'][order]:.1%}" for order in ("2", "3")]
        false = [f"{tier['false_hits'][order]:.3%}" for order in ("2", "3")]
        yield row(labels[arm], *sizes, *counts, *covered, *false)


def _routes(runs: Runs, labels: Mapping[str, str]) -> Iterator[str]:
    """The loss of each route at the end, and what each arm gains there."""
    shares = _first(runs)["route_shares"]
    names = [f"{name} ({share:.0%})" for name, share in shares.items()]
    yield (
        "Routes: the highest order whose n-gram, ending at a token, is among the frequent ones; "
        f"{HOT} = of any order, {COLD} = of none. The frequent ones are those of the "
        "collision-free arm, for all arms."
    )
    yield ""
    yield from head(f"loss less that without a memory{_HELPS}", "seeds", *names)
    none = runs.get("none", {})
    for arm, by_seed in runs.items():
        if arm == "none":
            losses = [fixed(mean(by_seed, _at("loss", name))) for name in shares]
            yield row(f"{labels[arm]}, its loss", str(len(by_seed)), *losses)
            continue
        gaps = [_gap(by_seed, none, _at("loss", name)) for name in shares]
        yield row(labels[arm], str(len(by_seed.keys() & none.keys())), *gaps)


_Course = Callable[[Runs, str], dict[int, float]]


def _course(runs: Runs, labels: Mapping[str, str], title: str, course: _Course) -> Iterator[str]:
    """Values of each arm over training, and after which steps their sign has changed.

    Args:
        runs: The results.
        labels: Of the arms.
        title: What the values are.
        course: Runs and an arm -> the value by step; empty = the arm has none.
    """
    steps = _steps(runs)
    shown = steps
    if len(steps) > COLUMNS:
        last = len(steps) - 1
        shown = [steps[round(place * last / (COLUMNS - 1))] for place in range(COLUMNS)]
    yield from head(title, "seeds", *(f"step {step}" for step in shown), "sign changes at")
    for arm in runs:
        values = course(runs, arm)
        if values:
            cells = [f"{values[step]:+.4f}" if step in values else NONE for step in shown]
            changes = ", ".join(map(str, flips(values))) or "never"
            yield row(labels[arm], str(len(runs[arm])), *cells, changes)


def _gain(route: str) -> _Course:
    return lambda runs, arm: gains(runs, arm, route)


def _plain(runs: Runs, arm: str) -> dict[int, float]:
    return over_training(runs[arm], "loss")


def _gates(runs: Runs, arm: str) -> dict[int, float]:
    return over_training(runs[arm], "gate")


def _gates_by_route(runs: Runs, labels: Mapping[str, str]) -> Iterator[str]:
    """What wrong gates cost: the gate fixed at 0 and at 1, and the best of three afterwards."""
    yield from head(
        *("gates at the end, by route", "tokens", "mean gate", "loss"),
        *("gate 0 minus learned", "gate 1 minus learned", "wrong gates"),
        "best of the three at each token minus learned",
    )
    for arm, by_seed in _main(runs):
        for route in _names(by_seed, "by_route"):
            yield row(f"{labels[arm]}: {route}", *_gate_cells(by_seed, "by_route", route))


def _gates_by_bucket(runs: Runs, labels: Mapping[str, str]) -> Iterator[str]:
    """The loss where gates are of a size."""
    yield from head(
        *("tokens by their gate", "tokens", "mean gate", "loss"),
        *("gate 0 minus learned", "gate 1 minus learned", "wrong gates"),
        "best of the three at each token minus learned",
    )
    for arm, by_seed in _main(runs):
        for bucket in _names(by_seed, "buckets"):
            yield row(f"{labels[arm]}: {bucket}", *_gate_cells(by_seed, "buckets", bucket))


def _gate_cells(by_seed: Mapping[int, Result], kind: str, name: str) -> list[str]:
    """Means over the seeds that have such tokens."""
    found = [
        result["gates"][kind][name] for result in by_seed.values() if name in result["gates"][kind]
    ]

    def over(key: str, less: str = "") -> float:
        return statistics.fmean(values[key] - (values[less] if less else 0.0) for values in found)

    return [
        f"{over('share'):.1%}",
        fixed(over("gate"), 3),
        fixed(over("loss")),
        *(f"{over(key, 'loss'):+.4f}" for key in ("closed", "opened")),
        f"{over('wrong'):.1%}",
        f"{over('best', 'loss'):+.4f}",
    ]


def _noise(runs: Runs) -> Iterator[str]:
    """What collisions do to the rows of frequent n-grams, and what stands in for them."""
    measured = [result["collisions"] for result in runs.get("hash", {}).values()]
    if not measured:
        yield "Collisions: the arm that hashes all n-grams has not run."
        return
    share = statistics.fmean(values["share"] for values in measured)
    readings = sum(values["readings"] for values in measured)
    yield (
        f"Collisions: between two readings by the same frequent n-gram others move its hashed row "
        f"by {share:.1%} of its size (root mean squares, {readings:,} rows)."
    )
    for result in runs.get("noise", {}).values():
        yield f"The noise on hot rows is {result['noise']:.1%} of their size."


# --- values ---------------------------------------------------------------------------------------


def _at(kind: str, name: str) -> Callable[[Result], float | None]:
    return lambda result: result["by_route"][kind].get(name)


def _gap(
    one: Mapping[int, Result],
    other: Mapping[int, Result],
    value: Callable[[Result], float | None] = validation_loss,
) -> str:
    values = paired(one, other, value)
    return mean_and_error(values) if values else NONE


def _main(runs: Runs) -> Iterator[tuple[str, Mapping[int, Result]]]:
    """The arms whose gates are shown token by token: of the others there is one seed."""
    return ((arm, by_seed) for arm, by_seed in runs.items() if arm in ("hash", "hot"))


def _first(runs: Runs) -> Result:
    return next(iter(next(iter(runs.values())).values()))


def _steps(runs: Runs) -> Sequence[int]:
    return [step for step, _ in _first(runs)["by_step"]]


def _names(by_seed: Mapping[int, Result], kind: str) -> list[str]:
    """Names of routes or buckets, as results have them."""
    names: dict[str, None] = {}
    for result in by_seed.values():
        names |= dict.fromkeys(result.get("gates", {}).get(kind, ()))
    return list(names)
