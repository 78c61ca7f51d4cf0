"""Formats numbers and words for a report page, and escapes text for the charts.

Knows nothing of a report's fields.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

MINUS = "\u2212"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(value: object) -> str:
    """Returns `value` as text, each character that HTML and XML forbid replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", str(value))


def esc(value: object) -> str:
    """Returns `value` as printable text, escaped for the content and the attributes of XML."""
    return html.escape(printable(value), quote=True)


def number(value: float) -> str:
    """1495000 -> '1,495,000', 0.006 -> '0.006', -3 -> a true minus sign."""
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return text.replace("-", MINUS)


def fixed(value: float, digits: int = 3) -> str:
    """A number with `digits` decimals, groups of three, and a true minus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, '+' included. A number that rounds to zero has no sign."""
    text = f"{abs(value):,.{digits}f}"
    if not float(text.replace(",", "")):
        return text
    return (MINUS if value < 0 else "+") + text


def digits_for(stderr: float | None) -> int:
    """Decimals that show a standard error: three, or more if it is smaller than 0.001."""
    if stderr is None:
        return 3
    return next((digits for digits in range(3, 9) if stderr >= 10**-digits), 3)


def plus_minus(stderr: float | None) -> str:
    """A standard error as '± 0.004', or '' if there is none."""
    return "" if stderr is None else f"± {fixed(stderr, digits_for(stderr))}"


def percent(share: float) -> str:
    """A share of one in whole percent."""
    return f"{fixed(100 * share, 0)}\u00a0%"


def change(new: float, old: float) -> str:
    """Relative change: '+0.21 %', with two decimals below one percent."""
    share = 100 * (new - old) / old
    return f"{signed(share, 2 if abs(share) < 1 else 1)}\u00a0%"


def size(count: int) -> str:
    """Bytes in powers of 1000: '1.59 MB'."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g}\u00a0{unit}"


def joined(words: Sequence[str]) -> str:
    """Words as an enumeration: 'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
