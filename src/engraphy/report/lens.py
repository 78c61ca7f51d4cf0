"""The values of LogitLens on the page of an inspection: a cell for each layer and token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .markup import fixed, number, signed
from .tokens import Piece, visible

Report = Mapping[str, Any]

_SHOWN = 0.98  # share of the cells that the colour scale tells apart


@dataclass(frozen=True)
class Cell:
    """A layer at a token, in three views: with the memory, without it, and the difference.

    Attributes:
        on: What the layer finds likeliest with the memory.
        off: What it finds likeliest without.
        titles: What hovering shows in each view.
        shares: Its colour in each view, in percent; of the difference from -100 to 100.
    """

    on: Sequence[Piece]
    off: Sequence[Piece]
    titles: Sequence[str]
    shares: Sequence[int]

    @property
    def joined_shares(self) -> str:
        """Shares divided by a bar, for the script."""
        return "|".join(map(str, self.shares))


@dataclass(frozen=True)
class Line:
    """A layer.

    Attributes:
        layer: Its number.
        before: True if it lies before the memory.
        memory: True if a memory is added before its block.
        on: Mean KL with the memory.
        off: Mean KL without it.
        cells: One a token.
    """

    layer: str
    before: bool
    memory: bool
    on: str
    off: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Lens:
    """The lens of a text.

    Attributes:
        tokens: The pieces of each token.
        lines: One a layer, from the first to the last.
        high: The KL at the end of the scale; 2 % of the cells may lie beyond.
        high_difference: The same of the differences.
        summary: Where the memory brings layers closer to the end, in one sentence.
    """

    tokens: Sequence[Sequence[Piece]]
    lines: Sequence[Line]
    high: str
    high_difference: str
    summary: str


def lens(report: Report) -> Lens:
    """Returns the values of LogitLens.

    Args:
        report: An inspection in format "engraphy-inspection-1".
    """
    tokens = report["tokens"]
    layers = range(len(report["before_memory"]))
    cells = [cell for token in tokens for cell in (*token["lens_on"], *token["lens_off"])]
    high = _most([cell["kl"] for cell in cells])
    most = _most([abs(_gap(token, layer)) for token in tokens for layer in layers])
    lines = []
    for layer in layers:
        on = [token["lens_on"][layer]["kl"] for token in tokens]
        off = [token["lens_off"][layer]["kl"] for token in tokens]
        lines.append(
            Line(
                number(layer),
                report["before_memory"][layer],
                layer in report["layers"],
                fixed(_mean(on), 2),
                fixed(_mean(off), 2),
                [_cell(token, layer, high, most) for token in tokens],
            )
        )
    shown = [visible(token["text"]).pieces for token in tokens]
    return Lens(shown, lines, fixed(high, 1), fixed(most, 1), _summary(report))


def _cell(token: Report, layer: int, high: float, most: float) -> Cell:
    on, off = token["lens_on"][layer], token["lens_off"][layer]
    gap = _gap(token, layer)
    where = f"after layer {layer}, at {token['text']!r}"
    titles = (
        f"{where}: {on['top']!r} is likeliest, KL {fixed(on['kl'], 2)} nats to the end",
        f"{where}, without the memory: {off['top']!r} is likeliest, "
        f"KL {fixed(off['kl'], 2)} nats to the end",
        f"{where}: KL {signed(gap, 2)} nats with the memory ({on['top']!r}, "
        f"without {off['top']!r})",
    )
    shares = (
        _percent(on["kl"], high),
        _percent(off["kl"], high),
        _percent(-gap, most),
    )
    return Cell(visible(on["top"]).pieces, visible(off["top"]).pieces, titles, shares)


def _gap(token: Report, layer: int) -> float:
    """KL with the memory, minus KL without it."""
    return token["lens_on"][layer]["kl"] - token["lens_off"][layer]["kl"]


def _percent(value: float, high: float) -> int:
    if high <= 0:
        return 0
    return max(-100, min(100, round(100 * value / high)))


def _most(values: Sequence[float]) -> float:
    """The end of a scale: a single cell far above all others would leave them white."""
    ranked = sorted(values)
    return ranked[math.ceil(_SHOWN * (len(ranked) - 1))]


def _summary(report: Report) -> str:
    tokens = report["tokens"]
    means = {
        layer: _mean([_gap(token, layer) for token in tokens])
        for layer, before in enumerate(report["before_memory"])
        if not before and layer + 1 < len(report["before_memory"])
    }
    if not means:
        return "No layer lies between the memory and the end."
    closer = [layer for layer, mean in means.items() if mean < 0]
    best = min(means, key=lambda layer: means[layer])
    if not closer:
        return "In this text no layer comes closer to the end with the memory, on average."
    return (
        f"Of the layers between the memory and the end, {len(closer)} of {len(means)} are closer "
        f"to it with the memory, on average; layer {best} most ({signed(means[best], 2)} nats). "
        "Layers before the memory differ only because the end differs."
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
