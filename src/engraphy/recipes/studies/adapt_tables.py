"""The tables of the adaptation study, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import ConfigError
from .adapt import AdaptConfig, Job, Result, all_jobs, chosen_rates, read_results
from .adapt_arms import LABELS
from .demo_tables import mean_and_error

PAIRS = (
    ("memory", "lora-dense"),
    ("memory", "lora-total"),
    ("memory", "one-row"),
    ("memory", "frozen-rows"),
)
_NONE = "–"

Found = dict[Job, Result]


def tables(config: AdaptConfig, out: Path) -> str:
    """Markdown over the results in `out`, and what is missing. Raises ConfigError without the base
    model's result."""
    base = read_results([config.base_job()], out)
    if not base:
        raise ConfigError(
            f"{out}: expected the result of the model as it is, {config.base_job().name}, found none"
        )
    jobs = all_jobs(config, out)
    found = read_results(jobs, out)
    chosen = chosen_rates(config, found)
    runs = {
        arm: ran
        for arm, lr in chosen.items()
        if (
            ran := [
                (job, found[job])
                for seed in config.seeds
                if (job := config.job(arm, seed, lr)) in found
            ]
        )
    }
    told = next(iter(base.values()))
    parts = [
        *([] if config.rates else [_rate_table(config, found)]),
        _arm_table(told, runs, chosen),
        _item_table(told, runs),
        _band_table(told, runs),
        _pair_table(runs),
        _made_with(config, told, found, jobs),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


Runs = dict[str, list[tuple[Job, Result]]]


def _rate_table(config: AdaptConfig, found: Found) -> Iterator[str]:
    ran = {arm: config.ran(arm, found) for arm in LABELS}
    tried = sorted({lr for losses in ran.values() for lr in losses})
    yield (
        f"| held-out loss of the domain, seed {config.seeds[0]} | "
        + " | ".join(f"lr {lr:g}" for lr in tried)
        + " |"
    )
    yield "|---|" + "---|" * len(tried)
    for arm, losses in ran.items():
        yield (
            f"| {LABELS[arm]} | "
            + " | ".join(f"{losses[lr]:.4f}" if lr in losses else _NONE for lr in tried)
            + " |"
        )


def _arm_table(base: Result, runs: Runs, chosen: dict[str, float]) -> Iterator[str]:
    yield (
        "| arm | lr | seeds | dense parameters | table parameters (updated) | MB | domain loss | change | general "
        "loss | change | change of the domain per million parameters | CPU minutes |"
    )
    yield "|---|" + "---|" * 11
    yield (
        f"| the model as it is | {_NONE} | {_NONE} | {_NONE} | {_NONE} | {_NONE} | {base['domain']['loss']:.4f} "
        f"| {_NONE} | {base['general']['loss']:.4f} | {_NONE} | {_NONE} | {_NONE} |"
    )
    for arm, found in runs.items():
        sizes = found[0][1]["sizes"]
        gains = _each(found, lambda result: result["domain"]["loss"] - base["domain"]["loss"])
        forgotten = _each(found, lambda result: result["general"]["loss"] - base["general"]["loss"])
        millions = (sizes["dense"] + sizes["table"]) / 1e6
        updated = statistics.mean(result["sizes"]["table_updated"] for _, result in found)
        yield (
            f"| {LABELS[arm]} | {chosen[arm]:g} | {len(found)} | {sizes['dense']:,} | {sizes['table']:,} "
            f"({updated:,.0f}) | {sizes['bytes'] / 1e6:.1f} "
            f"| {_mean(found, 'domain'):.4f} | {mean_and_error(gains)} "
            f"| {_mean(found, 'general'):.4f} | {mean_and_error(forgotten)} "
            f"| {statistics.mean(gains) / millions:+.4f} "
            f"| {statistics.mean(result['minutes'] for _, result in found):.1f} |"
        )


def _item_table(base: Result, runs: Runs) -> Iterator[str]:
    names = list(base["items"])
    yield "| right answers, % | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    cells = [
        f"{100 * base['items'][name]['accuracy']:.1f} ± {100 * base['items'][name]['accuracy_stderr']:.1f}"
        for name in names
    ]
    yield "| the model as it is (± over items) | " + " | ".join(cells) + " |"
    for arm, found in runs.items():
        cells = [
            mean_and_error(
                [
                    100 * (result["items"][name]["accuracy"] - base["items"][name]["accuracy"])
                    for _, result in found
                ],
                digits=1,
            )
            for name in names
        ]
        yield f"| {LABELS[arm]}: change | " + " | ".join(cells) + " |"


def _band_table(base: Result, runs: Runs) -> Iterator[str]:
    bands = base["domain"]["by_frequency"]
    whole = sum(part["tokens"] for part in bands.values())
    yield (
        "| change of the held-out loss by how often the trigram that ends at the target was in the domain's "
        "training text | "
        + " | ".join(f"{band} ({part['tokens'] / whole:.0%})" for band, part in bands.items())
        + " |"
    )
    yield "|---|" + "---|" * len(bands)
    for arm, found in runs.items():
        cells = [
            mean_and_error(
                _each(
                    found,
                    lambda result, band=band: (
                        result["domain"]["by_frequency"][band]["loss"] - bands[band]["loss"]
                    ),
                )
            )
            for band in bands
        ]
        yield f"| {LABELS[arm]} | " + " | ".join(cells) + " |"


def _pair_table(runs: Runs) -> Iterator[str]:
    yield "| paired by seed | seeds | domain loss | general loss |"
    yield "|---|---|---|---|"
    for one, other in PAIRS:
        mine, theirs = (
            {job.seed: result for job, result in runs.get(arm, [])} for arm in (one, other)
        )
        seeds = sorted(mine.keys() & theirs.keys())
        if seeds:
            cells = [
                mean_and_error(
                    [mine[seed][text]["loss"] - theirs[seed][text]["loss"] for seed in seeds]
                )
                for text in ("domain", "general")
            ]
            yield (
                f"| {LABELS[one]} minus {LABELS[other]} | {len(seeds)} | "
                + " | ".join(cells)
                + " |"
            )


def _made_with(config: AdaptConfig, base: Result, found: Found, jobs: list[Job]) -> Iterator[str]:
    tokens = base["text"]["tokens"]
    yield (
        f"{base['text']['source']}: {tokens['training']:,} tokens to train on, of which each run sees "
        f"{config.tokens:,}, {tokens['heldout']:,} held out; {tokens['general']:,} tokens of general text. "
        "± is one standard error over seeds."
    )
    told = [base, *found.values()]
    for label, key in (("Commit", "commit"), ("Machine", "machine")):
        yield f"{label}: {', '.join(sorted({str(result[key] or 'unknown') for result in told}))}."
    missing = [job.name for job in jobs if job not in found]
    yield f"Missing: {', '.join(missing) or 'nothing'}."


def _each(found: list[tuple[Job, Result]], value: Callable[[Result], float]) -> list[float]:
    return [value(result) for _, result in found]


def _mean(found: list[tuple[Job, Result]], text: str) -> float:
    return statistics.mean(_each(found, lambda result: result[text]["loss"]))
