"""The verb `simulate` of `engraphy machine`: a rack on a virtual clock."""

from __future__ import annotations

import dataclasses
import json
import math

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from ..errors import ConfigError
from ..plan import LAYOUTS, TIERS, Load, Shared, Simulation, block_seconds, hit_rates, layout, tier
from ..plan import simulate as run
from .arguments import JSON, parse_layers
from .terminal import errors


def simulate(
    model: str = typer.Argument(
        help=f"{', '.join(LAYOUTS)}, a model's config.json, or the folder of a model or a table."
    ),
    where: str = typer.Option(
        "cxl", "--tier", help=f"{', '.join(TIERS)}, or a file of machine probe --json."
    ),
    servers: int = typer.Option(8, help="Servers that share the tier."),
    parts: int = typer.Option(1, help="Cards of the pool, or row servers."),
    part_rate: float | None = typer.Option(
        None,
        help="Units that a part serves in a second: cache lines, pages or rows; default: no limit.",
    ),
    request_ms: float = typer.Option(0.0, help="Milliseconds of software for each batch."),
    in_flight: int | None = typer.Option(
        None, help="Reads that a server has under way at most; default: what the tier's rate needs."
    ),
    tokens_per_second: float = typer.Option(
        ..., help="Speed of a server's model without its memory, all sequences together."
    ),
    batch: int = typer.Option(64, help="Sequences of a forward."),
    tokens: int = typer.Option(1, help="Tokens of each sequence in a forward."),
    layers: str | None = typer.Option(
        None, help="Blocks with the memory, such as 1,14; default: the model's."
    ),
    hit_rate: float = typer.Option(0.0, help="Share of the rows that each server's cache has."),
    cache: str | None = typer.Option(
        None, help="Hit rates by cache size, as in machine plan; with --cache-gib."
    ),
    cache_gib: float | None = typer.Option(None, help="GiB of each server's caches, all layers."),
    copies: int = typer.Option(1, help="Parts that hold each row."),
    failed: int = typer.Option(0, help="Parts that are gone."),
    standby: str | None = typer.Option(
        None, help="Tier that has the rows of failed parts, if no part has a copy."
    ),
    hedge_ms: float = typer.Option(0.0, help="Milliseconds until a failed part is given up."),
    as_json: bool = JSON,
) -> None:
    """Say what servers lose that share a pool or row servers, and what gives way first."""
    with errors("nothing was changed"):
        sizes = layout(model)
        found = tier(where)
        if in_flight is not None:
            found = found.limited(in_flight)
        if (cache is None) != (cache_gib is None):
            raise ConfigError("expected --cache with --cache-gib, found one of them")
        if cache is not None and cache_gib is not None:
            hit_rate = hit_rates(cache, batch).rate_of(int(cache_gib * 2**30))
        result = run(
            sizes,
            found,
            Load(
                servers,
                batch,
                tokens,
                block_seconds(sizes, batch, tokens, tokens_per_second),
                hit_rate,
            ),
            Shared(
                parts,
                math.inf if part_rate is None else part_rate,
                request_ms / 1e3,
                copies,
                None if standby is None else tier(standby),
                hedge_ms / 1e3,
            ),
            layers=parse_layers(layers),
            failed=failed,
        )
        if as_json:
            typer.echo(json.dumps(_values(result), indent=2))
            return
        console = Console()
        console.print(
            f"{escape(sizes.name)}, {servers} servers on {escape(found.name)}: "
            f"{batch} x {tokens} tokens a forward of {result.forward_seconds * 1e3:.3f} ms, "
            f"hit rate {hit_rate:.1%}",
            highlight=False,
        )
        console.print(_grid(result))
        console.print(_verdict(result), highlight=False)


def _values(result: Simulation) -> dict[str, object]:
    name, used = result.tightest
    derived = {"loss": result.loss, "tightest": name, "used": used}
    return dataclasses.asdict(result) | derived


def _grid(result: Simulation) -> Grid:
    grid = Grid("block", "from the tier", "read ms", "due ms", "exposed ms", "p99 ms")
    for column in grid.columns:
        column.justify = "right"
    for layer in result.layers:
        seconds = (layer.read_seconds, layer.due_seconds, layer.exposed, layer.exposed_p99)
        times = (f"{value * 1e3:,.3f}" for value in seconds)
        grid.add_row(str(layer.layer), f"{layer.reads:,.0f}", *times)
    return grid


def _verdict(result: Simulation) -> str:
    name, used = result.tightest
    return (
        f"{result.loss:.1%} of the tokens/s lost; the longest forward took "
        f"{result.longest * 1e3:,.3f} ms; the busiest part works {result.busy:.0%} of the time\n"
        f"gives way first: {name}, used to {used:.0%}"
    )
