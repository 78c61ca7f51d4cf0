"""What `engraphy table` prints about tables."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import typer
from rich.console import Console

from ..released.checkpoint import Checkpoint
from ..table import inspection
from ..table.quantize import Comparison, Difference
from ..table.usage import LayerUsage
from .terminal import grid


def print_release(checkpoint: Checkpoint, as_json: bool) -> None:
    """A released checkpoint: which tensors are its table, and what was assumed."""
    if not as_json:
        Console().print(checkpoint.describe(), soft_wrap=True, highlight=False, markup=False)
        return
    tensors = {layer: [part.name for part in parts] for layer, parts in checkpoint.weights.items()}
    facts = {
        "source_id": checkpoint.source_id,
        "config": checkpoint.config.to_json(),
        "row_format": checkpoint.fmt.to_json(),
        "tensors": tensors,
        "assumed": checkpoint.assumed,
    }
    typer.echo(json.dumps(facts, indent=2))


def print_verified(result: inspection.Verification) -> None:
    """The outcome of a check, layer by layer."""
    print_facts(
        {
            "table_id": result.table_id,
            "checksums": f"{result.shards} of {result.of} shards, {size(result.bytes)}",
            "": "sound" if result.sound else "[red]some rows are not numbers[/]",
        }
    )
    facts = {}
    for layer in result.layers:
        least, most = layer.primes
        facts[f"layer {layer.layer}"] = {
            "rows": layer.rows,
            "primes": f"{layer.columns} from {least:,} to {most:,}",
            "decoded": layer.decoded,
            "not finite": ", ".join(map(str, layer.not_finite)) or "none",
        }
    _by_layer(facts)


def print_comparison(result: Comparison) -> None:
    """How two tables differ."""
    pairs = {
        "table_id": result.table_ids,
        "parent": result.parents,
        "row format": result.kinds,
        "address digest": tuple(digest[:32] for digest in result.address_digests),
    }
    firsts = [pair[0] for pair in pairs.values()]
    seconds = [pair[1] for pair in pairs.values()]
    grid({"": list(pairs), "first": firsts, "second": seconds})
    if result.difference is None:
        Console().print(
            "not compared: the addresses differ, so a row number means other n-grams in each"
        )
    else:
        print_differences(result.difference)


def print_statistics(layers: list[inspection.LayerStatistics]) -> None:
    """What is in a table, one column a layer."""
    facts = {
        f"layer {layer.layer}": {
            "rows": layer.rows,
            "size": size(layer.bytes),
            "on disk": size(layer.disk_bytes),
            "sampled": layer.scanned,
            "all zero": f"{layer.zero / layer.scanned:.2%}",
            **{f"norm, {quantile:.0%}": f"{norm:.4g}" for quantile, norm in layer.norms.items()},
        }
        for layer in layers
    }
    _by_layer(facts)


def print_usage(layer: LayerUsage) -> None:
    """The rows of a layer that a text uses and shares."""
    heads, hot = layer.heads, layer.hottest
    Console().print(
        f"\nlayer {layer.layer}: "
        f"{layer.tokens:,} tokens touch {layer.used:,} of {layer.rows:,} rows"
    )
    grid(
        {
            "order": [head.order for head in heads],
            "head": [head.head for head in heads],
            "n-grams": [head.ngrams for head in heads],
            "rows used": [head.used for head in heads],
            "of": [head.rows for head in heads],
            "share a row": [f"{head.sharing / head.ngrams:.2%}" for head in heads],
        }
    )
    grid(
        {
            "hottest row": [row.row for row in hot],
            "order": [row.order for row in hot],
            "head": [row.head for row in hot],
            "reads": [row.reads for row in hot],
            "n-grams": [row.ngrams for row in hot],
        }
    )


def print_differences(layers: dict[int, Difference]) -> None:
    """Differences of rows as numbers, one column a layer."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else f"{value:{form}}"

    _by_layer(
        {
            f"layer {layer}": {
                "rows": difference.rows,
                "different": difference.different,
                "not finite": difference.not_finite,
                "max abs": f"{difference.max_abs:.4g}",
                "mean abs": f"{difference.mean_abs:.4g}",
                "relative RMS": shown(difference.relative_rms, ".4g"),
                "cosine, mean": shown(difference.mean_cosine, ".6f"),
                "cosine, least": shown(difference.min_cosine, ".6f"),
            }
            for layer, difference in layers.items()
        }
    )


def print_json(result: Any, **more: Any) -> None:
    """A record and more fields, as JSON."""
    typer.echo(json.dumps(dataclasses.asdict(result) | more, indent=2))


def print_facts(facts: dict[str, str]) -> None:
    """One line a fact."""
    for name, value in facts.items():
        Console().print(f"{name:<11} {value}", soft_wrap=True, highlight=False)


def _by_layer(facts: dict[str, dict[str, Any]]) -> None:
    """Print one column a layer and one line a fact; a fact that a layer lacks is a dash."""
    names = list(dict.fromkeys(name for layer in facts.values() for name in layer))
    columns: dict[str, list[Any]] = {"": list(names)}
    for layer, values in facts.items():
        columns[layer] = [values.get(name, "-") for name in names]
    grid(columns)


def size(count: float) -> str:
    """Bytes as text, to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
