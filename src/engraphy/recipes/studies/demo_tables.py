"""The tables of a study, in Markdown: learning rates and the choice among them, arms, differences
paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import ConfigError
from ...eval.losses import START
from .demo_arms import LABELS
from .demo_study import RATES, Job, Result, StudyConfig, chosen_rates, read_result

PAIRS = (("moe", "dense"), ("memory", "moe"), ("one-row", "moe"), ("memory", "one-row"))
NOTES = {"one-row": " (same sizes, one row of each head in use)"}
_NONE = "–"

Found = dict[Job, Result]


def tables(config: StudyConfig, out: Path) -> str:
    """Markdown over the results of this study in `out`, and what they were made with; then what is
    missing of it and which files are of something else. Raises ConfigError where there are none, or
    one is not what its name says."""
    first = {job: read_result(job, out) for job in config.rate_jobs() if (out / job.name).exists()}
    if not first:
        raise ConfigError(f"{out}: expected results of a study, found none")
    chosen = chosen_rates(config, first)
    jobs = [*config.rate_jobs(), *config.seed_jobs(chosen)]
    found = {job: read_result(job, out) for job in jobs if (out / job.name).exists()}
    parts = [
        _rate_table(config, found),
        _choice(chosen),
        _arm_table(config, found, chosen),
        _pair_table(config, found, chosen),
        _made_with(config, found),
        _gaps(config, jobs, found, chosen, out),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _rate_table(config: StudyConfig, found: Found) -> Iterator[str]:
    yield (
        f"| validation loss, seed {config.seeds[0]} | "
        + " | ".join(f"lr {lr:g}" for lr in RATES)
        + " |"
    )
    yield "|---|" + "---|" * len(RATES)
    for arm in LABELS:
        losses = [
            _loss(found, Job(arm, config.seeds[0], lr, config.tokens, config.data)) for lr in RATES
        ]
        yield f"| {LABELS[arm]} | " + " | ".join(_fixed(loss) for loss in losses) + " |"


def _choice(chosen: dict[str, float]) -> Iterator[str]:
    told = [
        f"{LABELS[arm]} {lr:g}"
        + (" (at the edge of the range)" if lr in (min(RATES), max(RATES)) else "")
        for arm, lr in chosen.items()
    ]
    yield f"Chosen, for the other seeds as well: {', '.join(told) or 'nothing yet'}."


def _arm_table(config: StudyConfig, found: Found, chosen: dict[str, float]) -> Iterator[str]:
    yield (
        "| arm | parameters | activated | lr | "
        + " | ".join(f"seed {seed}" for seed in config.seeds)
        + " | mean | minutes |"
    )
    yield "|---|" + "---|" * (len(config.seeds) + 5)
    for arm in chosen:
        jobs = _jobs(config, arm, chosen)
        losses = [_loss(found, job) for job in jobs]
        known = [loss for loss in losses if loss is not None]
        sizes, minutes = (
            found[jobs[0]]["parameters"],
            [found[job]["minutes"] for job in jobs if job in found],
        )
        yield (
            f"| {LABELS[arm]}{NOTES.get(arm, '')} | {sizes['total']:,} | {sizes['activated']:,} | {chosen[arm]:g} | "
            + " | ".join(_fixed(loss) for loss in losses)
            + f" | {_fixed(statistics.mean(known) if len(known) == len(losses) else None)} "
            f"| {statistics.mean(minutes):.1f} |"
        )


def _pair_table(config: StudyConfig, found: Found, chosen: dict[str, float]) -> Iterator[str]:
    buckets = list(
        dict.fromkeys(bucket for result in found.values() for bucket in result["loss_by_frequency"])
    )
    heads = [bucket if bucket == START else f"trigram {bucket}" for bucket in buckets]
    yield "| paired by seed | seeds | all | " + " | ".join(heads) + " |"
    yield "|---|" + "---|" * (len(buckets) + 2)
    for one, other in PAIRS:
        if one not in chosen or other not in chosen:
            continue
        runs = [
            (found[a], found[b])
            for a, b in zip(_jobs(config, one, chosen), _jobs(config, other, chosen), strict=True)
            if a in found and b in found
        ]
        gaps = [[a["validation_loss"] - b["validation_loss"] for a, b in runs]]
        for bucket in buckets:
            pairs = [
                (a["loss_by_frequency"].get(bucket), b["loss_by_frequency"].get(bucket))
                for a, b in runs
            ]
            gaps.append([a - b for a, b in pairs if a is not None and b is not None])
        cells = [mean_and_error(gap) if len(gap) == len(runs) else _NONE for gap in gaps]
        yield f"| {LABELS[one]} minus {LABELS[other]} | {len(runs)} | " + " | ".join(cells) + " |"


def _made_with(config: StudyConfig, found: Found) -> Iterator[str]:
    yield f"{config.data}, {config.tokens:,} tokens for each run. ± is one standard error over seeds."
    for label, key in (("Commit", "commit"), ("Machine", "machine")):
        yield f"{label}: {', '.join(sorted({str(result[key] or 'unknown') for result in found.values()}))}."


def _gaps(
    config: StudyConfig, jobs: Sequence[Job], found: Found, chosen: dict[str, float], out: Path
) -> Iterator[str]:
    missing = [job.name for job in jobs if job not in found]
    missing += [
        f"seeds {', '.join(map(str, config.seeds[1:]))} of {LABELS[arm]}"
        for arm in LABELS
        if arm not in chosen and len(config.seeds) > 1
    ]
    yield f"Missing: {', '.join(missing) or 'nothing'}."
    other = sorted({path.name for path in out.glob("*.json")} - {job.name for job in jobs})
    if other:
        yield f"In {out.name}, but not of this study: {', '.join(other)}."


def _jobs(config: StudyConfig, arm: str, chosen: dict[str, float]) -> list[Job]:
    """The runs of an arm at its chosen rate, a seed each."""
    return [Job(arm, seed, chosen[arm], config.tokens, config.data) for seed in config.seeds]


def _loss(found: Found, job: Job) -> float | None:
    return found[job]["validation_loss"] if job in found else None


def _fixed(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def mean_and_error(values: Sequence[float], digits: int = 4) -> str:
    """Mean and, of two values or more, its standard error."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
