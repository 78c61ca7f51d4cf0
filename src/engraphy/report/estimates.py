"""A chart of estimates with their standard errors, as an SVG file of its own: a row each, a dot at
the value, a whisker of one standard error to both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .lines import STYLE, rule, text
from .markup import esc
from .scales import Axis, padded

_WIDTH = 760  # px
_LEFT = 150  # px for the labels of the rows
_ROW = 22  # px
_TOP = 30  # px for the unit
_TITLE = 30  # px above the rows of a group


@dataclass(frozen=True)
class Estimate:
    """One row.

    Attributes:
        label: What stands before it.
        value: The dot.
        error: Its standard error; 0 = no whisker.
    """

    label: str
    value: float
    error: float


def estimates(title: str, groups: Mapping[str, Sequence[Estimate]], unit: str) -> str:
    """Draws estimates over one axis, which holds 0.

    Args:
        title: What the chart shows, for those who cannot see it.
        groups: One to five groups of rows, by their heading.
        unit: What the values are.

    Returns:
        The SVG, a whole file.
    """
    rows = [row for group in groups.values() for row in group]
    ends = [row.value + side * row.error for row in rows for side in (-1, 1)]
    x = Axis(*padded(min(0.0, *ends), max(0.0, *ends), 0.03), _LEFT, _WIDTH - 20)
    bottom = _TOP + len(groups) * _TITLE + len(rows) * _ROW + 8
    body = [text(_LEFT, 14, unit, "muted")]
    for value, label in x.ticks(7):
        body.append(rule(x(value), _TOP, x(value), bottom))
        body.append(text(x(value), bottom + 18, label, "muted", "middle"))
    y = _TOP
    for number, (heading, group) in enumerate(groups.items()):
        y += _TITLE
        body.append(text(0, y - 8, heading, f"c{number}"))
        for row in group:
            body += _drawn(row, x, y + _ROW / 2, number)
            y += _ROW
    height = bottom + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_WIDTH} {height}">'
        f"<title>{esc(title)}</title><style>{STYLE}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


def _drawn(row: Estimate, x: Axis, y: float, number: int) -> list[str]:
    """Label, whisker and dot of a row."""
    low, high = x(row.value - row.error), x(row.value + row.error)
    line = f'x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"'
    dot = f'cx="{x(row.value):.1f}" cy="{y:.1f}" r="4"'
    told = f"{row.label}: {row.value:.2f} ± {row.error:.2f}"
    return [
        text(_LEFT - 12, y + 4.5, row.label, "muted", "end"),
        f'<line class="line c{number}" {line}/>',
        f'<circle class="dot c{number}" {dot}><title>{esc(told)}</title></circle>',
    ]
