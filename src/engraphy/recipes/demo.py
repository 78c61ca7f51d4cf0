"""`engraphy demo`: trains three arms on the same text, saves and reopens the table, and writes a
report.

The arms are dense, a mixture of experts, and the same mixture with part of its routed experts'
parameters moved into a memory. Activated parameters are equal in all three, totals in the last two
(paper, section 3). The reopened table has to give the same logits bit for bit.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from .. import __version__, _native
from ..analysis.gates import gates_by_bucket, gates_of_sentences
from ..data.corpus import Corpus, CorpusConfig, prepare
from ..data.mix import described as describe_parts
from ..data.mix import require_books
from ..errors import ConfigError, EngraphyError
from ..eval import losses as measure
from ..eval.bands import NgramCounts
from ..lm import LM, Arm
from ..lm.loop import TrainConfig, checkpoints, described
from ..memory.memory import EngramMemory
from ..report import page
from ..system import cpu, provenance
from ..train.dtype import AUTO, DtypeChoice, check_dtype, choose_dtype
from .progress import ArmProgress, curves
from .studies.demo_arms import LABELS, ArmConfig, load, train_arms

ARMS = ("dense", "moe", "memory")
SENTENCES = (
    "Alexander the Great was king of Macedon.",
    "The United States of America declared independence from Great Britain in 1776.",
    "Albert Einstein was awarded the Nobel Prize in Physics for the photoelectric effect.",
    "The Second World War ended in 1945 with the surrender of Germany and Japan.",
)
PROMPTS = (
    "Alexander the Great was",
    "The capital city of",
    "In the field of mathematics,",
    "The Roman Empire",
)


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of a demo.

    Attributes:
        folder: Where everything is written.
        corpus: The text, and how it is tokenised and packed.
        tokens: Tokens of training, for each arm.
        seed: Seed of the weights and of the order.
        dtype: As `choose_dtype` takes it.
        resume: True continues the runs that `folder` holds, in the dtype that they have.
        threads: Threads of each arm; None = an equal share of the CPUs.
    """

    folder: Path
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokens: int = 1_000_000
    seed: int = 0
    dtype: str = AUTO
    resume: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        require_books(self.corpus.data, self.tokens)
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: expected 1 or more, found {self.threads}")

    def arms(self, dtype: DtypeChoice | None = None) -> ArmConfig:
        """Returns the settings that all arms share.

        Args:
            dtype: What `chosen_dtype` returned; None = it is called.
        """
        name = (dtype or self.chosen_dtype()).name
        train = TrainConfig(self.tokens, dtype=name, heldout_every=100, checkpoint_every=200)
        return ArmConfig(train, self.seed)

    def chosen_dtype(self) -> DtypeChoice:
        """Returns the dtype that all arms compute in. A resumed run keeps its own on any machine.

        Raises:
            ConfigError: If the config asks for another dtype than that of the run, or if a
                checkpoint cannot be read.
        """
        saved = self._newest_checkpoint() if self.resume else None
        if saved is None:
            return choose_dtype(self.dtype)
        name = described(saved)["config"]["dtype"]
        if self.dtype not in (AUTO, name):
            raise ConfigError(
                f"{saved}: this run computes in {name}, found dtype {self.dtype!r}; "
                "resume it without a dtype, or choose another folder"
            )
        return DtypeChoice(name, "of the run that is resumed")

    def _newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of the first arm that has one."""
        for name in ARMS:
            paths = checkpoints(self.folder / name)
            if paths:
                return paths[-1]
        return None


def demo(config: DemoConfig, console: Console) -> dict[str, Any]:
    """Runs the demo and writes report.json and report.html into `config.folder`.

    Args:
        config: Text, sizes and folder.
        console: Where progress and results are printed.

    Returns:
        The report, in format "engraphy-report-1".

    Raises:
        ConfigError: If the folder holds another run.
        DataUnavailable: If the text is not there and cannot be fetched.
        EngraphyError: If an arm fails.
    """
    dtype = config.chosen_dtype()
    arm_config = config.arms(dtype)
    corpus_folder = config.folder / "corpus"
    console.print(str(dtype), soft_wrap=True, markup=False)
    with console.status(f"Preparing {config.corpus.data}: tokenizer, vocabulary map, token ids"):
        corpus = _corpus(corpus_folder, config.corpus)
    console.print(_described(corpus))
    with ArmProgress(console, LABELS) as progress:
        train_arms(
            ARMS,
            corpus_folder,
            arm_config,
            config.folder,
            config.resume,
            progress.step,
            config.threads,
        )
    with console.status("Measuring: losses, gates, the table on disk"):
        report = _report(config, arm_config, corpus)
    path = page.write(report, config.folder)
    _print_whole(console, summary(report))
    console.print(headline(report))
    console.print(f"Report: {escape(str(path))}")
    return report


def _described(corpus: Corpus) -> str:
    """The size of a corpus, for the terminal."""
    sizes = (
        f"{corpus.name}: {len(corpus.training):,} documents of {corpus.training.tokens:,} tokens "
        f"to train on, {len(corpus.heldout):,} held out. Licence: {corpus.licence}"
    )
    return escape("\n".join([sizes, *describe_parts(corpus.parts)]))


def _report(config: DemoConfig, arm_config: ArmConfig, corpus: Corpus) -> dict[str, Any]:
    """Measures the trained arms of `config.folder`; saves and reopens the table."""
    models, arms = {}, {}
    for name in ARMS:
        models[name], arms[name] = load(name, corpus, arm_config, config.folder)
    training = {name: curves(config.folder / name) for name in ARMS}
    report = _header(config, arm_config, corpus, len(training["memory"]["curve"]))
    report |= _measure(models, arms, corpus, arm_config)
    report |= _table_on_disk(models["memory"], corpus, config.folder / "engram")
    for arm in report["arms"]:
        arm |= training[arm["name"]]
    return report


def summary(report: dict[str, Any]) -> RichTable:
    """Returns the comparison as a table for the terminal.

    Args:
        report: What `demo` returned.
    """
    arms = report["arms"]
    gaps = [report["differences"][name] for name in ("moe - dense", "memory - moe")]
    table = RichTable(
        title="One text, the same tokens in the same order",
        title_justify="left",
        caption="tokens/s: whole steps, while the arms share the machine",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in [*(arm["label"] for arm in arms), "MoE - Dense", "Memory - MoE"]:
        table.add_column(name, justify="right")
    for label, key in (
        ("parameters", "total"),
        ("activated a token", "activated"),
        ("in the table", "table"),
    ):
        table.add_row(label, *(f"{arm['parameters'][key]:,}" for arm in arms), "", "")
    for label, key in (("table rows", "rows"), ("table bytes", "bytes")):
        sizes = [f"{arm['table'][key]:,}" if arm["table"] else "" for arm in arms]
        table.add_row(label, *sizes, "", "")
    table.add_row("tokens/s", *(f"{arm['tokens_per_second']:,.0f}" for arm in arms), "", "")
    table.add_row(
        "validation loss",
        *(f"{arm['validation_loss']:.4f}" for arm in arms),
        *(f"{gap['all']:+.4f}" for gap in gaps),
    )
    for row in report["frequency"]:
        bucket = row["bucket"]
        label = bucket if row["low"] is None else f"trigram {bucket}"
        table.add_row(
            f"  {label} ({row['share']:.1%})",
            *(f"{arm['loss_by_frequency'][bucket]:.4f}" for arm in arms),
            *(f"{gap[bucket]:+.4f}" for gap in gaps),
        )
    return table


def _print_whole(console: Console, table: RichTable) -> None:
    """Prints no number cut off: a narrow terminal breaks the lines of a wide table instead."""
    width = console.width
    console.width = max(width, Console(width=10_000).measure(table).maximum)
    console.print(table)
    console.width = width


def headline(report: dict[str, Any]) -> str:
    """Returns what came out, in two lines.

    Args:
        report: What `demo` returned.
    """
    gap = report["differences"]["memory - moe"]
    equal = "equal bit for bit" if report["logits_equal"] else "DIFFERENT"
    error = "one document, so no standard error"
    if "all_stderr" in gap:
        error = f"standard error over documents {gap['all_stderr']:.4f}"
    return (
        f"Memory - MoE: {gap['all']:+.4f} nats a token on held-out text ({error}, one seed).\n"
        f"Table written to disk and reopened: logits {equal}."
    )


def _corpus(folder: Path, config: CorpusConfig) -> Corpus:
    if (folder / "corpus.json").exists():
        return Corpus.load(folder, expected=config)
    corpus = prepare(config)
    corpus.save(folder)
    return corpus


def _header(config: DemoConfig, arms: ArmConfig, corpus: Corpus, steps: int) -> dict[str, Any]:
    """What the run was made with, and how to run it again."""
    return {
        "format": page.FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": config.seed,
        "versions": _versions(),
        "machine": {
            "cpu": cpu.name(),
            "cores": len(os.sched_getaffinity(0)),
            "isa": _native.level(),
            "native": _native.core is not None,
        },
        "settings": _settings(arms, corpus, steps),
        "data": {
            "name": corpus.name,
            "licence": corpus.licence,
            "train_documents": len(corpus.training),
            "heldout_documents": len(corpus.heldout),
            "train_tokens": corpus.training.tokens,
            "heldout_tokens": corpus.heldout.tokens,
        },
        "mix": [asdict(part) for part in corpus.parts],
    }


def _versions() -> dict[str, str]:
    commit = provenance.commit()
    packages = ("torch", "numpy", "tokenizers", "safetensors")
    return {
        "engraphy": __version__,
        **({"commit": commit} if commit else {}),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def _settings(arms: ArmConfig, corpus: Corpus, steps: int) -> dict[str, Any]:
    train = arms.train
    return {
        "tokens": train.tokens,
        "steps": steps,
        "batch": corpus.config.batch,
        "length": corpus.config.length,
        "vocabulary": corpus.vocab_size,
        "hashed_ids": len(corpus.vocab),
        "learning_rate": train.lr,
        "row_rate_scale": train.row_rate_scale,
        "weight_decay": train.weight_decay,
        "row_std": arms.row_std,
        "rho": arms.rho,
        "dtype": train.dtype,
        "tokenizer": corpus.config.tokenizer or "BPE trained on the text",
        "heldout_share": corpus.config.heldout,
    }


def _measure(
    models: dict[str, LM], arms: dict[str, Arm], corpus: Corpus, config: ArmConfig
) -> dict[str, Any]:
    batches = corpus.heldout_batches()
    # Counts are of the whole training text, whatever part of it a run has seen.
    counts = NgramCounts(corpus.training, corpus.end_id, corpus.vocab_size)
    losses = {
        name: measure.Losses(model, batches, counts, config.train.dtype)
        for name, model in models.items()
    }
    measured = []
    for name, model in models.items():
        measured.append(
            {
                "name": name,
                "label": LABELS[name],
                "parameters": asdict(arms[name].parameters),
                "table": _table_size(model.memory),
                **losses[name].mean(),
                "loss_by_frequency": losses[name].by_bucket(),
                "continuations": _continuations(model, corpus),
            }
        )
    return {
        "arms": measured,
        "frequency": measure.frequency_table(losses["memory"]),
        "differences": {
            "moe - dense": measure.difference(losses["moe"], losses["dense"]),
            "memory - moe": measure.difference(losses["memory"], losses["moe"]),
        },
        "gates": {
            "layer": arms["memory"].memory.hash.layer_ids[0] if arms["memory"].memory else None,
            "sentences": gates_of_sentences(models["memory"], corpus, SENTENCES),
            "by_frequency": gates_by_bucket(models["memory"], batches, counts),
        },
    }


def _table_size(memory: EngramMemory | None) -> dict[str, int] | None:
    if memory is None:
        return None
    return {
        "rows": memory.config.row_count(),
        "bytes": memory.config.table_bytes(memory.format.row_bytes),
    }


def _continuations(model: LM, corpus: Corpus) -> list[dict[str, str]]:
    continuations = []
    for prompt in PROMPTS:
        ids = [corpus.end_id, *corpus.tokenizer.encode(prompt, add_special_tokens=False).ids]
        new = model.generate(ids, 32, temperature=0.7, top_k=40, seed=0, stop_id=corpus.end_id)
        continuations.append({"prompt": prompt, "text": corpus.tokenizer.decode(new)})
    return continuations


@torch.no_grad()
def _table_on_disk(model: LM, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Saves the memory, serves its table from the file, and compares logits bit for bit."""
    memory = model.memory
    if memory is None:
        raise EngraphyError("expected a model with a memory")
    ids_BT, _, starts_BT = corpus.heldout_batches()[0]
    before = model(ids_BT, starts_BT)
    if folder.exists():  # of an earlier training
        shutil.rmtree(folder)
    memory.save(folder)
    model.memory = EngramMemory.load(folder).eval()
    after = model(ids_BT, starts_BT)
    served = model.memory.stores.info
    model.memory = memory
    return {
        "logits_equal": torch.equal(before, after),
        "table": {
            "table_id": served.table_id,
            "address_digest": served.address_digest,
            "rows": memory.config.row_count(),
            "bytes": memory.config.table_bytes(served.row_bytes),
            "format": memory.format.kind,
        },
    }
