"""SVG charts of a report, drawn by hand: one string each, coloured by the page's style sheet.

Every chart is drawn for a given width in px, once for wide and once for narrow screens (`both`), so
that its text keeps its size. Colours come from the classes arm-dense, arm-moe and arm-memory; shape
and label tell the arms apart as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .markup import esc, fixed, signed

ARMS = {"dense": "circle", "moe": "square", "memory": "diamond"}
_WIDE, _NARROW = 760, 340
_POINTS = 240  # of a curve: more would not be seen


@dataclass(frozen=True)
class Bar:
    """One bar: arm (a key of ARMS), value, its standard error where known, and what hovering says."""

    arm: str
    value: float
    stderr: float | None
    title: str


@dataclass(frozen=True)
class Group:
    """Bars under one label."""

    label: str
    note: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class _Axis:
    """Values low..high on pixels start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About `count` round values (1, 2 or 5 times a power of ten) with their labels."""
        raw = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [
            (place * step, fixed(place * step + 0.0, digits)) for place in range(first, last + 1)
        ]


def both(draw: Callable[[int], str]) -> str:
    """The chart for wide and for narrow screens; the style sheet shows one of them."""
    return f'<div class="wide">{draw(_WIDE)}</div><div class="narrow">{draw(_NARROW)}</div>'


def ladder(arms: Sequence[Mapping[str, Any]], width: int) -> str:
    """Validation loss of each arm on one axis, and the step from the arm before it."""
    losses = [arm["validation_loss"] for arm in arms]
    axis = _Axis(*_padded(min(losses), max(losses), 0.1), 12, width - 12)
    row, top = 64, 8
    height = top + row * len(arms) + 40
    body = [_grid(axis, top, height - 40, 6)]
    for place, arm in enumerate(arms):
        x, y = axis(arm["validation_loss"]), top + row * place + 36
        anchor = "start" if x < width / 3 else "end" if x > width * 2 / 3 else "middle"
        edge = {"start": x - 6, "end": x + 6, "middle": x}[anchor]
        text = f'<tspan class="strong">{esc(arm["label"])}</tspan> {fixed(arm["validation_loss"])}'
        if place:
            before = axis(losses[place - 1])
            body.append(
                _line(before, y - row + 7, before, y, "step")
                + _line(before, y, x, y, f"step-on {_arm(arm)}")
            )
            step = signed(arm["validation_loss"] - losses[place - 1])
            body.append(_text((before + x) / 2, y + 19, step, "halo", "middle"))
        body.append(
            _marker(
                arm["name"],
                x,
                y,
                6,
                f"{arm['label']}: {fixed(arm['validation_loss'], 4)} nats per token",
            )
        )
        body.append(_text(edge, y - 15, text, f"{_arm(arm)} halo", anchor))
    body.append(
        _text(
            width / 2,
            height - 4,
            "\u2190 better: validation loss, nats per token",
            "muted",
            "middle",
        )
    )
    spoken = "; ".join(f"{arm['label']} {fixed(arm['validation_loss'])}" for arm in arms)
    return _svg(width, height, f"Validation loss in nats per token: {spoken}", body)


def curves(arms: Sequence[Mapping[str, Any]], width: int) -> str:
    """Smoothed training loss as lines, held-out loss as marks, over tokens; labelled at their ends.

    The steep start lies above the chart: the axis ends at the highest loss after 12 % of the
    tokens.
    """
    right = 116 if width > 500 else 108
    height = 400 if width > 500 else 320
    lines = {arm["name"]: smooth(arm.get("curve") or []) for arm in arms}
    marks = {arm["name"]: arm.get("heldout_curve") or [] for arm in arms}
    points = [point for name in lines for point in (*lines[name], *marks[name])]
    tokens = max(point[0] for point in points)
    shown = [loss for seen, loss in points if seen >= 0.12 * tokens]
    low, high = _padded(min(shown), max(shown), 0.05)
    x, y = _Axis(0, tokens / 1e6, 40, width - right), _Axis(low, high, height - 44, 24)
    body = [
        _text(x.start - 6, y(at) + 4, name, "tick", "end")
        + _line(x.start, y(at), x.end, y(at), "grid")
        for at, name in y.ticks(7)
    ]
    body += [
        _text(x(at), height - 26, name, "tick", "middle")
        for at, name in x.ticks(5 if width > 500 else 3)
    ]
    body.append(
        _text((x.start + x.end) / 2, height - 6, "training tokens, millions", "muted", "middle")
    )
    body.append(_text(0, 12, "loss, nats per token", "muted"))
    ends = {}
    for arm in arms:
        line = [(x(seen / 1e6), y(loss)) for seen, loss in lines[arm["name"]] if loss <= high]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in line)
        body.append(f'<polyline class="curve {_arm(arm)}" points="{path}"/>' if line else "")
        dots = [
            (x(seen / 1e6), y(loss), seen, loss)
            for seen, loss in marks[arm["name"]]
            if loss <= high
        ]
        body += [
            _marker(
                arm["name"],
                px,
                py,
                4.5,
                f"{arm['label']}, {seen:,} tokens: held-out loss {fixed(loss)}",
            )
            for px, py, seen, loss in dots
        ]
        ends[arm["name"]] = (dots or line or [(0, y.end)])[-1][1]
    for arm, at in zip(
        arms, _apart([ends[arm["name"]] for arm in arms], 34, y.end + 10, y.start - 18), strict=True
    ):
        body.append(_text(x.end + 12, at, esc(arm["label"]), f"strong {_arm(arm)}"))
        body.append(_text(x.end + 12, at + 15, fixed(arm["validation_loss"]), _arm(arm)))
    spoken = "; ".join(f"{arm['label']} ends at {fixed(arm['validation_loss'])}" for arm in arms)
    return _svg(
        width,
        height,
        f"Training and held-out loss in nats per token over training tokens: {spoken}",
        body,
    )


def bars(groups: Sequence[Group], width: int, label: str, unit: str, plus: bool) -> str:
    """Groups of horizontal bars from zero, each with its value; `plus` prints the sign of positive
    values as well."""
    wide = width > 500
    left, over = (232, 12) if wide else (0, 26)
    thick, gap = 15, 4
    values = [
        bar.value + sign * (bar.stderr or 0)
        for group in groups
        for bar in group.bars
        for sign in (-1, 1)
    ]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 56  # px for a printed value beyond the longest bar
    axis = _Axis(low, high if high > low else 1.0, left + (room if low < 0 else 12), width - room)
    body, y = [], 6.0
    for group in groups:
        tall = len(group.bars) * (thick + gap) - gap
        note = f'<tspan class="muted" dx="6">{esc(group.note)}</tspan>' if group.note else ""
        if wide:
            body.append(
                _text(
                    0, y + over + tall / 2 - (3 if group.note else -5), esc(group.label), "strong"
                )
            )
            body.append(_text(0, y + over + tall / 2 + 13, esc(group.note), "muted"))
        else:
            body.append(
                _text(
                    0,
                    y + over - 8,
                    f'<tspan class="strong">{esc(group.label)}</tspan>{note}',
                    "halo",
                )
            )
        y += over
        for place, bar in enumerate(group.bars):
            body.append(_bar(bar, axis, y + place * (thick + gap), thick, plus))
        y += tall + (over if wide else 6)
    height = y + 40
    body.insert(0, _grid(axis, 4, y, 5 if wide else 3) + _line(axis(0), 4, axis(0), y, "zero"))
    body.append(_text((axis.start + axis.end) / 2, height - 4, esc(unit), "muted", "middle"))
    return _svg(width, height, label, body)


def smooth(curve: Sequence[Sequence[float]], share: float = 0.03) -> list[tuple[float, float]]:
    """Moving average over `share` of the points, centred so that it does not lag (cut off at both
    ends); thinned."""
    half = int(share * len(curve) / 2)
    sums = [0.0, *accumulate(loss for _, loss in curve)]
    points = []
    for place, (tokens, _) in enumerate(curve):
        first, last = max(0, place - half), min(len(curve), place + half + 1)
        points.append((tokens, (sums[last] - sums[first]) / (last - first)))
    every = max(1, len(points) // _POINTS)
    return points[::-1][::every][::-1]  # from the back, so that the last point stays


def _bar(bar: Bar, axis: _Axis, y: float, thick: float, plus: bool) -> str:
    zero, end, middle = axis(0), axis(bar.value), y + thick / 2
    body = (
        f'<rect class="bar {_arm_class(bar.arm)}" x="{min(zero, end):.1f}" y="{y:.1f}" '
        f'width="{abs(end - zero):.1f}" height="{thick}" rx="1.5"><title>{esc(bar.title)}</title></rect>'
    )
    reach = end
    if bar.stderr is not None:
        ends = axis(bar.value - bar.stderr), axis(bar.value + bar.stderr)
        body += _line(ends[0], middle, ends[1], middle, "whisker")
        reach = min(*ends, zero) if bar.value < 0 else max(*ends, zero)
    value, anchor = (
        (signed(bar.value), "end")
        if bar.value < 0
        else (signed(bar.value) if plus else fixed(bar.value), "start")
    )
    return body + _text(
        reach + (-6 if bar.value < 0 else 6), middle + 4.5, value, "value halo", anchor
    )


def _svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{esc(label)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width * 1.15:.0f}px">{"".join(body)}</svg>'
    )


def _grid(axis: _Axis, top: float, bottom: float, count: int) -> str:
    """Vertical grid lines from `top` to `bottom` with their values below."""
    return "".join(
        _line(axis(at), top, axis(at), bottom, "grid")
        + _text(axis(at), bottom + 16, name, "tick", "middle")
        for at, name in axis.ticks(count)
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """`content` is markup already."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def _marker(name: str, x: float, y: float, radius: float, title: str) -> str:
    shape, kind = ARMS[name], f'class="mark {_arm_class(name)}"'
    inner = f"<title>{esc(title)}</title>"
    if shape == "circle":
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inner}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    half = radius * 0.9
    return (
        f'<rect {kind} x="{x - half:.1f}" y="{y - half:.1f}" width="{2 * half:.1f}" height="{2 * half:.1f}"{turn}>'
        f"{inner}</rect>"
    )


def _arm(arm: Mapping[str, Any]) -> str:
    return _arm_class(arm["name"])


def _arm_class(name: str) -> str:
    return f"arm-{name}"


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    pad = (high - low) * share or 0.1
    return low - pad, high + pad


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`places` moved as little as a pass down and a pass up take to be `gap` apart inside
    low..high, order kept."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    edge = low - gap
    for index in order:
        moved[index] = edge = max(moved[index], edge + gap)
    edge = high + gap
    for index in reversed(order):
        moved[index] = edge = min(moved[index], edge - gap)
    return moved
