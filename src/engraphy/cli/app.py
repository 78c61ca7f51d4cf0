"""The command `engraphy`: one group of verbs for each noun, and the demo.

The verbs that stood here before the nouns keep their short spellings.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from .. import __version__
from .arguments import BOOKS, DATA, DTYPE, SEED, run_folder, with_books
from .data import app as data_app
from .data import smollm2
from .machine import app as machine_app
from .machine import doctor
from .model import app as model_app
from .model import finetune, generate
from .study import adapt
from .study import app as study_app
from .table import app as table_app
from .terminal import errors

app = typer.Typer(no_args_is_help=True, help="Conditional memory for Transformers.")
app.add_typer(table_app, name="table")
app.add_typer(model_app, name="model")
app.add_typer(study_app, name="study")
app.add_typer(machine_app, name="machine")
app.add_typer(data_app, name="data")

_SHORT = {  # spelling: the command, and the noun and verb that it is short for
    "finetune": (finetune, "model finetune"),
    "generate": (generate, "model generate"),
    "doctor": (doctor, "machine doctor"),
    "smollm2": (smollm2, "data smollm2"),
    "adapt-study": (adapt, "study adapt"),
}
for _name, (_function, _long) in _SHORT.items():
    app.command(_name, help=f"Short for `engraphy {_long}`.", rich_help_panel="Short spellings")(
        _function
    )


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
    # No docstring: Typer would print it in place of the help above.
    pass


@app.command()
def demo(
    data: str = DATA,
    books: Path | None = BOOKS,
    out: Path | None = typer.Option(None, help="Folder of the run; default: runs/demo-1, -2, ..."),
    vocab: int = typer.Option(2048, help="Size of the BPE vocabulary that is trained on the text."),
    tokenizer: str | None = typer.Option(None, help="A tokenizer.json to use instead."),
    seed: int = SEED,
    tokens: int = typer.Option(1_000_000, help="Training tokens of each arm."),
    resume: bool = typer.Option(False, "--resume", help="Continue a run that was interrupted."),
    dtype: str = DTYPE,
    threads: int | None = typer.Option(
        None, help="Threads of each model; default: an equal share of the CPUs."
    ),
) -> None:
    """Train a dense model, a mixture of experts, and one with a memory; report how they compare."""
    from ..data.corpus import CorpusConfig
    from ..recipes.demo import DemoConfig
    from ..recipes.demo import demo as run_demo

    with errors("continue with --resume"):
        corpus = CorpusConfig(with_books(data, books), tokenizer, vocab, seed=seed)
        folder = out or run_folder("demo", resume)
        run_demo(DemoConfig(folder, corpus, tokens, seed, dtype, resume, threads), Console())
