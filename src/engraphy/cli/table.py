"""The command `engraphy table`: verbs that parse, call one function and print.

They exit with 0 if all is done, sound or equal, else with 1.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import typer
from rich.markup import escape

from ..addresses.addresser import Addresser
from ..addresses.ngrams import Ngrams
from ..addresses.tokenizers import load_tokenizer
from ..errors import ConfigError
from ..released.checkpoint import Checkpoint
from ..released.convert import convert as convert_checkpoint
from ..released.rows import is_release, open_rows
from ..released.sample import RELEASES, write_sample
from ..store.extending import write_extended
from ..store.group import StoreGroup
from ..store.pool_file import is_pool_file, read_header, verify_pool
from ..store.publish import publish_pool
from ..table import inspection
from ..table import usage as usage_module
from ..table.quantize import compare as compare_tables
from ..table.quantize import quantize as quantize_table
from ..table.table import Table
from .arguments import JSON
from .serving import ask, serve
from .sharing import find_sharing, is_config, print_sharing
from .table_output import (
    print_comparison,
    print_differences,
    print_facts,
    print_json,
    print_release,
    print_statistics,
    print_usage,
    print_verified,
    size,
)
from .terminal import errors, progress

app = typer.Typer(
    no_args_is_help=True, help="Tables on disk: make, check, quantise, compare and look into them."
)

app.command()(serve)
app.command()(ask)

TABLE = typer.Argument(help="Folder of a sealed table.")
EITHER = "Folder of a sealed table or of a released checkpoint, or a GGUF file."


@app.command()
def convert(
    checkpoint: Path = typer.Argument(
        help="Folder of a released DeepSeek-V4.1 or Qwen4-Exp checkpoint, or its GGUF file."
    ),
    out: Path = typer.Argument(help="Folder of the new table."),
    vocab: Path | None = typer.Option(
        None, help="A saved vocabulary map, instead of the checkpoint's tokenizer.json."
    ),
    kind: str | None = typer.Option(
        None, "--format", help="Row format of the table; by default that of the checkpoint."
    ),
    as_json: bool = JSON,
) -> None:
    """Make a table from a released checkpoint, byte for byte; it continues if it was stopped."""
    with errors("the same command continues"):
        with progress() as report:
            made = convert_checkpoint(checkpoint, out, vocab_file=vocab, kind=kind, progress=report)
        if as_json:
            print_json(made)
            return
        resumed = f", {made.resumed_at:,} of them from an earlier run" if made.resumed_at else ""
        print_facts(
            {
                "table": escape(made.path),
                "table_id": made.table_id,
                "made from": f"source {made.source_id}",
                "rows": f"{made.rows:,} of {made.kind}{resumed}",
                "size": size(made.bytes),
            }
        )


@app.command()
def quantize(
    table: Path = TABLE,
    out: Path = typer.Argument(help="Folder of the new table."),
    kind: str = typer.Option(
        ..., help="Row format: int8, int4, q8_0, q4_0, fp8, bf16, f16 or f32."
    ),
    as_json: bool = JSON,
) -> None:
    """Write the rows of a table in another format, and show how much they change."""
    with errors("nothing is left of the new table"):
        with progress() as report:
            made = quantize_table(table, out, kind, progress=report)
        if as_json:
            print_json(made)
            return
        print_facts(
            {
                "table": escape(made.path),
                "table_id": made.table_id,
                "parent": made.parent,
                "size": f"{size(made.bytes)} of {made.kind}, was {size(made.parent_bytes)}",
            }
        )
        print_differences(made.difference)


@app.command()
def hot(
    table: Path = TABLE,
    counts: Path = typer.Argument(help="N-grams that `engraphy data ngrams` counted."),
    out: Path = typer.Argument(help="Folder of the new table."),
    top: int | None = typer.Option(None, help="Only so many n-grams of each order."),
    tokenizer: Path | None = typer.Option(None, help="The tokenizer.json of the model."),
    vocab: Path | None = typer.Option(
        None, help="A saved vocabulary map, instead of the tokenizer's."
    ),
    as_json: bool = JSON,
) -> None:
    """Give frequent n-grams rows of their own, in a new table that reads as the old one does."""
    with errors("what is left of the new table is not sealed: remove it"):
        source = Table.open(table)
        model_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        vocab_map = usage_module.find_vocab(source, vocab, model_tokenizer)
        ngrams = Ngrams.load(counts)
        addresser = Addresser(source.config.hash, vocab_map, source.hot)
        with StoreGroup.of_table(source, source.layers) as stores, progress() as report:
            write_extended(
                stores,
                source.config,
                addresser,
                ngrams if top is None else ngrams.top(top),
                out,
                progress=report,
            )
        made = Table.open(out)
        hot_spec = made.config.hot
        slots = 0 if hot_spec is None else hot_spec.slots
        facts = {
            "table": str(out),
            "table_id": made.table_id,
            "parent": str(made.parent),
            "hot": f"{slots:,} n-grams, {made.config.hot_rows:,} rows in each layer",
        }
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
            return
        print_facts({name: escape(text) for name, text in facts.items()})


@app.command()
def publish(
    table: Path = TABLE,
    pool: Path = typer.Argument(
        help="File that all processes will map, in /dev/shm say; or a memfd, or a DAX device."
    ),
    as_json: bool = JSON,
) -> None:
    """Publish a table as a pool, one copy for all processes; again, as the pool's next epoch."""
    with errors("the pool is as it was; a memfd or a device has to be published again"):
        with progress() as report:
            header = publish_pool(table, pool, progress=report)
        if as_json:
            made = {"pool": str(pool), "table_id": header.table_id, "epoch": header.epoch}
            typer.echo(json.dumps(made | {"bytes": header.size}, indent=2))
            return
        print_facts(
            {
                "pool": escape(str(pool)),
                "epoch": str(header.epoch),
                "table_id": header.table_id,
                "layers": ", ".join(map(str, header.layers)),
                "size": size(header.size),
            }
        )


@app.command()
def verify(
    table: Path = typer.Argument(help="Folder of a sealed table, or a pool that was published."),
    sample: int | None = typer.Option(
        None, help="Hash this many shards, drawn at random, instead of all."
    ),
    as_json: bool = JSON,
) -> None:
    """Check a table: checksums, row counts, headers, and that all rows are numbers."""
    with errors("nothing was changed"):
        if is_pool_file(table):
            _verify_pool(table, as_json)
            return
        result = inspection.verify(table, sample)
        if as_json:
            print_json(result, sound=result.sound)
        else:
            print_verified(result)
        if not result.sound:
            raise typer.Exit(1)


@app.command()
def compare(
    first: Path = typer.Argument(help=EITHER),
    second: Path = typer.Argument(help="Another one."),
    as_json: bool = JSON,
) -> None:
    """Show how two tables differ: identities, and rows as numbers. Exits with 1 if they differ."""
    with errors("nothing was changed"):
        with progress() as report:
            result = compare_tables(open_rows(first), open_rows(second), progress=report)
        if as_json:
            print_json(result, equal=result.equal)
        else:
            print_comparison(result)
        if not result.equal:
            raise typer.Exit(1)


@app.command()
def stat(
    table: Path = typer.Argument(help=f"{EITHER} With --ngrams also a model's config.json."),
    sample: int = typer.Option(100_000, help="Rows of each layer to look at; 0 = all."),
    seed: int = typer.Option(0, help="Seed of the sample."),
    ids: Path | None = typer.Option(
        None, help="Token ids to try on the table: .npy, or numbers in a text file."
    ),
    text: Path | None = typer.Option(None, help="A text to try on the table; needs --tokenizer."),
    ngrams: Path | None = typer.Option(
        None, help="Frequent n-grams, from `engraphy data ngrams`: which of them share rows?"
    ),
    top: int | None = typer.Option(None, help="Only so many of these n-grams of each order."),
    tokenizer: Path | None = typer.Option(None, help="The tokenizer.json of the model."),
    vocab: Path | None = typer.Option(
        None, help="A saved vocabulary map, instead of the tokenizer's."
    ),
    as_json: bool = JSON,
) -> None:
    """Show what is in a table, and with --ids or --text which rows a text uses and shares.

    With --ngrams it shows which frequent n-grams share rows. That needs the layout alone, which a
    checkpoint, a GGUF file or a config.json describes too.

    Of a checkpoint or a GGUF file it shows which tensors are its table, and what was assumed.
    """
    with errors("nothing was changed"):
        if ngrams is not None:
            if ids is not None or text is not None:
                raise ConfigError("expected --ngrams, or --ids or --text, found both")
            found, wording = find_sharing(table, ngrams, top, vocab, tokenizer)
            if as_json:
                parts = [dataclasses.asdict(part) for part in found]
                typer.echo(json.dumps({"sharing": parts}, indent=2))
            else:
                print_sharing(found, wording)
            return
        if is_config(table):
            raise ConfigError(f"{table}: expected --ngrams with a config.json, which has no rows")
        if is_release(table):
            if ids is not None or text is not None:
                raise ConfigError(f"{table}: expected a table with --ids or --text: convert it")
            print_release(Checkpoint.open(table), as_json)
            return
        ids_T = _token_ids(ids, text, tokenizer)
        with progress() as report:
            layers = inspection.statistics(table, sample or None, seed, progress=report)
        used = [] if ids_T is None else _usage(table, ids_T, vocab, tokenizer)
        if as_json:
            statistics = [dataclasses.asdict(layer) for layer in layers]
            usage = [dataclasses.asdict(layer) for layer in used]
            typer.echo(json.dumps({"layers": statistics, "usage": usage}, indent=2))
            return
        print_statistics(layers)
        for layer in used:
            print_usage(layer)


@app.command()
def sample(
    out: Path = typer.Argument(help="New folder of the checkpoint."),
    release: str = typer.Option("deepseek_v41", help=f"{', '.join(RELEASES)}."),
    rows_per_head: int = typer.Option(3000, help="Least rows of a head."),
    seed: int = typer.Option(0, help="Seed of the rows."),
) -> None:
    """Write a small made-up checkpoint in the files of a release, to try the other verbs on."""
    with errors("nothing was written"):
        typer.echo(write_sample(out, release, rows_per_head, seed))


def _usage(
    path: Path, ids_T: np.ndarray, vocab: Path | None, tokenizer: Path | None
) -> list[usage_module.LayerUsage]:
    table = Table.open(path)
    model_tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
    vocab_map = usage_module.find_vocab(table, vocab, model_tokenizer)
    return usage_module.usage(table, vocab_map, ids_T)


def _verify_pool(pool: Path, as_json: bool) -> None:
    """Hashes all shards; whether the rows are numbers was the table's matter."""
    checked = verify_pool(pool)
    table_id = read_header(pool).table_id
    if as_json:
        print_json(checked, table_id=table_id, sound=True)
        return
    shards = f"{checked.shards} of {checked.of} shards, {size(checked.bytes)}"
    print_facts({"table_id": table_id, "checksums": shards, "": "sound"})


def _token_ids(ids: Path | None, text: Path | None, tokenizer: Path | None) -> np.ndarray | None:
    if ids is not None and text is not None:
        raise ConfigError("expected --ids or --text, found both")
    if text is not None and tokenizer is None:
        raise ConfigError("--text: expected --tokenizer with it, found none")
    path = text or ids
    if path is None:
        return None
    try:
        if text is not None and tokenizer is not None:
            encoded = load_tokenizer(tokenizer).encode(
                text.read_text(encoding="utf-8-sig"), add_special_tokens=False
            )
            return np.array(encoded.ids, np.int64)
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return np.array(path.read_text(encoding="utf-8-sig").split(), np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{path}: expected {'text' if text else 'token ids'}, found something else "
            f"({type(error).__name__}: {error})"
        ) from None
