"""The arms of a comparison: built by name from one seed, trained side by side, one process each."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...addresses.vocab import VocabMap
from ...data.corpus import Corpus
from ...errors import ConfigError, EngraphyError
from ...lm import LM, Arm, demo_config, three_arms
from ...lm.loop import Run, StepReport, TrainConfig, checkpoints, train
from ...memory.memory import EngramMemory
from ...system.signals import end_workers
from .malloc import MALLOC as MALLOC
from .malloc import tuned_malloc

LABELS = {
    "dense": "Dense",
    "moe": "MoE",
    "memory": "MoE + memory",
    "one-row": "MoE + one-row table",
}


@dataclass(frozen=True)
class ArmConfig:
    """What all arms of a comparison share.

    Attributes:
        train: Settings of a run.
        seed: Seed of the weights.
        rho: Share of the routed experts that the memory arm keeps.
        row_std: Standard deviation of the table's initial values.

    Raises:
        ConfigError: The seed is negative.
    """

    train: TrainConfig
    seed: int = 0
    rho: float = 0.75
    row_std: float = 0.02

    def origin(self, name: str) -> dict[str, Any]:
        """Where the initial weights of an arm come from, for its checkpoints."""
        return {"arm": name, "seed": self.seed, "rho": self.rho, "row_std": self.row_std}

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed: expected 0 or more, found {self.seed}")


def build(name: str, corpus: Corpus, config: ArmConfig) -> tuple[LM, Arm]:
    """A fresh model of an arm. Its weights depend on the seed and the arm alone.

    "one-row" is the control of "memory": the same model, but every token has the same address. So
    each head reads one constant row, and the memory is a gated constant.

    Args:
        name: One of LABELS.
        corpus: Text to train on.
        config: What all arms share.

    Raises:
        ConfigError: The arm is unknown.
    """
    if name not in LABELS:
        raise ConfigError(f"arm: expected one of {list(LABELS)}, found {name!r}")
    vocab = corpus.vocab
    if name == "one-row":
        vocab = VocabMap(np.zeros(corpus.vocab_size, dtype=np.int64))
    arms = three_arms(demo_config(corpus.vocab_size), len(vocab), corpus.end_id, rho=config.rho)
    arm: Arm = getattr(arms, "memory" if name == "one-row" else name)
    torch.manual_seed(config.seed)
    memory = None if arm.memory is None else EngramMemory(arm.memory, vocab)
    if memory is not None:
        memory.init_rows(config.row_std, config.seed)
    return LM(arm.model, memory), arm._replace(name=name)


def load(name: str, corpus: Corpus, config: ArmConfig, folder: Path) -> tuple[LM, Arm]:
    """The trained model of an arm, from the last checkpoint of its run in `folder`/`name`.

    Args: as for `build`.

    Raises:
        ConfigError: There is no checkpoint, or the run has not finished.
    """
    model, arm = build(name, corpus, config)
    run = Run(model, corpus.batches(), config.train, config.origin(name))
    saved = checkpoints(folder / name)
    if not saved:
        raise ConfigError(f"{folder / name}: expected a checkpoint of the arm {name}, found none")
    run.resume(saved[-1])
    if not run.done:
        raise ConfigError(
            f"{saved[-1]}: expected a finished run of {run.steps} steps, "
            f"found step {run.step_index}"
        )
    return model.eval(), arm


def train_arms(
    names: Sequence[str],
    corpus_folder: Path,
    config: ArmConfig,
    folder: Path,
    resume: bool,
    report: Callable[[str, StepReport], None],
    threads: int | None = None,
) -> None:
    """Trains arms at the same time, in a process each.

    Results depend on the number of threads, but not on how many arms run side by side. On Ctrl-C or
    SIGTERM, and if an arm fails, every arm writes a checkpoint first; on a second signal they are
    killed.

    Args:
        names: Names of the arms, from LABELS.
        corpus_folder: Folder of the prepared corpus.
        config: What all arms share.
        folder: Each arm writes to `folder`/NAME.
        resume: Continue from the newest checkpoints.
        report: Takes the name of an arm and the report of its step.
        threads: Threads of each arm; None = an equal share of the CPUs.

    Raises:
        EngraphyError: An arm failed; the message names it.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // len(names))
    arguments = (corpus_folder, config, folder, resume, threads, messages)
    workers = {name: context.Process(target=_work, args=(name, *arguments)) for name in names}
    with tuned_malloc():
        for worker in workers.values():
            worker.start()
    try:
        _follow(workers, messages, report)
    finally:
        end_workers(workers.values())


def _follow(
    workers: dict[str, Any], messages: Any, report: Callable[[str, StepReport], None]
) -> None:
    """Passes reports on until all workers are done. Raises EngraphyError if one fails or dies."""
    done: set[str] = set()
    while len(done) < len(workers):
        # Looked up before the queue is read: the last message of a worker is in the queue once the
        # worker has ended.
        working = {name: worker for name, worker in workers.items() if name not in done}
        ended = [name for name, worker in working.items() if not worker.is_alive()]
        try:
            name, kind, value = messages.get(block=not ended, timeout=1.0)
        except queue.Empty:
            for name in ended:
                code = workers[name].exitcode
                raise EngraphyError(
                    f"arm {name}: its process ended with exit code {code}"
                ) from None
            continue
        if kind == "step":
            report(name, StepReport(**value))
        elif kind == "done":
            done.add(name)
        else:
            raise EngraphyError(f"arm {name}: {value}")


def _work(
    name: str,
    corpus_folder: Path,
    config: ArmConfig,
    folder: Path,
    resume: bool,
    threads: int,
    messages: Any,
) -> None:
    """One arm, in its own process. Puts (name, "step" | "done" | "failed", value) into messages."""
    torch.set_num_threads(threads)

    def report(step: StepReport) -> None:
        messages.put((name, "step", dataclasses.asdict(step)))
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            # The parent was killed: the loop writes a checkpoint and stops.
            os.kill(os.getpid(), signal.SIGINT)

    try:
        corpus = Corpus.load(corpus_folder)
        model, _ = build(name, corpus, config)
        run = Run(model, corpus.batches(), config.train, config.origin(name))
        train(run, folder / name, resume, corpus.heldout_batches(), report)
        messages.put((name, "done", None))
    except KeyboardInterrupt:
        pass
    except Exception as error:
        messages.put((name, "failed", f"{type(error).__name__}: {error}"))
        raise
