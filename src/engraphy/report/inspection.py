"""The page of an inspection: one HTML file that shows what a memory does at each token of a text.

`render` turns an inspection (format "engraphy-inspection-1") into the page. All that it shows is
markup already; its script only chooses what is visible. Without the script everything is visible.
The content security policy allows this one script and style, and forbids loading anything.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.files import publish_file
from .details import details, short_percent
from .lens import lens
from .markup import fixed, joined, number, signed
from .rendering import asset, check_finite, templates
from .tokens import Piece, visible

FORMAT = "engraphy-inspection-1"
_SCRIPT = "inspection.js"

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """Returns an inspection as one self-contained HTML page.

    Args:
        report: What `Inspection.to_json` returns.

    Returns:
        The page, HTML 5. The same report always gives the same page.

    Raises:
        ConfigError: If the format is another one, a number is not finite, or a field is missing
            or malformed.
    """
    if report.get("format") != FORMAT:
        raise ConfigError(f"inspection: expected format {FORMAT!r}, found {report.get('format')!r}")
    check_finite(report, "inspection")
    try:
        values = {
            "title": _title(report),
            "measures": _measures(report),
            "chips": _chips(report),
            "tokens": [details(report, place) for place in range(len(report["tokens"]))],
            "lens": lens(report),
            "start": _start(report["tokens"]),
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        message = f"inspection: expected the fields of {FORMAT}, found {type(error).__name__}"
        raise ConfigError(f"{message}: {error}") from error
    script = asset(_SCRIPT)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = asset("report.css") + asset("inspection.css")
    return (
        templates()
        .get_template("inspection.html.jinja")
        .render(style=style, script=script, script_digest=digest, **values)
    )


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Writes the page of an inspection; it appears whole or not at all.

    Args:
        report: As `render` takes it.
        path: The file.

    Returns:
        The path.

    Raises:
        ConfigError: As `render` raises it.
        WriteFailed: If the system refuses to write.
    """
    page = render(report)
    with publish_file(Path(path)) as file:
        file.write(page.encode())
    return Path(path)


def _start(tokens: Sequence[Report]) -> int:
    """The token that the page shows first: the one after which the memory changes most."""
    changes = [
        0.0 if one["on"]["loss"] is None else abs(one["on"]["loss"] - one["off"]["loss"])
        for one in tokens
    ]
    return changes.index(max(changes))


@dataclass(frozen=True)
class Title:
    """Names, and how much there is.

    Attributes:
        model: Name of the model.
        memory: Name of its memory; may be empty.
        text: The text that was inspected.
        corpus: The text that rows are compared with; None = none.
        layers: The layers with a memory, in words.
        verdict: What the memory does to the text as a whole, in one sentence.
    """

    model: str
    memory: str
    text: str
    corpus: str | None
    layers: str
    verdict: str


def _title(report: Report) -> Title:
    layers = [number(layer) for layer in report["layers"]]
    name = "layer" if len(layers) == 1 else "layers"
    return Title(
        report["model"],
        report["memory"],
        report["text"],
        report["corpus"],
        f"{name} {joined(layers)} of {number(len(report['before_memory']))}",
        _verdict(report["tokens"]),
    )


def _verdict(tokens: Sequence[Report]) -> str:
    pairs = [(one["on"]["loss"], one["off"]["loss"]) for one in tokens]
    known = [(on, off) for on, off in pairs if on is not None]
    if not known:
        return "One token: nothing follows that could be predicted."
    on = sum(pair[0] for pair in known) / len(known)
    off = sum(pair[1] for pair in known) / len(known)
    helped = sum(pair[0] < pair[1] for pair in known)
    return (
        f"{fixed(on, 2)} nats a token with the memory, {fixed(off, 2)} without; "
        f"it helps on {helped} of {len(known)} tokens."
    )


@dataclass(frozen=True)
class Measure:
    """What colours the tokens.

    Attributes:
        name: Its button.
        note: What it says, in one sentence.
        low: The value at the faint end of the scale.
        high: The value at the full end.
        signed: True if values have a sign: the hue then shows it.
    """

    name: str
    note: str
    low: str
    high: str
    signed: bool


@dataclass(frozen=True)
class _Scale:
    """A measure with its values, one a token; None = no value."""

    name: str
    note: str
    values: Sequence[float | None]
    form: Callable[[float], str]
    signed: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        known = [value for value in self.values if value is not None] or [0.0]
        if self.signed:
            most = max(abs(value) for value in known)
            return -most, most
        return min(known), max(known)

    def share(self, value: float | None) -> int:
        """Percent of the scale; of a signed one from -100 to 100."""
        low, high = self.bounds
        if value is None or high <= low:
            return 0
        if self.signed:
            return round(100 * value / high)
        return round(100 * (value - low) / (high - low))


def _scales(report: Report) -> list[_Scale]:
    tokens = report["tokens"]
    scales = []
    for place, layer in enumerate(report["layers"]):
        views = [token["memory"][place] for token in tokens]
        gates = [_mean(view["gates"]) for view in views]
        sizes = [100 * _mean(view["sizes"]) for view in views]
        note = f"How far the gate of layer {layer} opens at each token, from 0 to 1."
        scales.append(_Scale(f"Gate, layer {layer}", note, gates, _two))
        note = f"Length of what layer {layer} adds, over that of the stream it is added to."
        scales.append(_Scale(f"Added, layer {layer}", note, sizes, short_percent))
    # The loss of a token stands where it was predicted, one token earlier.
    on = [None, *(token["on"]["loss"] for token in tokens[:-1])]
    off = [None, *(token["off"]["loss"] for token in tokens[:-1])]
    saved = [None if a is None or b is None else b - a for a, b in zip(on, off, strict=True)]
    note = "Nats that the memory saves on each token: orange it helps, blue it hurts."
    scales.append(_Scale("Saved", note, saved, _signed_two, signed=True))
    note = "Loss of each token with the memory, in nats: how surprised the model is."
    scales.append(_Scale("Surprise", note, on, _two))
    return scales


def _measures(report: Report) -> list[Measure]:
    measures = []
    for scale in _scales(report):
        low, high = scale.bounds
        measures.append(
            Measure(scale.name, scale.note, scale.form(low), scale.form(high), scale.signed)
        )
    return measures


@dataclass(frozen=True)
class Chip:
    """A token of the text.

    Attributes:
        pieces: Its text.
        gap: True if a gap follows.
        values: What each measure says of it, as text.
        shares: Its place on the scale of each measure, in percent.
    """

    pieces: Sequence[Piece]
    gap: bool
    values: Sequence[str]
    shares: Sequence[int]

    @property
    def joined_values(self) -> str:
        """Values divided by a bar, for the script."""
        return "|".join(self.values)

    @property
    def joined_shares(self) -> str:
        """Shares divided by a bar, for the script."""
        return "|".join(map(str, self.shares))


def _chips(report: Report) -> list[Chip]:
    scales = _scales(report)
    tokens = [visible(token["text"]) for token in report["tokens"]]
    opens_next = [token.before for token in tokens[1:]] + [False]
    chips = []
    for place, (token, opens) in enumerate(zip(tokens, opens_next, strict=True)):
        values = [scale.values[place] for scale in scales]
        chips.append(
            Chip(
                token.pieces,
                token.after or opens,
                [
                    "–" if value is None else scale.form(value)
                    for scale, value in zip(scales, values, strict=True)
                ],
                [scale.share(value) for scale, value in zip(scales, values, strict=True)],
            )
        )
    return chips


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _two(value: float) -> str:
    return fixed(value, 2)


def _signed_two(value: float) -> str:
    return signed(value, 2)
