"""The verbs `plan` and `probe` of `engraphy machine`: where a table may lie, and its cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from ..plan import LAYOUTS, TIERS, HitRates, Plan, hit_rates, layout, tier
from ..plan import plan as make_plan
from ..plan.probe import SIZE, THREADS, Probe, measure
from ..system.files import write_file
from .arguments import JSON
from .terminal import errors


def plan(
    model: str = typer.Argument(
        help=f"{', '.join(LAYOUTS)}, a model's config.json, or the folder of a model or a table."
    ),
    where: str = typer.Option(
        "nvme",
        "--tier",
        help=f"{', '.join(TIERS)}, or a file of machine probe --json.",
    ),
    tokens_per_second: float | None = typer.Option(
        None, help="Speed of the model without its memory, all sequences together."
    ),
    block_ms: float | None = typer.Option(
        None, help="Milliseconds of one block, instead of --tokens-per-second."
    ),
    batch: int = typer.Option(1, help="Sequences of a forward."),
    tokens: int = typer.Option(
        1, help="Tokens of each sequence in a forward: 1 decodes, more are a chunk of a prompt."
    ),
    hit_rate: float | None = typer.Option(
        None, help="Share of the rows that a cache has, 0 to 1; default: 0, no cache."
    ),
    cache: str | None = typer.Option(
        None,
        help="Hit rates by cache size: wiki, code, a JSON file of bytes and rates, or a result of "
        "bench/hit_rate.py.",
    ),
    row_kind: str | None = typer.Option(
        None, help="Rows are stored as bf16, fp8, int8, int4, ...; default: as released."
    ),
    blocks: int | None = typer.Option(None, help="Blocks of the model; needed for a table."),
    as_json: bool = JSON,
) -> None:
    """Say whether reading rows hides behind the blocks of a model, and what cache to give."""
    with errors("nothing was changed"):
        planned = make_plan(
            layout(model, blocks=blocks, row_kind=row_kind),
            tier(where),
            batch=batch,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            block_seconds=None if block_ms is None else block_ms / 1e3,
            hit_rate=0.0 if hit_rate is None else hit_rate,
        )
        rates = None if cache is None else hit_rates(cache, batch)
        if as_json:
            typer.echo(json.dumps(plan_values(planned, rates), indent=2))
            return
        console = Console()
        console.print(_facts(planned, rates))
        console.print(_layers(planned))
        console.print(_verdict(planned))


def probe(
    path: Path = typer.Argument(
        help="A file, which is read; or a folder, for a scratch file or for the table in it."
    ),
    gib: float = typer.Option(SIZE / 2**30, help="GiB of the scratch file."),
    threads: int = typer.Option(THREADS, help="Reads under way at a time, at most."),
    out: Path | None = typer.Option(
        None, "--json", help="Write what was measured to this file, for machine plan --tier."
    ),
) -> None:
    """Measure random reads of 4 KiB where a table lies, or may come to lie."""
    with errors("the scratch file was removed"):
        say = Console(stderr=True).print
        found = measure(path, size=int(gib * 2**30), threads=threads, say=say)
        if out is not None:
            write_file(out, json.dumps(found.to_json(), indent=2) + "\n")
        console = Console()
        reader = "native" if found.native else "plain"
        console.print(
            f"{escape(found.path)}: {escape(found.file)} of {found.bytes / 2**30:.2f} GiB; "
            f"{found.how}; {reader} reader, up to {found.threads} threads"
        )
        console.print(_batches(found))


def _batches(found: Probe) -> Grid:
    grid = Grid("reads a batch", "batches", "p50 ms", "p90 ms", "p99 ms", "reads/s", "MB/s")
    for column in grid.columns:
        column.justify = "right"
    for item in found.batches:
        grid.add_row(
            f"{item.reads:,}",
            f"{item.rounds:,}",
            *(_ms(seconds) for seconds in (item.seconds, item.p90, item.p99)),
            f"{item.rate:,.0f}",
            f"{item.rate * 4096 / 1e6:,.1f}",
        )
    return grid


def plan_values(planned: Plan, rates: HitRates | None) -> dict[str, Any]:
    """A plan as plain JSON values. Times are seconds, sizes bytes."""
    needed = planned.hit_rate_to_hide
    return {
        "layout": planned.layout.name,
        "rows_per_token": planned.layout.rows_per_token,
        "row_bytes": planned.layout.row_bytes,
        "table_bytes": planned.layout.table_bytes,
        "token_bytes": planned.token_bytes,
        "token_bytes_least": planned.token_bytes_least,
        "token_bytes_mean": planned.token_bytes_mean,
        "tier": planned.tier.name,
        "batch": planned.batch,
        "tokens": planned.tokens,
        "hit_rate": planned.hit_rate,
        "block_seconds": planned.block_seconds,
        "forward_seconds": planned.forward_seconds,
        "layers": [
            {
                "layer": layer.layer,
                "rows": layer.rows,
                "reads": layer.reads,
                "read_seconds": layer.read_seconds,
                "window_seconds": layer.window,
                "exposed_seconds": layer.exposed,
            }
            for layer in planned.layers
        ],
        "exposed_seconds": planned.exposed,
        "loss": planned.loss,
        "synchronous_seconds": planned.synchronous,
        "synchronous_loss": planned.synchronous_loss,
        "hit_rate_to_hide": needed,
        "cache_bytes": None if rates is None else rates.size_for(needed),
    }


def _facts(planned: Plan, rates: HitRates | None) -> Grid:
    sizes = planned.layout
    grid = Grid(show_header=False, box=None, pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("model", f"{escape(sizes.name)}: {escape(sizes.source)}")
    layers = ", ".join(map(str, sizes.layers))
    grid.add_row(
        "memory",
        f"{_bytes(sizes.table_bytes)} ({sizes.table_bytes / 2**30:.1f} GiB) of "
        f"{sizes.row_format.kind} rows, read by blocks {layers} of {sizes.blocks}",
    )
    grid.add_row("a token", _token_in_words(planned))
    grid.add_row("tier", f"{escape(planned.tier.name)}: {escape(planned.tier.source)}")
    shape = f"{planned.batch} x {planned.tokens} tokens"
    speed = planned.batch * planned.tokens / planned.forward_seconds
    grid.add_row(
        "a forward",
        f"{shape} in {_time(planned.forward_seconds)}, {speed:,.0f} tokens/s, "
        f"{_time(planned.block_seconds)} a block",
    )
    grid.add_row("hit rate", _hit_rate_in_words(planned))
    if rates is not None and planned.hit_rate_to_hide > 0.0:
        grid.add_row("cache", _cache_in_words(planned, rates))
    return grid


def _token_in_words(planned: Plan) -> str:
    sizes = planned.layout
    words = f"{sizes.rows_per_token} rows of {sizes.row_bytes} bytes, {_bytes(planned.token_bytes)}"
    unit = planned.tier.unit
    if not unit:
        return words
    pages = {4096: "4 KiB pages", 64: "cache lines"}.get(unit, f"units of {unit} bytes")
    least = _bytes(planned.token_bytes_least)
    return f"{words}; at least {least} in {pages}, {_bytes(planned.token_bytes_mean)} on average"


def _hit_rate_in_words(planned: Plan) -> str:
    needed = planned.hit_rate_to_hide
    if needed == 0.0:
        return "all reads hide without a cache"
    return f"reads hide from a hit rate of {needed:.1%} on; planned with {planned.hit_rate:.1%}"


def _cache_in_words(planned: Plan, rates: HitRates) -> str:
    size = rates.size_for(planned.hit_rate_to_hide)
    if size is None:
        largest, best = rates.points[-1]
        return f"no cache of {rates.name} hits so often: {_bytes(largest)} has {best:.1%}"
    url = f"cache={size // len(planned.layers) >> 20}MiB"
    return (
        f"{_bytes(size)} in all, {planned.cached_rows(size):,} rows, {url} in the URL of each "
        f"layer: hits {rates.rate_of(size):.1%} ({escape(rates.source)})"
    )


def _layers(planned: Plan) -> Grid:
    grid = Grid("block", "rows", "from the tier", "read ms", "window ms", "exposed ms")
    for column in grid.columns:
        column.justify = "right"
    for layer in planned.layers:
        grid.add_row(
            str(layer.layer),
            f"{layer.rows:,}",
            f"{layer.reads:,.0f}",
            _ms(layer.read_seconds),
            _ms(layer.window),
            _ms(layer.exposed),
        )
    return grid


def _verdict(planned: Plan) -> str:
    hidden = "all reads hide" if planned.exposed == 0.0 else "not all reads hide"
    return (
        f"read ahead: {hidden}, {_ms(planned.exposed)} ms exposed of a forward, "
        f"{planned.loss:.1%} of the tokens/s lost\n"
        f"read in the blocks: {_ms(planned.synchronous)} ms exposed, "
        f"{planned.synchronous_loss:.1%} lost"
    )


def _bytes(size: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= limit:
            return f"{size / limit:.1f} {unit}"
    return f"{size:.0f} B"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}" if seconds < 0.1 else f"{seconds * 1e3:,.1f}"


def _time(seconds: float) -> str:
    return f"{_ms(seconds)} ms" if seconds < 1 else f"{seconds:,.2f} s"
