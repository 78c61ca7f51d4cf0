"""SVG charts of a report, drawn by hand: one piece of markup each, coloured by the page's style
sheet.

Every chart is drawn for a given width in px, once for wide and once for narrow screens (`both`), so
that its text keeps its size. Colours come from the classes arm-dense, arm-moe and arm-memory. Shape
and label distinguish the arms as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .markup import esc, fixed, signed
from .scales import Axis, apart, padded, smooth

ARMS = {"dense": "circle", "moe": "square", "memory": "diamond"}
"""Names of the arms, and the shape that marks each."""

_WIDE = 760  # px
_NARROW = 340  # px
_WIDE_FROM = 500  # px: a chart above it has room for labels at the left
_STEEP = 0.12  # share of the tokens: losses before it do not set the axis

Arm = Mapping[str, Any]
Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Chart:
    """One chart, drawn twice.

    Attributes:
        wide: SVG for wide screens.
        narrow: SVG for narrow screens.
    """

    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        arm: A key of ARMS.
        value: The length, with its sign.
        stderr: Standard error of `value`, if it is known.
        title: What hovering shows.
    """

    arm: str
    value: float
    stderr: float | None
    title: str


@dataclass(frozen=True)
class Group:
    """Bars under one label.

    Attributes:
        label: Name of the group.
        note: Text beside or below the label; may be empty.
        bars: At least one.
    """

    label: str
    note: str
    bars: Sequence[Bar]


def both(draw: Callable[[int], Markup]) -> Chart:
    """Draws a chart for wide and for narrow screens; the style sheet shows one of the two.

    Args:
        draw: Draws the chart for a width in px.

    Returns:
        Both drawings.
    """
    return Chart(draw(_WIDE), draw(_NARROW))


def ladder(arms: Sequence[Arm], width: int) -> Markup:
    """Draws the validation loss of each arm on one axis, and the step from the arm before it.

    Args:
        arms: Arms of a report, in their order.
        width: Width in px.

    Returns:
        The SVG.
    """
    losses = [arm["validation_loss"] for arm in arms]
    axis = Axis(*padded(min(losses), max(losses), 0.1), 12, width - 12)
    row, top = 64, 8  # px
    height = top + row * len(arms) + 40
    body = [_grid(axis, top, height - 40, 6)]
    for place, arm in enumerate(arms):
        y = top + row * place + 36
        if place:
            body.append(_rung(arm, losses[place - 1], axis, y, row))
        body.append(_on_ladder(arm, axis, y, width))
    unit = "\u2190 better: validation loss, nats per token"
    body.append(_text(width / 2, height - 4, unit, "muted", "middle"))
    spoken = "; ".join(f"{arm['label']} {fixed(arm['validation_loss'])}" for arm in arms)
    return _svg(width, height, f"Validation loss in nats per token: {spoken}", body)


def _rung(arm: Arm, before: float, axis: Axis, y: float, row: float) -> str:
    """The step from the loss of the arm above, `before`, to that of `arm`."""
    loss = arm["validation_loss"]
    old, new = axis(before), axis(loss)
    down = _line(old, y - row + 7, old, y, "step")
    across = _line(old, y, new, y, f"step-on {_arm(arm)}")
    return down + across + _text((old + new) / 2, y + 19, signed(loss - before), "halo", "middle")


def _on_ladder(arm: Arm, axis: Axis, y: float, width: int) -> str:
    """The mark of an arm with its label above."""
    loss = arm["validation_loss"]
    x = axis(loss)
    edge, anchor = x, "middle"
    if x < width / 3:
        edge, anchor = x - 6, "start"
    elif x > width * 2 / 3:
        edge, anchor = x + 6, "end"
    mark = _marker(arm["name"], x, y, 6, f"{arm['label']}: {fixed(loss, 4)} nats per token")
    label = f'<tspan class="strong">{esc(arm["label"])}</tspan> {fixed(loss)}'
    return mark + _text(edge, y - 15, label, f"{_arm(arm)} halo", anchor)


def curves(arms: Sequence[Arm], width: int) -> Markup:
    """Draws smoothed training loss as lines and held-out loss as marks, over tokens.

    Each line is labelled at its end. The steep start lies above the chart: the axis ends at the
    highest loss after 12 % of the tokens.

    Args:
        arms: Arms of a report, at least one of them with a curve.
        width: Width in px.

    Returns:
        The SVG.
    """
    wide = width > _WIDE_FROM
    right = 116 if wide else 108
    height = 400 if wide else 320
    lines = {arm["name"]: smooth(arm.get("curve") or []) for arm in arms}
    marks = {arm["name"]: arm.get("heldout_curve") or [] for arm in arms}
    points = [point for name in lines for point in (*lines[name], *marks[name])]
    tokens = max(point[0] for point in points)
    shown = [loss for seen, loss in points if seen >= _STEEP * tokens]
    low, high = padded(min(shown), max(shown), 0.05)
    x = Axis(0, tokens / 1e6, 40, width - right)
    y = Axis(low, high, height - 44, 24)
    body = [_frame(x, y, height, 5 if wide else 3)]
    ends = []
    for arm in arms:
        drawn, end = _curve(arm, lines[arm["name"]], marks[arm["name"]], x, y)
        body.append(drawn)
        ends.append(end)
    for arm, at in zip(arms, apart(ends, 34, y.end + 10, y.start - 18), strict=True):
        body.append(_text(x.end + 12, at, esc(arm["label"]), f"strong {_arm(arm)}"))
        body.append(_text(x.end + 12, at + 15, fixed(arm["validation_loss"]), _arm(arm)))
    spoken = "; ".join(f"{arm['label']} ends at {fixed(arm['validation_loss'])}" for arm in arms)
    label = f"Training and held-out loss in nats per token over training tokens: {spoken}"
    return _svg(width, height, label, body)


def _frame(x: Axis, y: Axis, height: float, count: int) -> str:
    """Both axes of the curves, with grid lines and units; `count` values along x."""
    body = []
    for at, name in y.ticks(7):
        body.append(_text(x.start - 6, y(at) + 4, name, "tick", "end"))
        body.append(_line(x.start, y(at), x.end, y(at), "grid"))
    for at, name in x.ticks(count):
        body.append(_text(x(at), height - 26, name, "tick", "middle"))
    middle = (x.start + x.end) / 2
    body.append(_text(middle, height - 6, "training tokens, millions", "muted", "middle"))
    body.append(_text(0, 12, "loss, nats per token", "muted"))
    return "".join(body)


def _curve(arm: Arm, line: Points, marks: Points, x: Axis, y: Axis) -> tuple[str, float]:
    """The curve of an arm below the top of the chart, and the height in px of its end."""
    path = [(x(seen / 1e6), y(loss)) for seen, loss in line if loss <= y.high]
    kept = [(seen, loss) for seen, loss in marks if loss <= y.high]
    body = []
    if path:
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in path)
        body.append(f'<polyline class="curve {_arm(arm)}" points="{points}"/>')
    for seen, loss in kept:
        title = f"{arm['label']}, {seen:,} tokens: held-out loss {fixed(loss)}"
        body.append(_marker(arm["name"], x(seen / 1e6), y(loss), 4.5, title))
    if kept:
        end = y(kept[-1][1])
    elif path:
        end = path[-1][1]
    else:
        end = y.end
    return "".join(body), end


def bars(groups: Sequence[Group], width: int, label: str, unit: str, plus: bool) -> Markup:
    """Draws groups of horizontal bars from zero, each with its value.

    Args:
        groups: At least one, from top to bottom.
        width: Width in px.
        label: Description of the chart for those who cannot see it.
        unit: What the axis shows.
        plus: True prints the sign of positive values as well.

    Returns:
        The SVG.
    """
    wide = width > _WIDE_FROM
    left = 232 if wide else 0  # px for labels beside the bars
    over = 12 if wide else 26  # px above the bars of a group
    thick, gap = 15, 4  # px of a bar, and between two
    low, high = _reach(groups)
    room = 56  # px for a printed value beyond the longest bar
    start = left + (room if low < 0 else 12)
    axis = Axis(low, high if high > low else 1.0, start, width - room)
    body, y = [], 6.0
    for group in groups:
        tall = len(group.bars) * (thick + gap) - gap
        if wide:
            body.append(_label_beside(group, y + over + tall / 2))
        else:
            body.append(_label_above(group, y + over - 8))
        y += over
        for place, bar in enumerate(group.bars):
            body.append(_bar(bar, axis, y + place * (thick + gap), thick, plus))
        y += tall + (over if wide else 6)
    height = y + 40
    zero = _line(axis(0), 4, axis(0), y, "zero")
    body.insert(0, _grid(axis, 4, y, 5 if wide else 3) + zero)
    body.append(_text((axis.start + axis.end) / 2, height - 4, esc(unit), "muted", "middle"))
    return _svg(width, height, label, body)


def _reach(groups: Sequence[Group]) -> tuple[float, float]:
    """Lowest and highest value with its standard error, zero included."""
    bars = [bar for group in groups for bar in group.bars]
    low = min(bar.value - (bar.stderr or 0) for bar in bars)
    high = max(bar.value + (bar.stderr or 0) for bar in bars)
    return min(0.0, low), max(0.0, high)


def _label_beside(group: Group, middle: float) -> str:
    """The label of a group at the left of its bars, the note below it."""
    lift = 3 if group.note else -5
    name = _text(0, middle - lift, esc(group.label), "strong")
    return name + _text(0, middle + 13, esc(group.note), "muted")


def _label_above(group: Group, y: float) -> str:
    """The label of a group above its bars, the note behind it."""
    name = f'<tspan class="strong">{esc(group.label)}</tspan>'
    if group.note:
        name += f'<tspan class="muted" dx="6">{esc(group.note)}</tspan>'
    return _text(0, y, name, "halo")


def _bar(bar: Bar, axis: Axis, y: float, thick: float, plus: bool) -> str:
    """A bar from zero with its whisker and its value."""
    zero, end = axis(0), axis(bar.value)
    middle = y + thick / 2
    body = (
        f'<rect class="bar {_arm_class(bar.arm)}" x="{min(zero, end):.1f}" y="{y:.1f}" '
        f'width="{abs(end - zero):.1f}" height="{thick}" rx="1.5">'
        f"<title>{esc(bar.title)}</title></rect>"
    )
    left, right = min(zero, end), max(zero, end)
    if bar.stderr is not None:
        low, high = axis(bar.value - bar.stderr), axis(bar.value + bar.stderr)
        body += _line(low, middle, high, middle, "whisker")
        left, right = min(left, low), max(right, high)
    if bar.value < 0:
        return body + _text(left - 6, middle + 4.5, signed(bar.value), "value halo", "end")
    value = signed(bar.value) if plus else fixed(bar.value)
    return body + _text(right + 6, middle + 4.5, value, "value halo", "start")


def _svg(width: float, height: float, label: str, body: Sequence[str]) -> Markup:
    """The chart around its parts, which are markup already."""
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width * 1.15:.0f}px"'
    return Markup(f'<svg role="img" aria-label="{esc(label)}" {box}>{"".join(body)}</svg>')


def _grid(axis: Axis, top: float, bottom: float, count: int) -> str:
    """Vertical grid lines from `top` to `bottom` with their values below."""
    body = []
    for at, name in axis.ticks(count):
        body.append(_line(axis(at), top, axis(at), bottom, "grid"))
        body.append(_text(axis(at), bottom + 16, name, "tick", "middle"))
    return "".join(body)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """`content` is markup already."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def _marker(name: str, x: float, y: float, radius: float, title: str) -> str:
    """The mark of an arm around x, y."""
    shape = ARMS[name]
    kind = f'class="mark {_arm_class(name)}"'
    inner = f"<title>{esc(title)}</title>"
    if shape == "circle":
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{inner}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if shape == "diamond" else ""
    half = radius * 0.9
    corner = f'x="{x - half:.1f}" y="{y - half:.1f}"'
    side = f'width="{2 * half:.1f}" height="{2 * half:.1f}"'
    return f"<rect {kind} {corner} {side}{turn}>{inner}</rect>"


def _arm(arm: Arm) -> str:
    return _arm_class(arm["name"])


def _arm_class(name: str) -> str:
    return f"arm-{name}"
