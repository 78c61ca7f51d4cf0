"""Comparisons: studies whose arms are changes of one backbone, over seeds and learning rates.

Every arm trains on the same tokens in the same order for one seed. If there are several rates, each
arm searches its own on the first seed; the other seeds then run it at the best one. Differences are
paired by seed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ...data.corpus import Corpus, prepare
from ...data.packing import Batch, Batches
from ...errors import ConfigError
from ...eval.bands import NgramCounts
from ...eval.losses import Losses
from ...lm import LM, Parameters
from ...lm.loop import Run, TrainConfig, TrainingBatches, Watch, checkpoints, train
from ...system.files import make_folder
from ..progress import curves
from .arm_recipe import ArmRecipe, Frequent, build
from .backbones import Backbone
from .comparison_config import ComparisonConfig, Job
from .comparison_tables import (
    arm_table,
    choice,
    gaps,
    pair_table,
    sizes_table,
    validation_loss,
)
from .costs import cost_of
from .frequent import count_frequent, frequent_ngrams
from .queue import Result, ResultsByJob
from .rates import Rates, RateSearch, Runs
from .same_run import same_run
from .study import Study
from .tables import LEGEND, made_with, markdown, rate_table
from .trained import Trained

DTYPE = "float32"
SCALE = (5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2)
"""Rates that a search may go on to."""
SAVED = 200
"""Steps between checkpoints: a run that is stopped loses minutes at most."""


def _measure_nothing(trained: Trained) -> Result:
    return {}


def _corpus_alone(corpus: Corpus, recipe: ArmRecipe, config: Any, seed: int) -> Batches:
    return corpus.batches()


def _begin_nothing(
    model: LM, recipe: ArmRecipe, frequent: Frequent, partner: Callable[[str], Run]
) -> None:
    pass


def _like_none(backbone: Backbone) -> Mapping[str, str]:
    return {}


def _watch_nothing(corpus: Corpus, config: Any, frequent: Frequent) -> Watch | None:
    return None


def _no_tables(config: Any, runs: Runs) -> list[Iterator[str]]:
    return []


@dataclass(frozen=True)
class Comparison:
    """A comparison. `study` makes it run.

    Attributes:
        name: Its name in `STUDIES`.
        arms: backbone -> the arms by name, the first to run first.
        pairs: Names of arms whose difference, first minus second, is shown.
        measure: A trained arm -> what its result holds beside the usual, JSON values.
        tables: (config, runs) -> further parts of the report.
        after: An arm -> the arm that has to be done before, since it is needed as a partner, or for
            `ArmRecipe.until`. Both then run at one rate.
        text: (corpus, arm, config, seed) -> what an arm trains on.
        like: backbone -> of an arm that searches no rate, the arm whose best rate it runs at.
        begin: (model, arm, frequent n-grams, partner) -> None. Changes a fresh model of an arm.
        watch: (corpus, config, its frequent n-grams) -> what is measured while an arm trains.
        asked: (config, results so far) -> how many seeds of which arms they ask for, the arms in
            the order of `arms`; None = all of all.
        config: Class of the settings.
    """

    name: str
    arms: Callable[[Backbone], Mapping[str, ArmRecipe]]
    pairs: Sequence[tuple[str, str]] = ()
    measure: Callable[[Trained], Result] = _measure_nothing
    tables: Callable[[Any, Runs], list[Iterator[str]]] = _no_tables
    after: Mapping[str, str] = field(default_factory=dict)
    text: Callable[[Corpus, ArmRecipe, Any, int], TrainingBatches] = _corpus_alone
    asked: Callable[[Any, ResultsByJob], Mapping[str, int]] | None = None
    like: Callable[[Backbone], Mapping[str, str]] = _like_none
    begin: Callable[[LM, ArmRecipe, Frequent, Callable[[str], Run]], None] = _begin_nothing
    watch: Callable[[Corpus, Any, Frequent], Watch | None] = _watch_nothing
    config: type[ComparisonConfig] = ComparisonConfig

    @cached_property
    def study(self) -> Study:
        """The record that the engine of all studies runs."""
        return Study(
            self.name,
            self.config,
            self._jobs,
            self._run,
            _line,
            self._table,
            self._prepare,
            DTYPE,
            self._cost,
            self._same,
        )

    def recipes(self, config: ComparisonConfig) -> Mapping[str, ArmRecipe]:
        """The arms of a config, by name."""
        return self.arms(config.base)

    def search(self, config: ComparisonConfig) -> RateSearch:
        """The runs over rates and seeds."""
        like = self.like(config.base)
        rates = {arm: _rates(config.rates) for arm in self.recipes(config) if arm not in like}
        known = dict(config.arm_rates)
        if not known.keys() <= rates.keys():
            raise ConfigError(
                f"arm_rates: expected arms of {self.name} that search their rate, one of "
                f"{', '.join(rates)}, found {', '.join(known.keys() - rates.keys())}"
            )
        rates |= {arm: Rates.fixed(lr) for arm, lr in known.items()}
        return RateSearch(rates, config.seeds, config.job, validation_loss, like)

    def _cost(self, config: ComparisonConfig, results: ResultsByJob) -> str:
        """What is missing, and how long it takes here."""
        arms = self.recipes(config)
        jobs = self._jobs(config, results)
        done = Counter(job.arm for job in jobs if job in results)
        seeds = self._seeds(config, results)
        search = self.search(config).rates
        tried = {name: len(search[name].first) if name in search else 1 for name in arms}
        missing = {name: max(0, tried[name] + seeds.get(name, 0) - 1 - done[name]) for name in arms}
        return str(cost_of(arms, missing, config.base, config.tokens))

    def _jobs(self, config: ComparisonConfig, results: ResultsByJob) -> list[Job]:
        """Seed by seed, so that what stops early has whole comparisons; arms that search no rate
        come last."""
        like = self.like(config.base)
        if self.after.keys() - like.keys() and (len(config.rates) > 1 or config.arm_rates):
            found = (*config.rates, *config.arm_rates)
            raise ConfigError(f"{self.name}: expected one rate for all arms, found {found}")
        shares = [arm.rho for arm in self.recipes(config).values() if arm.has_share]
        if config.rho is not None and None not in shares:
            raise ConfigError(
                f"rho: expected none, since the arms of {self.name} have their own, "
                f"found {config.rho:g}"
            )
        jobs = sorted(
            self.search(config).jobs(results),
            key=lambda job: (job.arm in like, config.seeds.index(job.seed)),
        )
        seeds = self._seeds(config, results)
        jobs = [job for job in jobs if job.seed in config.seeds[: seeds.get(job.arm, 0)]]
        before = {job: self._before(job) for job in jobs}
        # At another arm's rate, what has to come before may not have been asked for.
        needed = dict.fromkeys(other for job, other in before.items() if job.arm in like)
        jobs += [other for other in needed if other is not None and other not in jobs]
        return [job for job in jobs if before.get(job) is None or before[job] in results]

    def _seeds(self, config: ComparisonConfig, results: ResultsByJob) -> Mapping[str, int]:
        """How many seeds of which arms are asked for."""
        if self.asked is not None:
            return self.asked(config, results)
        return dict.fromkeys(self.recipes(config), len(config.seeds))

    def _before(self, job: Job) -> Job | None:
        """The run that has to come before."""
        arm = self.after.get(job.arm)
        return None if arm is None else dataclasses.replace(job, arm=arm)

    def _run(self, job: Job, config: ComparisonConfig, work: Path) -> Result:
        """Trains an arm, then measures it on the held-out documents."""
        corpus = Corpus.load(_corpus_folder(work, config, job.seed))
        run, parameters = self._begun(job, config, corpus, work)
        frequent = _frequent(corpus, config, work, job.seed)
        folder = self._folder(job, config, work)
        until = self._until(job, config, work)
        watch = self.watch(corpus, config, frequent)
        with _alone(folder):
            train(run, folder, True, corpus.heldout_batches(), until=until, watch=watch)
        model = run.model.eval()
        metrics = curves(folder)
        shared = {"recipe": self._trained_as(job, config)} if self._is_usual else {}
        counts = NgramCounts.of_batches(study_text(run.batches, job.tokens), corpus.vocab_size)
        losses = Losses(model, corpus.heldout_batches(), counts, DTYPE)
        return {
            **shared,
            "parameters": asdict(parameters),
            **losses.mean(),
            "loss_by_frequency": losses.by_bucket(),
            "heldout_curve": metrics["heldout_curve"],
            "max_expert_load": metrics["max_expert_load"],
            "minutes": round(metrics["seconds"] / 60, 2),
            **self.measure(
                Trained(
                    model,
                    run,
                    corpus,
                    frequent,
                    counts,
                    losses,
                    partial(self._partner, job, config, corpus, work),
                    config,
                    job,
                    self.recipes(config)[job.arm],
                    folder,
                )
            ),
        }

    def _same(self, job: Job, config: ComparisonConfig, out: Path) -> tuple[Path, Result] | None:
        """The same run, if another study has a result of it in a folder beside `out`."""
        return same_run(job, self._trained_as(job, config), out) if self._is_plain else None

    def _prepare(self, config: ComparisonConfig, jobs: Sequence[Job], work: Path) -> None:
        """Makes the corpora of the jobs' seeds, and counts their n-grams for arms with hot ones.
        Raises ConfigError if one that exists is of other settings."""
        for seed in dict.fromkeys(job.seed for job in jobs):
            folder = _corpus_folder(work, config, seed)
            if not (folder / "corpus.json").exists():
                prepare(config.corpus(seed)).save(folder)
            corpus = Corpus.load(folder, expected=config.corpus(seed))
            count_frequent(corpus, folder, self.recipes(config).values(), config.base)

    def _until(self, job: Job, config: ComparisonConfig, work: Path) -> float | None:
        """The held-out loss at which a run stops early; None = it does not."""
        other = self.recipes(config)[job.arm].until
        if not other:
            return None
        folder = self._folder(dataclasses.replace(job, arm=other), config, work)
        return curves(folder)["heldout_curve"][-1][1]

    def _begun(
        self, job: Job, config: ComparisonConfig, corpus: Corpus, work: Path
    ) -> tuple[Run, Parameters]:
        """A run before its first step, and the parameter counts of its model."""
        recipe = self.recipes(config)[job.arm]
        frequent = _frequent(corpus, config, work, job.seed)
        model, parameters = build(
            recipe, config.base, corpus.vocab, corpus.end_id, job.seed, frequent
        )
        partner = partial(self._partner, job, config, corpus, work)
        self.begin(model, recipe, frequent, partner)
        batches = self.text(corpus, recipe, config, job.seed)
        start = origin(job) | {"arm": self._trained_as(job, config)}
        return Run(model, batches, settings(recipe, job), start), parameters

    def _folder(self, job: Job, config: ComparisonConfig, work: Path) -> Path:
        """Where a run leaves its checkpoints. Studies share them: an arm that another study has
        trained is only measured, if both train it in the usual way."""
        name = dataclasses.replace(job, arm=self._trained_as(job, config)).name
        study = "arms" if self._is_usual else self.name
        return work / study / f"{_key(job)}-{job.tokens}" / name.removesuffix(".json")

    @property
    def _is_usual(self) -> bool:
        """Whether arms train as in other studies, on the corpus alone."""
        own = self.text, self.begin, self.watch
        return own == (_corpus_alone, _begin_nothing, _watch_nothing)

    @property
    def _is_plain(self) -> bool:
        """Whether the result of any study that trains as usual says all that is asked for."""
        return self._is_usual and self.measure is _measure_nothing

    def _trained_as(self, job: Job, config: ComparisonConfig) -> str:
        """The name of a run's arm in checkpoints."""
        return self.recipes(config)[job.arm].key(config.base) if self._is_usual else job.arm

    def _partner(
        self, job: Job, config: ComparisonConfig, corpus: Corpus, work: Path, arm: str
    ) -> Run:
        """The training of another arm at its end. Raises ConfigError if its checkpoint is gone."""
        other = dataclasses.replace(job, arm=arm)
        run, _ = self._begun(other, config, corpus, work)
        folder = self._folder(other, config, work)
        saved = checkpoints(folder)
        if not saved:
            raise ConfigError(
                f"{folder}: expected a checkpoint, found none; remove the "
                f"result {other.name} to run it again"
            )
        run.resume(saved[-1])
        run.model.eval()
        return run

    def _table(
        self, config: ComparisonConfig, jobs: Sequence[Job], results: dict, out: Path
    ) -> str:
        if not results:
            raise ConfigError(f"{out}: expected results of a study, found none")
        search = self.search(config)
        chosen = search.chosen(results)
        labels = {name: recipe.label for name, recipe in self.recipes(config).items()}
        found = search.runs(results)
        runs = {name: found[name] for name in labels if name in found}
        parts = [sizes_table(config.base.rows())]
        if any(len(rates.first) > 1 for rates in search.rates.values()):
            losses = {arm: search.losses(arm, results) for arm in search.rates}
            title = f"validation loss, seed {config.seeds[0]}"
            tried = sorted({lr for by_rate in losses.values() for lr in by_rate})
            parts += [rate_table(title, labels, losses, tried), choice(labels, search, chosen)]
        parts.append(arm_table(labels, config.seeds, runs, chosen))
        if self.pairs:
            parts.append(pair_table(labels, self.pairs, results, runs))
        parts += self.tables(config, runs)
        parts.append(_made_with(config, results.values()))
        later = {}
        for arm, count in self._seeds(config, results).items():
            if arm not in chosen:
                begun = 1 if arm in search.rates else 0  # the seed that is searched with
                later[arm] = config.seeds[begun:count]
        parts.append(gaps(labels, later, jobs, results, out))
        return markdown(parts)


def settings(recipe: ArmRecipe, job: Job) -> TrainConfig:
    """How an arm is trained."""
    return TrainConfig(
        round(job.tokens * recipe.text),
        lr=job.lr,
        row_rate_scale=recipe.row_rate_scale,
        optimizer=recipe.optimizer,
        rows=recipe.rows,
        dtype=DTYPE,
        heldout_every=SAVED if recipe.until else 0,
        checkpoint_every=SAVED,
    )


def study_text(batches: TrainingBatches, tokens: int) -> Iterator[Batch]:
    """What an arm trains on that sees so many tokens: held-out losses of all arms are split by its
    n-grams, those of arms that see less, too."""
    return (batches[step] for step in range(math.ceil(tokens / batches.tokens_per_step)))


def origin(job: Job) -> dict[str, Any]:
    """Where an arm's initial weights come from, for its checkpoints."""
    return {"arm": job.arm, "seed": job.seed, "backbone": job.backbone}


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Waits until no other process trains in a folder: another study may be at the same arm."""
    make_folder(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _rates(rates: Sequence[float]) -> Rates:
    """A search that begins with `rates` and may go on along SCALE; one rate is not searched."""
    if len(rates) == 1:
        return Rates.fixed(*rates)
    return Rates(tuple(sorted({*SCALE, *rates})), tuple(rates))


def _corpus_folder(work: Path, config: ComparisonConfig, seed: int) -> Path:
    return work / f"corpus-{_key(config)}-{config.base.length}-{seed}"


def _frequent(corpus: Corpus, config: ComparisonConfig, work: Path, seed: int) -> Frequent:
    """The most frequent n-grams of a seed's training text."""
    return partial(frequent_ngrams, corpus, _corpus_folder(work, config, seed))


def _key(settings: Job | ComparisonConfig) -> str:
    """The backbone as the part of a folder's name."""
    return settings.backbone.replace("/", "-")


def _line(result: Result) -> str:
    return f"validation loss {result['validation_loss']:.4f} in {result['minutes']} minutes"


def _made_with(config: ComparisonConfig, results: Any) -> Iterator[str]:
    tokens = f"{config.tokens:,} tokens for each run"
    left = "" if config.rho is None else f", {config.rho:.0%} of the experts beside a memory"
    yield f"{config.data}, {tokens}{left}. {LEGEND}"
    yield from made_with(results)
