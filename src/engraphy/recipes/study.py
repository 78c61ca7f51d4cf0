"""`engraphy study`: the demo's arms and a control over seeds and learning rates, as a queue that can be resumed.

Every run is a process with one thread and leaves one small JSON file; a run whose file is there is not done again.
Differences are paired by seed: one seed fixes the split, the tokenizer, the order of the text and the weights.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native
from ..errors import ConfigError
from ..lm import NgramCounts
from ..lm.loop import Run, TrainConfig, train
from . import measure
from .arms import LABELS, ArmConfig, build, tuned_malloc
from .corpus import Corpus, CorpusConfig, prepare

RATES = (3e-3, 6e-3, 1e-2)
PAIRS = (("moe", "dense"), ("memory", "moe"), ("one-row", "moe"), ("memory", "one-row"))


@dataclass(frozen=True)
class Job:
    """One run of the queue."""

    arm: str
    seed: int
    lr: float
    tokens: int
    data: str

    @property
    def name(self) -> str:
        """Name of its result file."""
        return f"{self.arm}-seed{self.seed}-lr{self.lr:g}.json"


def jobs(seeds: Sequence[int], tokens: int, data: str = "wiki", lr: float = 6e-3) -> list[Job]:
    """Every arm and the control at `lr` for each seed, then the other RATES for the arms on the first seed."""
    queue = [Job(arm, seed, lr, tokens, data) for seed in seeds for arm in LABELS]
    arms = [arm for arm in LABELS if arm != "one-row"]
    other = [rate for rate in RATES if rate != lr]
    return queue + [Job(arm, seeds[0], rate, tokens, data) for rate, arm in itertools.product(other, arms)]


def study(queue: Sequence[Job], out: Path, work: Path, workers: int, report: Callable[[str], None]) -> None:
    """Run what is missing, `workers` at a time; results go to `out`, corpora and checkpoints to `work`.

    Raises ConfigError where a result in `out` is of other settings, and what a run raises.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [job for job in queue if not _done(job, out)]
    for seed in sorted({job.seed for job in missing}):
        folder = work / f"corpus-{seed}"
        config = CorpusConfig(missing[0].data, seed=seed)
        if not (folder / "corpus.json").exists():
            prepare(config).save(folder)
        Corpus.load(folder, expected=config)
    context = multiprocessing.get_context("spawn")
    with tuned_malloc(), ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = {pool.submit(run_job, job, out, work) for job in missing}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                report(future.result())


def run_job(job: Job, out: Path, work: Path) -> str:
    """One run: train, measure on the held-out documents, write `out`/NAME.json. Returns a line to print."""
    torch.set_num_threads(1)
    corpus = Corpus.load(work / f"corpus-{job.seed}")
    config = ArmConfig(TrainConfig(job.tokens, lr=job.lr, heldout_every=100, checkpoint_every=100), job.seed)
    model, arm = build(job.arm, corpus, config)
    began, heldout = time.perf_counter(), []
    train(Run(model, corpus.batches(), config.train), work / job.name.removesuffix(".json"), resume=True,
          heldout=corpus.heldout_batches(),
          report=lambda told: heldout.append([told.tokens, told.heldout]) if told.heldout is not None else None)
    minutes = (time.perf_counter() - began) / 60
    counts = NgramCounts(corpus.training, corpus.end_id, corpus.vocab_size)
    losses = measure.Losses(model, corpus.heldout_batches(), counts, config.train.dtype)
    mean, error = measure.mean_with_error(losses.losses, losses.documents)
    result = {"job": asdict(job), "parameters": asdict(arm.parameters), "validation_loss": mean,
              "validation_stderr": error, "loss_by_frequency": losses.by_bucket(), "heldout_curve": heldout,
              "max_expert_load": model.max_load(), "minutes": round(minutes, 2), "version": __version__,
              "commit": _commit(), "machine": f"{_cpu()}, {_native.level()}, one thread, {config.train.dtype}"}
    partial = out / f".{job.name}"
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, out / job.name)
    return f"{job.name}: validation loss {mean:.4f} in {minutes:.1f} minutes"


def tables(out: Path) -> str:
    """Markdown tables over all results in `out`: learning rates on the first seed, then arms and paired differences."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    found = {(r["job"]["arm"], r["job"]["seed"], r["job"]["lr"]): r for r in results}
    if not found:
        raise ConfigError(f"{out}: expected results of a study, found none")
    return "\n".join([*_rate_table(found), "", *_arm_table(found), "", *_pair_table(found)])


Found = dict[tuple[str, int, float], dict[str, Any]]


def _rate_table(found: Found) -> Iterator[str]:
    rates = sorted({lr for _, _, lr in found})
    first = min(seed for _, seed, _ in found)
    yield f"| validation loss, seed {first} | " + " | ".join(f"lr {lr:g}" for lr in rates) + " |"
    yield "|---|" + "---|" * len(rates)
    for arm in LABELS:
        cells = [f"{found[arm, first, lr]['validation_loss']:.4f}" if (arm, first, lr) in found else "" for lr in rates]
        yield f"| {LABELS[arm]} | " + " | ".join(cells) + " |"


def _arm_table(found: Found) -> Iterator[str]:
    chosen, seeds = _chosen(found)
    yield ("| arm | parameters | activated | lr | " + " | ".join(f"seed {seed}" for seed in seeds)
           + " | mean | minutes |")
    yield "|---|" + "---|" * (len(seeds) + 5)
    for arm, lr in chosen.items():
        runs = [found[arm, seed, lr] for seed in seeds]
        losses, sizes = [run["validation_loss"] for run in runs], runs[0]["parameters"]
        yield (f"| {LABELS[arm]} | {sizes['total']:,} | {sizes['activated']:,} | {lr:g} | "
               + " | ".join(f"{loss:.4f}" for loss in losses)
               + f" | {statistics.mean(losses):.4f} | {statistics.mean(run['minutes'] for run in runs):.1f} |")


def _pair_table(found: Found) -> Iterator[str]:
    chosen, seeds = _chosen(found)
    buckets = list(next(iter(found.values()))["loss_by_frequency"])
    yield ("| paired by seed | all | " + " | ".join(f"trigram {bucket}" for bucket in buckets) + " |")
    yield "|---|" + "---|" * (len(buckets) + 1)
    for one, other in PAIRS:
        if one in chosen and other in chosen:
            runs = [(found[one, seed, chosen[one]], found[other, seed, chosen[other]]) for seed in seeds]
            gaps = [[a["validation_loss"] - b["validation_loss"] for a, b in runs]]
            gaps += [[a["loss_by_frequency"][bucket] - b["loss_by_frequency"][bucket] for a, b in runs]
                     for bucket in buckets]
            yield f"| {LABELS[one]} - {LABELS[other]} | " + " | ".join(_mean_and_error(gap) for gap in gaps) + " |"


def _chosen(found: Found) -> tuple[dict[str, float], list[int]]:
    """The learning rate of each arm that every seed was run with, and the seeds."""
    seeds = sorted({seed for _, seed, _ in found})
    rates = {arm: [lr for name, seed, lr in found if name == arm and all((arm, s, lr) in found for s in seeds)]
             for arm in LABELS}
    return {arm: lrs[0] for arm, lrs in rates.items() if lrs}, seeds


def _mean_and_error(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{mean:+.4f} ± {error:.4f}"


def _done(job: Job, out: Path) -> bool:
    path = out / job.name
    if not path.exists():
        return False
    found = json.loads(path.read_text())["job"]
    if found != asdict(job):
        raise ConfigError(f"{path}: expected a result of {asdict(job)}, found one of {found}")
    return True


def _commit() -> str | None:
    done = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
                          capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
