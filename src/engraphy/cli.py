"""The command `engraphy`: verbs that parse, call one function and print."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer
from rich.console import Console

from . import __version__
from . import doctor as doctor_module
from .table_cli import app as table_app
from .terminal import errors

app = typer.Typer(no_args_is_help=True, help="Conditional memory for Transformers.")
app.add_typer(table_app, name="table")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engraphy {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


@app.command()
def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """What this installation and machine have to offer. Exits with 1 when ENGRAPHY_NATIVE demands what is not there."""
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
    out: Path | None = typer.Option(None, help="Folder of the run; by default runs/demo-1, -2, ..."),
    vocab: int = typer.Option(2048, help="Size of the BPE vocabulary that is trained on the text."),
    tokenizer: str | None = typer.Option(None, help="A tokenizer.json to use instead."),
    seed: int = typer.Option(0, help="Seed of weights, order and split."),
    tokens: int = typer.Option(1_000_000, help="Training tokens of each arm."),
    resume: bool = typer.Option(False, "--resume", help="Continue a run that was interrupted."),
) -> None:
    """Train a dense model, a mixture of experts, and one with a memory; compare them and write a report."""
    from .recipes.corpus import CorpusConfig
    from .recipes.demo import DemoConfig
    from .recipes.demo import demo as run_demo

    with errors("continue with --resume"):
        corpus = CorpusConfig(data, tokenizer, vocab, seed=seed)
        run_demo(DemoConfig(out or _run_folder(resume), corpus, tokens, seed, resume=resume), Console())


@app.command()
def study(
    out: Path = typer.Option(Path("results/demo"), help="Folder of the result files."),  # noqa: B008
    work: Path = typer.Option(Path("runs/study"), help="Folder of corpora and checkpoints."),  # noqa: B008
    data: str = typer.Option("wiki", help="wiki, hf:NAME, or a text file or folder."),
    seeds: int = typer.Option(3, help="Number of seeds: 0, 1, ... The first chooses the learning rates."),
    tokens: int = typer.Option(1_000_000, help="Training tokens of each run."),
    workers: int = typer.Option(os.cpu_count() or 1, help="Runs at a time, one thread each."),
) -> None:
    """The demo's arms and a one-row control over seeds and learning rates; resumes where it stopped."""
    from .recipes import study as recipe
    from .recipes.tables import tables

    with errors("the same command continues"):
        config = recipe.StudyConfig(tuple(range(seeds)), tokens, data)
        recipe.study(config, out, work, workers, typer.echo)
        typer.echo(tables(config, out))


def _run_folder(resume: bool) -> Path:
    """The newest of runs/demo-N to resume, else the next one, which is free."""
    taken = [int(path.name.partition("-")[2]) for path in Path("runs").glob("demo-*") if path.name[5:].isdigit()]
    return Path("runs") / f"demo-{max(taken, default=0) + (not (resume and taken))}"
