"""A line chart over sizes in bytes, or over numbers, as an SVG file of its own: for pages that are
no report.

The x axis is logarithmic. Lines differ in colour and in dashes, and each is labelled at its end.
Colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import esc
from .scales import Axis, apart

_WIDTH = 760  # px
_HEIGHT = 400  # px
_LEFT = 56  # px for the values of the y axis
_RIGHT = 176  # px for the labels of the lines
_DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 5")
STYLE = """
text { font: 13px -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1b1d21; }
.muted { fill: #5b616c; }
.grid { stroke: #e4e0d9; }
.dot { stroke-width: 3; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.c0 { stroke: #0b66b0; } .c1 { stroke: #c2410c; } .c2 { stroke: #646b77; }
.c3 { stroke: #7a3fa0; } .c4 { stroke: #2f7d4f; }
text.c0, text.c1, text.c2, text.c3, text.c4 { stroke: none; font-weight: 600; }
text.c0 { fill: #0b66b0; } text.c1 { fill: #c2410c; } text.c2 { fill: #646b77; }
text.c3 { fill: #7a3fa0; } text.c4 { fill: #2f7d4f; }
@media (prefers-color-scheme: dark) {
  svg { background: #14161a; }
  text { fill: #e9e7e3; } .muted { fill: #a3a9b4; } .grid { stroke: #30353d; }
  .c0 { stroke: #5eb4f2; } .c1 { stroke: #ff9b52; } .c2 { stroke: #a9afba; }
  .c3 { stroke: #c79bea; } .c4 { stroke: #7bd19d; }
  text.c0 { fill: #5eb4f2; } text.c1 { fill: #ff9b52; } text.c2 { fill: #a9afba; }
  text.c3 { fill: #c79bea; } text.c4 { fill: #7bd19d; }
}
"""


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        label: What stands at its end.
        sizes: MiB of each point, or numbers, ascending, above 0.
        shares: Shares of 1 at the points.
    """

    label: str
    sizes: Sequence[float]
    shares: Sequence[float]


def share_by_size(title: str, lines: Sequence[Line], x_unit: str, y_unit: str) -> str:
    """Draws shares of 1 over sizes in MiB.

    Args:
        title: What the chart shows, for those who cannot see it.
        lines: One to five lines.
        x_unit: What the sizes are.
        y_unit: What the shares are.

    Returns:
        The SVG, a whole file.
    """
    x = _logarithmic(lines)
    y = Axis(0, 1, _HEIGHT - 48, 28)
    heights = [(percent / 100, f"{percent} %") for percent in range(0, 101, 20)]
    powers = range(math.ceil(x.low), math.floor(x.high) + 1, 4)
    marks = [(float(power), binary_size(2.0**power)) for power in powers]
    return _drawn(title, lines, x, y, _frame(x, y, marks, heights, x_unit, y_unit))


def share_by_number(title: str, lines: Sequence[Line], x_unit: str, y_unit: str) -> str:
    """Draws shares over numbers, from 0 to the largest share.

    Args:
        title: What the chart shows, for those who cannot see it.
        lines: One to five lines.
        x_unit: What the numbers are.
        y_unit: What the shares are.

    Returns:
        The SVG, a whole file.
    """
    x = _logarithmic(lines)
    most = max(0.01, *(share for line in lines for share in line.shares))
    y = Axis(0, most, _HEIGHT - 48, 28)
    heights = [(value / 100, f"{label} %") for value, label in Axis(0, 100 * most, 0, 1).ticks(6)]
    step = max(1, math.ceil((x.high - x.low) / 10))
    powers = range(math.ceil(x.low), math.floor(x.high) + 1, step)
    marks = [(float(power), f"{2.0**power:g}") for power in powers]
    return _drawn(title, lines, x, y, _frame(x, y, marks, heights, x_unit, y_unit))


def _logarithmic(lines: Sequence[Line]) -> Axis:
    sizes = [size for line in lines for size in line.sizes]
    return Axis(math.log2(min(sizes)), math.log2(max(sizes)), _LEFT, _WIDTH - _RIGHT)


def _drawn(title: str, lines: Sequence[Line], x: Axis, y: Axis, frame: str) -> str:
    """The lines with their labels in a frame, as a whole file."""
    body = [frame]
    ends = [y(line.shares[-1]) for line in lines]
    places = apart(ends, 17, y.end, y.start)
    for number, (line, place) in enumerate(zip(lines, places, strict=True)):
        points = " ".join(
            f"{x(math.log2(size)):.1f},{y(share):.1f}"
            for size, share in zip(line.sizes, line.shares, strict=True)
        )
        dash = _DASHES[number]
        body.append(
            f'<polyline class="line c{number}" stroke-dasharray="{dash}" points="{points}"/>'
        )
        body.append(text(x.end + 8, place + 4.5, line.label, f"c{number}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"<title>{esc(title)}</title><style>{STYLE}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


def binary_size(size: float) -> str:
    """A size in MiB with the unit that suits it: 1 MiB, 64 GiB."""
    return f"{size:g} MiB" if size < 1024 else f"{size / 1024:g} GiB"


def _frame(
    x: Axis,
    y: Axis,
    marks: Sequence[tuple[float, str]],
    heights: Sequence[tuple[float, str]],
    x_unit: str,
    y_unit: str,
) -> str:
    """Grid lines, values and units of both axes. marks: positions on the x axis, their labels."""
    body: list[str] = []
    for share, label in heights:
        height = y(share)
        body.append(rule(x.start, height, x.end, height))
        body.append(text(x.start - 8, height + 4.5, label, "muted", "end"))
    for place, label in marks:
        body.append(rule(x(place), y.end, x(place), y.start))
        body.append(text(x(place), y.start + 18, label, "muted", "middle"))
    body.append(text((x.start + x.end) / 2, _HEIGHT - 8, x_unit, "muted", "middle"))
    body.append(text(0, 14, y_unit, "muted"))
    return "\n".join(body)


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of the grid."""
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, content: str, kind: str, anchor: str = "start") -> str:
    """A text at a place, in pixels. kind: its class."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{esc(content)}</text>'
