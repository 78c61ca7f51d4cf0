"""Tokens in a terminal: the text that each one adds, and text coloured by a number a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.style import Style
from rich.text import Text

# The ends of a colour scale, as RGB.
_FAINT = (237, 243, 251)
_FULL = (8, 69, 148)


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens comes with the last of them.

    Args:
        decode: Token ids -> their text.
        ids: The tokens.
    """
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[:end]))
        incomplete = text.endswith("\ufffd") and end < len(ids)
        if incomplete:
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        shown = text
    return texts


def painted(
    title: str, texts: Sequence[str], values: Sequence[float], bold: Sequence[bool] | None = None
) -> Text:
    """A line with the scale, from the lowest to the highest value, and the text on that scale.

    Args:
        title: What stands before the scale.
        texts: The text of each token.
        values: The number of each token.
        bold: The tokens to print in bold; None = none.
    """
    low, high = min(values), max(values)
    text = Text.assemble(
        f"{title} {low:.3f} ",
        *((" ", shade(step / 9)) for step in range(10)),
        f" {high:.3f}\n",
    )
    for t, (token, value) in enumerate(zip(texts, values, strict=True)):
        share = (value - low) / (high - low) if high > low else 0.0
        style = shade(share, bold is not None and bold[t])
        text.append(token.replace("\n", "↵\n"), style)
    return text.append("\n")


def shade(share: float, bold: bool = False) -> Style:
    """A background between _FAINT and _FULL, and a text colour that can be read on it whatever the
    terminal's own colours are."""
    ends = zip(_FAINT, _FULL, strict=True)
    red, green, blue = (round(low + share * (high - low)) for low, high in ends)
    color = "rgb(255,255,255)" if share > 0.5 else "rgb(0,0,0)"
    return Style(color=color, bgcolor=f"rgb({red},{green},{blue})", bold=bold)
