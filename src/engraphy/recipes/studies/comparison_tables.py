"""Parts of a comparison's report: rates, arms, paired differences, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...eval.losses import START
from .queue import Job, Result
from .rates import RateSearch, Runs
from .tables import NONE, fixed, head, mean_and_error, missing, paired, row, shared_seeds

Labels = Mapping[str, str]
"""Labels of the arms, by name."""


def validation_loss(result: Result) -> float:
    """Mean nats of the held-out tokens of a run."""
    return result["validation_loss"]


def titled(bucket: str) -> str:
    """A bucket of `loss_by_frequency` as the head of a column."""
    return bucket if bucket == START else f"trigram {bucket}"


def sizes_table(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """All sizes of a backbone."""
    yield from head("backbone", "sizes")
    for name, sizes in rows:
        yield row(name, sizes)


def choice(labels: Labels, search: RateSearch, chosen: Mapping[str, float]) -> Iterator[str]:
    """The rates that the other seeds run at; says if one is at the edge of its range."""
    choices = []
    for arm, rates in search.rates.items():
        if arm not in chosen:
            continue
        lr = chosen[arm]
        edge = " (at the edge of the range)" if lr in (rates.steps[0], rates.steps[-1]) else ""
        choices.append(f"{labels[arm]} {lr:g}{edge}")
    yield f"Chosen, for the other seeds as well: {', '.join(choices) or 'nothing yet'}."


def arm_table(
    labels: Labels,
    seeds: Sequence[int],
    runs: Runs,
    chosen: Mapping[str, float],
    notes: Labels | None = None,
) -> Iterator[str]:
    """Sizes, rates and losses of the arms. notes: follow the labels."""
    columns = [f"seed {seed}" for seed in seeds]
    yield from head("arm", "parameters", "activated", "lr", *columns, "mean", "minutes")
    for arm, by_seed in runs.items():
        losses = {seed: validation_loss(result) for seed, result in by_seed.items()}
        whole = len(losses) == len(seeds)
        sizes = next(iter(by_seed.values()))["parameters"]
        minutes = statistics.mean(result["minutes"] for result in by_seed.values())
        yield row(
            labels[arm] + (notes or {}).get(arm, ""),
            f"{sizes['total']:,}",
            f"{sizes['activated']:,}",
            f"{chosen[arm]:g}",
            *(fixed(losses.get(seed)) for seed in seeds),
            fixed(statistics.mean(losses.values()) if whole else None),
            f"{minutes:.1f}",
        )


def pair_table(
    labels: Labels,
    pairs: Sequence[tuple[str, str]],
    results: Mapping[Job, Result],
    runs: Runs,
) -> Iterator[str]:
    """Differences of arms, paired by seed: of all tokens, and by the count of their trigram."""
    buckets: dict[str, None] = {}  # in the order of the results
    for result in results.values():
        buckets |= dict.fromkeys(result["loss_by_frequency"])
    yield from head("paired by seed", "seeds", "all", *map(titled, buckets))
    for one, other in pairs:
        if one not in runs or other not in runs:
            continue
        mine = runs[one]
        theirs = runs[other]
        seeds = len(shared_seeds(mine, theirs))
        differences = [paired(mine, theirs, validation_loss)]
        for bucket in buckets:
            by_bucket = paired(mine, theirs, lambda r, b=bucket: r["loss_by_frequency"].get(b))
            differences.append(by_bucket)
        cells = [
            mean_and_error(values) if values and len(values) == seeds else NONE
            for values in differences
        ]
        yield row(f"{labels[one]} minus {labels[other]}", str(seeds), *cells)


def gaps(
    labels: Labels,
    later: Mapping[str, Sequence[int]],
    jobs: Sequence[Job],
    results: Mapping[Job, Result],
    out: Path,
) -> Iterator[str]:
    """Runs that are missing, and results in the folder that are of something else.

    Args:
        labels: Of the arms.
        later: The seeds that each arm will run once its rate is known.
        jobs: All runs that are asked for so far.
        results: Those that are there.
        out: Folder of the results.
    """
    names = [job.name for job in jobs if job not in results]
    for arm, seeds in later.items():
        numbers = ", ".join(map(str, seeds))
        if seeds:
            names.append(f"seed{'s' if len(seeds) > 1 else ''} {numbers} of {labels[arm]}")
    yield missing(names)
    strangers = sorted({path.name for path in out.glob("*.json")} - {job.name for job in jobs})
    if strangers:
        yield f"In {out.name}, but not of this study: {', '.join(strangers)}."
