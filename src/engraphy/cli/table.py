"""The command `engraphy table`: verbs that parse, call one function and print.

They exit with 0 where all is done, sound or equal, else with 1.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from ..addresses.tokenizers import load_tokenizer
from ..errors import ConfigError
from ..released.convert import convert as convert_checkpoint
from ..table import inspection
from ..table import usage as usage_module
from ..table.quantize import Difference
from ..table.quantize import compare as compare_tables
from ..table.quantize import quantize as quantize_table
from ..table.table import Table
from .terminal import errors, progress

app = typer.Typer(
    no_args_is_help=True, help="Tables on disk: make, check, quantise, compare and look into them."
)

TABLE = typer.Argument(help="Folder of a sealed table.")
JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command()
def convert(
    checkpoint: Path = typer.Argument(
        help="Folder of a released DeepSeek-V4.1 or Qwen4-Exp checkpoint."
    ),
    out: Path = typer.Argument(help="Folder of the new table."),
    vocab: Path | None = typer.Option(
        None, help="A saved vocabulary map, instead of the checkpoint's tokenizer.json."
    ),
    as_json: bool = JSON,
) -> None:
    """Make a table of a released checkpoint's rows, byte for byte. Stopped, the same command
    continues."""
    with errors("the same command continues"):
        with progress() as report:
            made = convert_checkpoint(checkpoint, out, vocab_file=vocab, progress=report)
        if as_json:
            _json(made)
            return
        resumed = f", of which {made.resumed_at:,} were there" if made.resumed_at else ""
        _facts(
            {
                "table": escape(made.path),
                "table_id": made.table_id,
                "made from": f"source {made.source_id}",
                "rows": f"{made.rows:,} of {made.kind}{resumed}",
                "size": _size(made.bytes),
            }
        )


@app.command()
def quantize(
    table: Path = TABLE,
    out: Path = typer.Argument(help="Folder of the new table."),
    kind: str = typer.Option(..., help="Row format: int8, int4, fp8, bf16, f16 or f32."),
    as_json: bool = JSON,
) -> None:
    """Write a table's rows in another format, and say how much they have changed."""
    with errors("nothing is left of the new table"):
        with progress() as report:
            made = quantize_table(table, out, kind, progress=report)
        if as_json:
            _json(made)
            return
        _facts(
            {
                "table": escape(made.path),
                "table_id": made.table_id,
                "parent": made.parent,
                "size": f"{_size(made.bytes)} of {made.kind}, was {_size(made.parent_bytes)}",
            }
        )
        _differences(made.difference)


@app.command()
def verify(
    table: Path = TABLE,
    sample: int | None = typer.Option(
        None, help="Hash this many shards, drawn at random, instead of all."
    ),
    as_json: bool = JSON,
) -> None:
    """Is a table what it says? Checksums, counts from recomputed primes, headers, and rows that are
    numbers."""
    with errors("nothing was changed"):
        found = inspection.verify(table, sample)
        if as_json:
            _json(found, sound=found.sound)
        else:
            _facts(
                {
                    "table_id": found.table_id,
                    "checksums": f"{found.shards} of {found.of} shards, {_size(found.bytes)}",
                    "": "sound" if found.sound else "[red]rows that are no numbers[/]",
                }
            )
            _by_layer(
                {
                    f"layer {layer.layer}": {
                        "rows": layer.rows,
                        "primes": f"{layer.columns} from {layer.primes[0]:,} to {layer.primes[1]:,}",
                        "decoded": layer.decoded,
                        "not finite": ", ".join(map(str, layer.not_finite)) or "none",
                    }
                    for layer in found.layers
                }
            )
        if not found.sound:
            raise typer.Exit(1)


@app.command()
def compare(
    first: Path = TABLE,
    second: Path = typer.Argument(help="Folder of another one."),
    as_json: bool = JSON,
) -> None:
    """Identities of two tables, and how their rows differ as numbers. Exits with 1 where they do."""
    with errors("nothing was changed"):
        with progress() as report:
            found = compare_tables(first, second, progress=report)
        if as_json:
            _json(found, equal=found.equal)
        else:
            pairs = {
                "table_id": found.table_ids,
                "parent": found.parents,
                "row format": found.kinds,
                "address digest": tuple(digest[:32] for digest in found.address_digests),
            }
            _grid(
                {
                    "": list(pairs),
                    "first": [pair[0] for pair in pairs.values()],
                    "second": [pair[1] for pair in pairs.values()],
                }
            )
            if found.difference is None:
                Console().print(
                    "other addresses: rows of one number mean different n-grams, and are not compared"
                )
            else:
                _differences(found.difference)
        if not found.equal:
            raise typer.Exit(1)


@app.command()
def stat(
    table: Path = TABLE,
    sample: int = typer.Option(100_000, help="Rows of each layer to look at; 0 = all."),
    seed: int = typer.Option(0, help="Seed of the sample."),
    ids: Path | None = typer.Option(
        None, help="Token ids to try on the table: .npy, or numbers in a text file."
    ),
    text: Path | None = typer.Option(None, help="A text to try on the table; needs --tokenizer."),
    tokenizer: Path | None = typer.Option(None, help="The tokenizer.json of the model."),
    vocab: Path | None = typer.Option(
        None, help="A saved vocabulary map, instead of the tokenizer's."
    ),
    as_json: bool = JSON,
) -> None:
    """What is in a table, and with --ids or --text what a text does with it: rows used, n-grams
    that share one."""
    with errors("nothing was changed"):
        ids_T = _token_ids(ids, text, tokenizer)
        with progress() as report:
            layers = inspection.statistics(table, sample or None, seed, progress=report)
        used = []
        if ids_T is not None:
            opened, model = (
                Table.open(table),
                None if tokenizer is None else load_tokenizer(tokenizer),
            )
            used = usage_module.usage(opened, usage_module.find_vocab(opened, vocab, model), ids_T)
        if as_json:
            typer.echo(
                json.dumps(
                    {
                        "layers": [dataclasses.asdict(layer) for layer in layers],
                        "usage": [dataclasses.asdict(layer) for layer in used],
                    },
                    indent=2,
                )
            )
            return
        _print_statistics(layers)
        for layer in used:
            _print_usage(layer)


def _print_statistics(layers: list[inspection.LayerStatistics]) -> None:
    facts = {
        f"layer {layer.layer}": {
            "rows": layer.rows,
            "size": _size(layer.bytes),
            "on disk": _size(layer.disk_bytes),
            "looked at": layer.scanned,
            "all zero": f"{layer.zero / layer.scanned:.2%}",
            **{f"norm, {quantile:.0%}": f"{norm:.4g}" for quantile, norm in layer.norms.items()},
        }
        for layer in layers
    }
    _by_layer(facts)


def _print_usage(layer: usage_module.LayerUsage) -> None:
    heads, hot = layer.heads, layer.hottest
    Console().print(
        f"\nlayer {layer.layer}: {layer.tokens:,} tokens touch {layer.used:,} of {layer.rows:,} rows"
    )
    _grid(
        {
            "order": [head.order for head in heads],
            "head": [head.head for head in heads],
            "n-grams": [head.ngrams for head in heads],
            "rows used": [head.used for head in heads],
            "of": [head.rows for head in heads],
            "share a row": [f"{head.sharing / head.ngrams:.2%}" for head in heads],
        }
    )
    _grid(
        {
            "hottest row": [row.row for row in hot],
            "order": [row.order for row in hot],
            "head": [row.head for row in hot],
            "reads": [row.reads for row in hot],
            "n-grams": [row.ngrams for row in hot],
        }
    )


def _differences(layers: dict[int, Difference]) -> None:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    _by_layer(
        {
            f"layer {layer}": {
                "rows": found.rows,
                "different": found.different,
                "not finite": found.not_finite,
                "max abs": f"{found.max_abs:.4g}",
                "mean abs": f"{found.mean_abs:.4g}",
                "relative RMS": shown(found.relative_rms, ".4g"),
                "cosine, mean": shown(found.mean_cosine, ".6f"),
                "cosine, least": shown(found.min_cosine, ".6f"),
            }
            for layer, found in layers.items()
        }
    )


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


def _json(found: Any, **more: Any) -> None:
    typer.echo(json.dumps(dataclasses.asdict(found) | more, indent=2))


def _facts(facts: dict[str, str]) -> None:
    for name, value in facts.items():
        Console().print(f"{name:<11} {value}", soft_wrap=True, highlight=False)


def _by_layer(facts: dict[str, dict[str, Any]]) -> None:
    """One column a layer, one line a fact; a fact that a layer does not have is a dash."""
    names = list(dict.fromkeys(name for layer in facts.values() for name in layer))
    _grid(
        {"": names}
        | {layer: [found.get(name, "-") for name in names] for layer, found in facts.items()}
    )


def _grid(columns: dict[str, list[Any]]) -> None:
    grid = Grid(box=None, pad_edge=False)
    for name in columns:
        grid.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        grid.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    needed = (
        Console(width=10_000).measure(grid).maximum
    )  # where that is too wide lines break, and nothing is cut off
    Console(width=max(Console().width, needed)).print(grid)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
