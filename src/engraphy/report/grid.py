"""A grid of shares, as an SVG file of its own: darker where more is lost, and nothing where nothing
is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .lines import STYLE, text
from .markup import esc

_WIDTH = 760  # px
_LEFT = 150  # px for the labels of the rows
_ROW = 24  # px
_TOP = 44  # px for the unit and the heads of the columns
_TITLE = 30  # px above the rows of a group
_NONE = 5e-4  # a share below it is shown as 0
_SHADES = """
.cell { fill: #c2410c; } .free { fill: #2f7d4f; fill-opacity: 0.16; }
@media (prefers-color-scheme: dark) { .cell { fill: #ff9b52; } .free { fill: #7bd19d; } }
"""


def grid(
    title: str,
    columns: Sequence[str],
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    unit: str,
) -> str:
    """Draws a table of shares of 1.

    Args:
        title: What the chart shows, for those who cannot see it.
        columns: Heads of the columns.
        groups: By heading: the rows by their label, a share for each column.
        unit: What the columns and the shares are.

    Returns:
        The SVG, a whole file.
    """
    width = (_WIDTH - _LEFT - 8) / len(columns)
    body = [text(0, 14, unit, "muted")]
    for place, head in enumerate(columns):
        body.append(text(_LEFT + width * (place + 0.5), 38, head, "muted", "middle"))
    y = float(_TOP)
    for heading, rows in groups.items():
        y += _TITLE
        body.append(text(0, y - 8, heading, "strong"))
        for label, shares in rows.items():
            body.append(text(_LEFT - 10, y + 16, label, "muted", "end"))
            for place, share in enumerate(shares):
                body.append(_cell(_LEFT + width * place, y, width, share))
            y += _ROW
    height = y + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {_WIDTH} {height:.0f}">'
        f"<title>{esc(title)}</title><style>{STYLE}{_SHADES}</style>\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _cell(x: float, y: float, width: float, share: float) -> str:
    place = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{_ROW - 2}" rx="2"'
    middle = x + width / 2
    if share < _NONE:
        return f'<rect class="free" {place}/>' + text(middle, y + 16, "0", "muted", "middle")
    shade = 0.12 + 0.6 * min(1.0, share / 0.5)
    label = f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"
    rect = f'<rect class="cell" fill-opacity="{shade:.2f}" {place}/>'
    return rect + text(middle, y + 16, label, "", "middle")
