"""Small pieces of HTML for the report pages: escaping, numbers, tables, tokens made visible. Knows
no report."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

MINUS = "\u2212"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_WHITE = {" ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}


def esc(value: object) -> str:
    """`value` as text for HTML content and quoted attributes; characters that HTML and XML forbid
    become U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def number(value: float) -> str:
    """1495000 -> '1,495,000', 0.006 -> '0.006', -3 -> a true minus sign."""
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return text.replace("-", MINUS)


def fixed(value: float, digits: int = 3) -> str:
    """A number with so many decimals, groups of three, and a real minus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """With its sign, always; what rounds to zero has none."""
    text = f"{abs(value):,.{digits}f}"
    if not float(text.replace(",", "")):
        return text
    return (MINUS if value < 0 else "+") + text


def digits_for(stderr: float | None) -> int:
    """Decimals that show a standard error: three, or more where it is smaller than that."""
    if stderr is None:
        return 3
    return next((digits for digits in range(3, 9) if stderr >= 10**-digits), 3)


def percent(share: float, digits: int = 0) -> str:
    """A share of one in percent."""
    return f"{fixed(100 * share, digits)}\u00a0%"


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


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already. The first column heads its row. Wider than the page, it scrolls
    inside its box."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(label)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """A description list of (term, HTML)."""
    return f"<dl>{''.join(f'<div><dt>{esc(term)}</dt><dd>{value}</dd></div>' for term, value in items)}</dl>"


def visible(token: str) -> tuple[str, bool, bool]:
    """A token as HTML that can be seen, and whether a single space stood before and after it.

    Single outer spaces become gaps between tokens; other white space, control and format characters
    become signs or code points, and a lone combining mark gets a carrier.
    """
    before = len(token) > 1 and token[0] == " " and token[1] != " "
    token = token[1:] if before else token
    after = len(token) > 1 and token[-1] == " " and token[-2] != " "
    token = token[:-1] if after else token
    inside = token.strip() != token or not token
    parts = []
    for place, char in enumerate(token):
        if char in _WHITE and (inside or char != " "):
            parts.append(f"<i>{_WHITE[char]}</i>")
        elif char != " " and unicodedata.category(char) in _HIDDEN:
            parts.append(f"<i>U+{ord(char):04X}</i>")
        elif not place and unicodedata.combining(char):
            parts.append("\u25cc" + char)
        else:
            parts.append(esc(char))
    return "".join(parts) or "<i>empty</i>", before, after


def plus_minus(value: float | None) -> str:
    """' ± 0.004' in small, or nothing."""
    return "" if value is None else f' <span class="pm">± {fixed(value, digits_for(value))}</span>'


def section(title: str, note: str, content: str, kind: str = "") -> str:
    """A section of the page; `note` and `content` are HTML. kind "full": the note above the
    content, not beside it."""
    rail = f'<div class="rail"><h2>{esc(title)}</h2>{note}</div>'
    return f'<section class="{kind}">{rail}<div class="main">{content}</div></section>'


def mark(arm: str) -> str:
    """The mark of an arm, as in the charts."""
    return f'<span class="key arm-{arm}"></span>'
