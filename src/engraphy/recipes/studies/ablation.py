"""The ablation: what each choice of a memory is worth, one change at a time, and what its size is.

Activated parameters are those of the memory arm within a percent. Totals are too, unless the size
of the table is what changes. All changes run at the memory's learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...analysis.fits import fit_line
from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import Comparison, ComparisonConfig
from .comparison_tables import validation_loss
from .rates import Runs
from .tables import head, mean_and_error, row

ROWS = (100, 320, 1000, 3200, 10_000, 32_000, 100_000)
"""Rows of each head: three decades."""
RATE_SCALES = (1.0, 2.0, 10.0)
NESTEROV_SCALES = (500.0, 5_000.0, 50_000.0)
"""Nesterov's steps are as large as gradients of rows are, which Adam's do not depend on: at equal
rates they were 10,000 times smaller."""


def _size(rows: int) -> str:
    return f"rows-{rows}"


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    memory = ArmRecipe("as the backbone has it")
    sizes = backbone.memory
    arms = {"memory": memory}

    def add(name: str, label: str, **fields: object) -> None:
        arms[name] = memory.changed(label, memory=replace(sizes, **fields))  # type: ignore[arg-type]

    depth = backbone.moe.layers
    for layer in range(depth):
        if (layer,) != sizes.layers:
            add(f"layer-{layer}", f"at layer {layer}", layers=(layer,))
    if depth > 2:
        add("two-layers", f"at layers 1 and {depth - 1}", layers=(1, depth - 1))
    for orders in ((2,), (3,), (2, 3), (2, 3, 4)):
        if orders == sizes.orders:
            continue
        # As many values are read as before, but for what does not divide. The conv follows: its
        # taps lie as far apart as the largest order.
        heads = round(len(sizes.orders) * sizes.heads / len(orders))
        dim = sizes.width // (len(orders) * heads)
        name = "-".join(map(str, orders))
        add(
            f"orders-{name}",
            f"orders {name}, {heads} heads each, rows of {dim}",
            orders=orders,
            heads=heads,
            dim=dim,
        )
    arms["uncompressed"] = memory.changed("raw ids", control="uncompressed")
    arms["plain-gate"] = memory.changed("gate without the signed root", control="plain-gate")
    if backbone.moe.streams > 1:
        arms["one-gate"] = memory.changed("one gate for all streams", control="one-gate")
    add("no-conv", "no conv", kernel=0)
    add(
        "few-heads", "half the heads, rows twice as wide", heads=sizes.heads // 2, dim=sizes.dim * 2
    )
    add(
        "many-heads",
        "twice the heads, rows half as wide",
        heads=sizes.heads * 2,
        dim=sizes.dim // 2,
    )
    arms["adagrad"] = memory.changed("row-wise Adagrad on the table", rows="adagrad")
    for scale in NESTEROV_SCALES:
        arms[f"nesterov-{scale:.0f}"] = memory.changed(
            f"Nesterov on the table, {scale:,.0f} times as fast",
            rows="nesterov",
            row_rate_scale=scale,
        )
    for scale in RATE_SCALES:
        arms[f"rate-{scale:g}"] = memory.changed(
            f"rows learn {scale:g} times as fast", row_rate_scale=scale
        )
    for rows in ROWS:
        add(_size(rows), f"{rows:,} rows of each head", rows_per_head=rows)
    return arms


def _tables(config: ComparisonConfig, runs: Runs) -> list[Iterator[str]]:
    return [_changes(config, runs), _sizes(runs)]


def _changes(config: ComparisonConfig, runs: Runs) -> Iterator[str]:
    """Each change minus the memory, paired by seed."""
    yield from head("change", "seeds", "loss more than the memory")
    memory = runs.get("memory", {})
    for name, recipe in _arms(config.base).items():
        mine = runs.get(name, {})
        seeds = sorted(mine.keys() & memory.keys())
        if name != "memory" and seeds:
            more = [validation_loss(mine[seed]) - validation_loss(memory[seed]) for seed in seeds]
            yield row(recipe.label, str(len(seeds)), mean_and_error(more))


def _sizes(runs: Runs) -> Iterator[str]:
    """Whether the loss is linear in the logarithm of the rows."""
    points = [
        (math.log10(rows), validation_loss(result), seed)
        for rows in ROWS
        for seed, result in runs.get(_size(rows), {}).items()
    ]
    if len({x for x, *_ in points}) < 3:
        yield "Too few sizes for a line."
        return
    line = fit_line(*zip(*points, strict=True))
    error = "" if line.error is None else f" ± {line.error:.4f}"
    yield (
        f"Loss over log10(rows of each head): {line.slope:+.4f}{error} nats a decade, "
        f"R2 {line.r2:.3f}."
    )


def _like(backbone: Backbone) -> Mapping[str, str]:
    return {name: "memory" for name in _arms(backbone) if name != "memory"}


ABLATION = Comparison("ablation", _arms, tables=_tables, like=_like).study
"""The ablation of a memory."""
