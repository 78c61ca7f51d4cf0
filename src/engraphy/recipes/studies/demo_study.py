"""`engraphy study`: the demo's arms and a control over seeds, each at its best learning rate, as a
resumable queue.

Every run is a process with one thread and leaves one small JSON file; a run whose file is there is
not done again. First every arm runs at each of RATES on the first seed; the other seeds then run
each arm at the rate that was best. Differences are paired by seed: one seed fixes the split, the
tokenizer and the order of the text. The weights are drawn from the same seed as well, but arms draw
different numbers from it: the same seed, not the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import __version__, _native
from ...data.corpus import Corpus, CorpusConfig, prepare
from ...errors import ConfigError
from ...eval import losses as measure
from ...eval.bands import NgramCounts
from ...lm.loop import Run, TrainConfig, train
from ...system import cpu, provenance
from ...system.files import make_folder
from ..progress import curves
from .demo_arms import LABELS, ArmConfig, build
from .queue import read_json, run_missing, write_result

RATES = (3e-3, 6e-3, 1e-2)
DTYPE = "float32"

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of the queue. tokens: of training. data: as `lm.load_documents` takes it."""

    arm: str
    seed: int
    lr: float
    tokens: int
    data: str

    @property
    def name(self) -> str:
        """Name of its result file."""
        return f"{self.arm}-seed{self.seed}-lr{self.lr:g}.json"


@dataclass(frozen=True)
class StudyConfig:
    """seeds: the first one chooses the learning rates. tokens: of training, for each run. data: as
    in Job."""

    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 1_000_000
    data: str = "wiki"

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"seeds: expected one or more, all different and none negative, found {self.seeds}"
            )
        if self.tokens < 1:
            raise ConfigError(f"tokens: expected 1 or more, found {self.tokens}")

    def rate_jobs(self) -> list[Job]:
        """The first stage: every arm at every rate, on the first seed."""
        return [
            Job(arm, self.seeds[0], lr, self.tokens, self.data) for lr in RATES for arm in LABELS
        ]

    def seed_jobs(self, chosen: dict[str, float]) -> list[Job]:
        """The second stage: the other seeds, each arm at its chosen rate."""
        return [
            Job(arm, seed, lr, self.tokens, self.data)
            for seed in self.seeds[1:]
            for arm, lr in chosen.items()
        ]


def study(
    config: StudyConfig, out: Path, work: Path, workers: int, report: Callable[[str], None]
) -> None:
    """Run what is missing, `workers` at a time; results go to `out`, corpora and checkpoints to
    `work`.

    Raises ConfigError where a result in `out` is of other settings, EngraphyError naming the run
    where one fails; no further run is started then.
    """
    if workers < 1:
        raise ConfigError(f"workers: expected 1 or more, found {workers}")
    run_queue(config.rate_jobs(), out, work, workers, report)
    chosen = chosen_rates(config, {job: read_result(job, out) for job in config.rate_jobs()})
    run_queue(config.seed_jobs(chosen), out, work, workers, report)


def chosen_rates(config: StudyConfig, found: dict[Job, Result]) -> dict[str, float]:
    """The rate of the lowest validation loss on the first seed, of each arm that has run at all of
    RATES."""
    chosen = {}
    for arm in LABELS:
        jobs = [job for job in config.rate_jobs() if job.arm == arm]
        if all(job in found for job in jobs):
            chosen[arm] = min(jobs, key=lambda job: found[job]["validation_loss"]).lr
    return chosen


def read_result(job: Job, out: Path) -> Result:
    """The result of a run. Raises ConfigError for a damaged file and for one of other settings."""
    result = read_json(out / job.name, asdict(job))
    dtype = str(result.get("machine")).rpartition(", ")[2]
    if dtype != DTYPE:
        raise ConfigError(f"{out / job.name}: expected a result in {DTYPE}, found one of {dtype}")
    return result


def run_queue(
    queue: Sequence[Job], out: Path, work: Path, workers: int, report: Callable[[str], None]
) -> None:
    """Run what has no result yet. Raises EngraphyError naming the first run that fails; those
    beside it then finish."""
    make_folder(out)
    for job in queue:
        if (out / job.name).exists():
            read_result(job, out)
    missing = [job for job in queue if not (out / job.name).exists()]
    for job in {job.seed: job for job in missing}.values():
        folder, corpus = work / f"corpus-{job.seed}", CorpusConfig(job.data, seed=job.seed)
        if not (folder / "corpus.json").exists():
            prepare(corpus).save(folder)
        Corpus.load(folder, expected=corpus)
    run_missing(lambda: missing, out, workers, partial(run_job, out=out, work=work), report)


def run_job(job: Job, out: Path, work: Path) -> str:
    """One run: train, measure on the held-out documents, write `out`/NAME.json. Returns a line to
    print."""
    torch.set_num_threads(1)
    commit = provenance.commit()
    corpus = Corpus.load(work / f"corpus-{job.seed}")
    rates = TrainConfig(job.tokens, lr=job.lr, dtype=DTYPE, heldout_every=100, checkpoint_every=100)
    config = ArmConfig(rates, job.seed)
    model, arm = build(job.arm, corpus, config)
    folder = work / job.name.removesuffix(".json")
    run = Run(model, corpus.batches(), config.train, config.origin(job.arm))
    train(run, folder, resume=True, heldout=corpus.heldout_batches())
    told = curves(folder)
    counts = NgramCounts(corpus.training, corpus.end_id, corpus.vocab_size)
    losses = measure.Losses(model, corpus.heldout_batches(), counts, config.train.dtype)
    result = {
        "job": asdict(job),
        "parameters": asdict(arm.parameters),
        **losses.mean(),
        "loss_by_frequency": losses.by_bucket(),
        "heldout_curve": told["heldout_curve"],
        "max_expert_load": told["max_expert_load"],
        "minutes": round(told["seconds"] / 60, 2),
        "version": __version__,
        "commit": commit,
        "machine": f"{cpu.name()}, {_native.level()}, one thread, {config.train.dtype}",
    }
    write_result(result, out / job.name)
    return f"{job.name}: validation loss {result['validation_loss']:.4f} in {result['minutes']} minutes"
