"""`engraphy study`: the demo's arms and a control over seeds, each at its best learning rate.

First every arm runs at each of RATES on the first seed; the other seeds then run each arm at the
rate that was best. Differences are paired by seed: one seed fixes the split, the tokenizer and the
order of the text. The weights are drawn from the same seed as well, but arms draw different numbers
from it: the same seed, not the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...data.corpus import Corpus, CorpusConfig, prepare
from ...data.mix import require_books
from ...errors import ConfigError
from ...eval.bands import NgramCounts
from ...eval.losses import Losses
from ...lm.loop import Run, TrainConfig, train
from ..progress import curves
from .comparison_tables import arm_table, choice, gaps, pair_table, validation_loss
from .demo_arms import LABELS, ArmConfig, build
from .queue import Job as StudyJob
from .queue import Result, ResultsByJob
from .rates import Rates, RateSearch
from .study import Study, check_seeds, run_study, study_table
from .tables import LEGEND, made_with, markdown, rate_table

RATES = (3e-3, 6e-3, 1e-2)
DTYPE = "float32"
PAIRS = (("moe", "dense"), ("memory", "moe"), ("one-row", "moe"), ("memory", "one-row"))
NOTES = {"one-row": " (same sizes, one row of each head in use)"}


@dataclass(frozen=True)
class Job(StudyJob):
    """One run.

    Attributes:
        tokens: Training tokens.
        data: As `load_documents` takes it.
    """

    tokens: int
    data: str


@dataclass(frozen=True)
class StudyConfig:
    """Settings of the demo study.

    Attributes:
        seeds: The first one chooses the learning rates.
        tokens: Training tokens, for each run.
        data: As `load_documents` takes it.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 1_000_000
    data: str = "wiki"

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if self.tokens < 1:
            raise ConfigError(f"tokens: expected 1 or more, found {self.tokens}")
        require_books(self.data, self.tokens)

    def job(self, arm: str, seed: int, lr: float) -> Job:
        return Job(arm, seed, lr, self.tokens, self.data)

    def search(self) -> RateSearch:
        """Every arm tries all of RATES."""
        rates = {arm: Rates.fixed(*RATES) for arm in LABELS}
        return RateSearch(rates, self.seeds, self.job, validation_loss)


def study(
    config: StudyConfig, out: Path, work: Path, workers: int, report: Callable[[str], None]
) -> None:
    """Runs what is missing, as `run_study` does. Corpora and checkpoints go to `work`."""
    run_study(DEMO, config, out, workers, report, work)


def tables(config: StudyConfig, out: Path) -> str:
    """Markdown over the results in `out`: rates and the choice among them, arms, differences, what
    they were made with, what is missing, and which files are of something else. Raises ConfigError
    if there are none, or if one is not what its name says."""
    return study_table(DEMO, config, out)


def _jobs(config: StudyConfig, results: ResultsByJob) -> list[Job]:
    """Rate by rate on the first seed, then seed by seed."""

    def turn(job: Job) -> tuple[int, float]:
        place = config.seeds.index(job.seed)
        return place, (job.lr if place == 0 else 0.0)

    return sorted(config.search().jobs(results), key=turn)


def _prepare(config: StudyConfig, jobs: Sequence[Job], work: Path) -> None:
    """Makes the corpora of the jobs' seeds, in `work`. Raises ConfigError if one that exists is of
    other settings."""
    for seed in dict.fromkeys(job.seed for job in jobs):
        folder = _corpus_folder(work, seed)
        corpus = CorpusConfig(config.data, seed=seed)
        if not (folder / "corpus.json").exists():
            prepare(corpus).save(folder)
        Corpus.load(folder, expected=corpus)


def _corpus_folder(work: Path, seed: int) -> Path:
    return work / f"corpus-{seed}"


def _run(job: Job, config: StudyConfig, work: Path) -> Result:
    """Train, then measure on the held-out documents."""
    corpus = Corpus.load(_corpus_folder(work, job.seed))
    rates = TrainConfig(job.tokens, lr=job.lr, dtype=DTYPE, heldout_every=100, checkpoint_every=100)
    arm_config = ArmConfig(rates, job.seed)
    model, arm = build(job.arm, corpus, arm_config)
    folder = work / job.name.removesuffix(".json")
    run = Run(model, corpus.batches(), rates, arm_config.origin(job.arm))
    train(run, folder, resume=True, heldout=corpus.heldout_batches())
    metrics = curves(folder)
    counts = NgramCounts(corpus.training, corpus.end_id, corpus.vocab_size)
    losses = Losses(model, corpus.heldout_batches(), counts, DTYPE)
    return {
        "parameters": asdict(arm.parameters),
        **losses.mean(),
        "loss_by_frequency": losses.by_bucket(),
        "heldout_curve": metrics["heldout_curve"],
        "max_expert_load": metrics["max_expert_load"],
        "minutes": round(metrics["seconds"] / 60, 2),
    }


def _line(result: Result) -> str:
    return f"validation loss {result['validation_loss']:.4f} in {result['minutes']} minutes"


def _table(config: StudyConfig, jobs: Sequence[Job], results: dict, out: Path) -> str:
    if not results:
        raise ConfigError(f"{out}: expected results of a study, found none")
    search = config.search()
    chosen = search.chosen(results)
    runs = search.runs(results)
    losses = {arm: search.losses(arm, results) for arm in LABELS}
    title = f"validation loss, seed {config.seeds[0]}"
    later = {arm: config.seeds[1:] for arm in LABELS if arm not in chosen}
    return markdown(
        [
            rate_table(title, LABELS, losses, RATES),
            choice(LABELS, search, chosen),
            arm_table(LABELS, config.seeds, runs, chosen, NOTES),
            pair_table(LABELS, PAIRS, results, runs),
            _made_with(config, results),
            gaps(LABELS, later, jobs, results, out),
        ]
    )


def _made_with(config: StudyConfig, results: Mapping[StudyJob, Result]) -> Iterator[str]:
    tokens = f"{config.tokens:,} tokens for each run"
    yield f"{config.data}, {tokens}. {LEGEND}"
    yield from made_with(results.values())


DEMO = Study(
    "demo",
    StudyConfig,
    jobs=_jobs,
    run=_run,
    line=_line,
    table=_table,
    prepare=_prepare,
    dtype=DTYPE,
)
"""The demo study."""
