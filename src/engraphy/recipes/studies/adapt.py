"""`engraphy study adapt`: what a frozen model with a memory learns of a domain and what it forgets,
and the same for LoRA.

Every arm trains on the same tokens of the domain in the same order. It is measured on held-out text
of the domain, on general text never seen, and on multiple-choice items. Each arm runs at each of
its rates on the first seed. If the best one is the lowest or highest tried, it goes on beyond it.
On the other seeds it runs at the rate of the lowest held-out loss. If the user gives rates, nothing
is searched.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...addresses.vocab import VocabMap
from ...errors import ConfigError
from .adapt_arms import LABELS, adapt, check_arm, memory_config, merged_hash, rates_of
from .adapt_run import BASE, BATCH, CONTEXT, Job, load_texts, measure
from .adapt_training import train
from .queue import Job as StudyJob
from .queue import Result, ResultsByJob
from .rates import Rates, RateSearch, Runs
from .study import Study, check_seeds, run_study, study_table
from .tables import (
    LEGEND,
    NONE,
    fixed,
    head,
    made_with,
    markdown,
    mean_and_error,
    missing,
    paired,
    rate_table,
    row,
    shared_seeds,
)

PAIRS = (
    ("memory", "lora-dense"),
    ("memory", "lora-total"),
    ("memory", "one-row"),
    ("memory", "frozen-rows"),
)


@dataclass(frozen=True)
class AdaptConfig:
    """Settings of the adaptation study.

    Attributes:
        model: Folder of a transformers model.
        general: Text that neither the model nor the domain holds: a file or a folder.
        tokens: Training tokens, for each run.
        rows_per_head: Rows per head of the memory.
        seeds: The first one chooses the learning rates.
        rates: (arm, learning rate) of the arms that run, without a search; () = all arms run, and
            each searches its own rate.
    """

    model: Path
    general: Path
    tokens: int = 100_000
    rows_per_head: int = 20_000
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if self.tokens < BATCH * CONTEXT:
            raise ConfigError(
                f"tokens: expected at least a step of {BATCH * CONTEXT}, found {self.tokens}"
            )
        for arm, lr in self.rates:
            check_arm(arm)
            if not 0 < lr < math.inf:
                raise ConfigError(f"rate of {arm}: expected a positive number, found {lr}")
        if len(dict(self.rates)) < len(self.rates):
            raise ConfigError(f"rates: expected one an arm, found {self.rates}")

    def job(self, arm: str, seed: int, lr: float) -> Job:
        return Job(arm, seed, lr, self.tokens, self.rows_per_head, self.model.name)

    def base_job(self) -> Job:
        """The model before anything is trained."""
        return dataclasses.replace(self.job(BASE, 0, 0.0), tokens=0)

    def search(self) -> RateSearch:
        """The rates that are given, or those that the arms search."""
        given = {arm: Rates.fixed(lr) for arm, lr in self.rates}
        rates = given or {arm: rates_of(arm) for arm in LABELS}
        return RateSearch(rates, self.seeds, self.job, _domain_loss)


def adapt_study(
    config: AdaptConfig, out: Path, workers: int, report: Callable[[str], None]
) -> None:
    """Runs what is missing, as `run_study` does."""
    run_study(ADAPT, config, out, workers, report)


def tables(config: AdaptConfig, out: Path) -> str:
    """Returns Markdown: the results in `out`, and which runs are missing.

    Raises:
        ConfigError: The result of the base model is missing.
    """
    return study_table(ADAPT, config, out)


def _jobs(config: AdaptConfig, results: ResultsByJob) -> list[Job]:
    """The model as it is; then arm by arm, or seed by seed if the rates are given."""
    jobs = config.search().jobs(results)
    if config.rates:
        jobs.sort(key=lambda job: config.seeds.index(job.seed))
    return [config.base_job(), *jobs]


def _run(job: Job, config: AdaptConfig, work: Path) -> Result:
    """Train, then measure. A run that diverged has an infinite loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    texts = load_texts(config.general, tokenizer)
    result: Result = {"text": texts.about}
    if job.arm != BASE:
        vocab = VocabMap.from_tokenizer(tokenizer, raw_size=model.config.vocab_size)
        adapted = adapt(model, vocab, job.arm, job.rows_per_head, job.seed)
        folder = work / f"{job.tokens}" / job.name.removesuffix(".json")
        result |= train(adapted, texts, job, folder)
        result["memory"] = merged_hash(memory_config(model.config, vocab, job.rows_per_head))
        model = adapted.model
    result |= measure(model, tokenizer, texts)
    if "diverged_at" in result:
        result["domain"]["loss"] = result["general"]["loss"] = math.inf
    return result


def _line(result: Result) -> str:
    losses = f"domain {_domain_loss(result):.4f}, general {_general_loss(result):.4f}"
    return f"{losses}, {result.get('minutes', 0)} minutes"


def _domain_loss(result: Result) -> float:
    return result["domain"]["loss"]


def _general_loss(result: Result) -> float:
    return result["general"]["loss"]


def _table(config: AdaptConfig, jobs: Sequence[Job], results: dict, out: Path) -> str:
    base = results.get(config.base_job())
    if base is None:
        name = config.base_job().name
        raise ConfigError(f"{out}: expected the result of the model as it is, {name}, found none")
    search = config.search()
    chosen = search.chosen(results)
    runs = search.runs(results)
    parts = [
        _arm_table(base, runs, chosen),
        _item_table(base, runs),
        _band_table(base, runs),
        _pair_table(runs),
        _made_with(config, base, results, jobs),
    ]
    if not config.rates:
        losses = {arm: search.losses(arm, results) for arm in LABELS}
        tried = sorted(set().union(*losses.values()))
        title = f"held-out loss of the domain, seed {config.seeds[0]}"
        parts.insert(0, rate_table(title, LABELS, losses, tried))
    return markdown(parts)


def _arm_table(base: Result, runs: Runs, chosen: Mapping[str, float]) -> Iterator[str]:
    yield from head(
        "arm",
        "lr",
        "seeds",
        "dense parameters",
        "table parameters (updated)",
        "MB",
        "domain loss",
        "change",
        "general loss",
        "change",
        "change of the domain per million parameters",
        "CPU minutes",
    )
    yield row(
        "the model as it is",
        *[NONE] * 5,
        fixed(_domain_loss(base)),
        NONE,
        fixed(_general_loss(base)),
        *[NONE] * 3,
    )
    for arm, by_seed in runs.items():
        results = list(by_seed.values())
        sizes = results[0]["sizes"]
        millions = (sizes["dense"] + sizes["table"]) / 1e6
        updated = statistics.mean(result["sizes"]["table_updated"] for result in results)
        domain_changes = [_domain_loss(result) - _domain_loss(base) for result in results]
        general_changes = [_general_loss(result) - _general_loss(base) for result in results]
        yield row(
            LABELS[arm],
            f"{chosen[arm]:g}",
            f"{len(results)}",
            f"{sizes['dense']:,}",
            f"{sizes['table']:,} ({updated:,.0f})",
            f"{sizes['bytes'] / 1e6:.1f}",
            fixed(statistics.mean(map(_domain_loss, results))),
            mean_and_error(domain_changes),
            fixed(statistics.mean(map(_general_loss, results))),
            mean_and_error(general_changes),
            f"{statistics.mean(domain_changes) / millions:+.4f}",
            f"{statistics.mean(result['minutes'] for result in results):.1f}",
        )


def _item_table(base: Result, runs: Runs) -> Iterator[str]:
    before = base["items"]
    yield from head("right answers, %", *before)
    cells = [
        f"{100 * score['accuracy']:.1f} ± {100 * score['accuracy_stderr']:.1f}"
        for score in before.values()
    ]
    yield row("the model as it is (± over items)", *cells)
    for arm, by_seed in runs.items():
        cells = []
        for name, score in before.items():
            after = [result["items"][name]["accuracy"] for result in by_seed.values()]
            changes = [100 * (accuracy - score["accuracy"]) for accuracy in after]
            cells.append(mean_and_error(changes, digits=1))
        yield row(f"{LABELS[arm]}: change", *cells)


def _band_table(base: Result, runs: Runs) -> Iterator[str]:
    bands = base["domain"]["by_frequency"]
    whole = sum(part["tokens"] for part in bands.values())
    title = (
        "change of the held-out loss by how often the trigram that ends at the target was in the "
        "domain's training text"
    )
    yield from head(
        title, *(f"{band} ({part['tokens'] / whole:.0%})" for band, part in bands.items())
    )
    for arm, by_seed in runs.items():
        cells = []
        for band, before in bands.items():
            after = [result["domain"]["by_frequency"][band] for result in by_seed.values()]
            cells.append(mean_and_error([part["loss"] - before["loss"] for part in after]))
        yield row(LABELS[arm], *cells)


def _pair_table(runs: Runs) -> Iterator[str]:
    yield from head("paired by seed", "seeds", "domain loss", "general loss")
    for one, other in PAIRS:
        mine = runs.get(one, {})
        theirs = runs.get(other, {})
        seeds = len(shared_seeds(mine, theirs))
        if not seeds:
            continue
        cells = [
            mean_and_error(paired(mine, theirs, loss)) for loss in (_domain_loss, _general_loss)
        ]
        yield row(f"{LABELS[one]} minus {LABELS[other]}", str(seeds), *cells)


def _made_with(
    config: AdaptConfig, base: Result, results: Mapping[StudyJob, Result], jobs: Sequence[Job]
) -> Iterator[str]:
    tokens = base["text"]["tokens"]
    yield (
        f"{base['text']['source']}: {tokens['training']:,} tokens to train on (each run sees "
        f"{config.tokens:,}), {tokens['heldout']:,} held out; {tokens['general']:,} tokens of "
        f"general text. {LEGEND}"
    )
    yield from made_with(results.values())
    yield missing([job.name for job in jobs if job not in results])


ADAPT = Study("adapt", AdaptConfig, jobs=_jobs, run=_run, line=_line, table=_table)
"""The adaptation study."""
