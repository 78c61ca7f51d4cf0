"""The values of the report's sections on what the memory has learned: loss by n-gram frequency,
and the gate at each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import charts
from .markup import fixed, joined, number, percent, signed
from .sections import CLEAR, ArmName, Cell, Report, Row
from .tokens import Piece, VisibleToken, visible

_PAIRS = {"moe - dense": ("moe", "dense"), "memory - moe": ("memory", "moe")}
_SAME = 0.005  # nats: below it, a bucket without a standard error counts as unchanged

Bucket = Mapping[str, Any]


@dataclass(frozen=True)
class Frequency:
    """Loss by n-gram frequency.

    Attributes:
        summary: Where the memory lowers and where it raises the loss against MoE, in words.
        legend: The differences that the bars show.
        chart: The bars.
        arms: Labels of the arms in the table.
        rows: Losses, and what each bucket contributes to the memory's difference.
    """

    summary: str
    legend: Sequence[ArmName]
    chart: charts.Chart
    arms: Sequence[str]
    rows: Sequence[Row]


def frequency(report: Report) -> Frequency | None:
    """Returns the values of "By n-gram frequency", or None if no bucket has a difference.

    Buckets without tokens are left out.

    Args:
        report: The dict of a run.
    """
    buckets = [bucket for bucket in report.get("frequency") or [] if bucket["tokens"]]
    differences = report["differences"]
    gaps = {pair: differences[pair] for pair in _PAIRS if pair in differences}
    gap = gaps["memory - moe"]
    if not any(bucket["bucket"] in gap for bucket in buckets):
        return None
    labels = {arm["name"]: arm["label"] for arm in report["arms"]}
    legend = {}
    for pair in gaps:
        new, old = _PAIRS[pair]
        legend[pair] = ArmName(new, f"{labels[new]} \u2212 {labels[old]}")
    arms = [arm for arm in report["arms"] if arm.get("loss_by_frequency")]
    return Frequency(
        summary=_summary(buckets, gap),
        legend=list(legend.values()),
        chart=_difference_bars(buckets, gaps, legend),
        arms=[arm["label"] for arm in arms],
        rows=[_bucket_row(bucket, arms, gap) for bucket in buckets],
    )


def _difference_bars(
    buckets: Sequence[Bucket],
    gaps: Mapping[str, Mapping[str, float]],
    legend: Mapping[str, ArmName],
) -> charts.Chart:
    """Bars for all tokens and for each bucket, one for each pair of arms."""

    def group(label: str, note: str, bucket: str) -> charts.Group:
        bars = []
        for pair, gap in gaps.items():
            title = f"{legend[pair].label}, {label}: {signed(gap[bucket], 4)} nats"
            stderr = gap.get(f"{bucket}_stderr")
            bars.append(charts.Bar(legend[pair].name, gap[bucket], stderr, title))
        return charts.Group(label, note, bars)

    groups = [group("All tokens", "", "all")]
    for bucket in buckets:
        note = f"{_times(bucket)}, {percent(bucket['share'])} of tokens"
        groups.append(group(bucket["bucket"], note, bucket["bucket"]))
    spoken = "; ".join(f"{one.label}: {_spoken(one.bars)}" for one in groups)
    pairs = ", ".join(arm.label for arm in legend.values())
    label = f"Difference in validation loss by n-gram frequency ({pairs}): {spoken}"
    unit = "\u2190 better: difference in loss, nats per token"
    return charts.both(lambda width: charts.bars(groups, width, label, unit, True))


def _spoken(bars: Sequence[charts.Bar]) -> str:
    return ", ".join(signed(bar.value) for bar in bars)


def _times(bucket: Bucket) -> str:
    """How often the trigrams of a bucket occur, in words."""
    low, high = bucket["low"], bucket["high"]
    if low is None:
        return "no trigram"
    if high is None:
        return f"{number(low)} times or more"
    return f"{number(low)} times" if low == high else f"{number(low)}–{number(high)} times"


def _summary(buckets: Sequence[Bucket], gap: Mapping[str, float]) -> str:
    """In words, where the memory lowers and where it raises the loss against MoE."""
    names: dict[str, list[str]] = {"lowers": [], "raises": [], "hardly changes": []}
    for bucket in buckets:
        name = bucket["bucket"]
        stderr = gap.get(f"{name}_stderr", _SAME / CLEAR)
        names[_effect(gap[name], CLEAR * stderr)].append(f"{name} ({percent(bucket['share'])})")
    parts = [f"{effect} the loss on {joined(few)}" for effect, few in names.items() if few]
    return f"Against MoE, the memory {joined(parts)}; in brackets, the share of tokens."


def _effect(gap: float, least: float) -> str:
    if abs(gap) <= least:
        return "hardly changes"
    return "lowers" if gap < 0 else "raises"


def _bucket_row(bucket: Bucket, arms: Sequence[Mapping[str, Any]], gap: Mapping[str, float]) -> Row:
    name = bucket["bucket"]
    losses = [fixed(arm["loss_by_frequency"][name]) for arm in arms]
    contribution = signed(bucket["share"] * gap[name])
    texts = [number(bucket["tokens"]), *losses, contribution]
    return Row(f"{name}, {_times(bucket)}", [Cell(text) for text in texts])


@dataclass(frozen=True)
class Chip:
    """A token of the heat map.

    Attributes:
        pieces: Its text.
        space: True if a gap follows.
        gate: With two decimals.
        title: With four decimals; what hovering shows.
        warmth: Place of the gate on the scale, in percent.
    """

    pieces: Sequence[Piece]
    space: bool
    gate: str
    title: str
    warmth: str


@dataclass(frozen=True)
class Line:
    """A sentence of the heat map: its text, and its tokens in reading order."""

    text: str
    chips: Sequence[Chip]


@dataclass(frozen=True)
class HeatMap:
    """Tokens coloured by gate.

    Attributes:
        low: The rounded lowest gate of all sentences.
        high: The rounded highest gate.
        lines: One for each sentence.
    """

    low: str
    high: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Gates:
    """The gate of the memory: its layer, and the two figures; a missing one is None."""

    layer: str
    heat_map: HeatMap | None
    by_frequency: charts.Chart | None


def gates(report: Report) -> Gates | None:
    """Returns the values of "Where the gate opens", or None if the report has no gates.

    Args:
        report: The dict of a run.
    """
    part = report.get("gates") or {}
    sentences = part.get("sentences")
    by_frequency = part.get("by_frequency")
    if not sentences and not by_frequency:
        return None
    heat_map = _heat_map(sentences) if sentences else None
    bars = _gate_bars(report, by_frequency) if by_frequency else None
    return Gates(number(part["layer"]), heat_map, bars)


def _gate_bars(report: Report, by_frequency: Sequence[Bucket]) -> charts.Chart:
    """Bars of the mean gate of each bucket."""
    times = {bucket["bucket"]: _times(bucket) for bucket in report.get("frequency") or []}
    groups = []
    for one in by_frequency:
        name = one["bucket"]
        mean = one["mean"]
        note = f"{number(one['tokens'])} tokens"
        if name in times:
            note = f"{times[name]}, {note}"
        bar = charts.Bar("memory", mean, None, f"{name}: mean gate {fixed(mean, 4)}")
        groups.append(charts.Group(name, note, [bar]))
    spoken = "; ".join(f"{one['bucket']} {fixed(one['mean'])}" for one in by_frequency)
    label = f"Mean gate by n-gram frequency: {spoken}"
    return charts.both(lambda width: charts.bars(groups, width, label, "mean gate", False))


def _heat_map(sentences: Sequence[Mapping[str, Any]]) -> HeatMap:
    values = [gate for sentence in sentences for gate in sentence["gates"]]
    low = math.floor(min(values) * 10) / 10
    span = max(math.ceil(max(values) * 10) / 10 - low, 0.1)
    lines = []
    for sentence in sentences:
        tokens = [visible(token) for token in sentence["tokens"]]
        gaps = _gaps(tokens)
        chips = [
            _chip(token, gap, gate, 100 * (gate - low) / span)
            for token, gap, gate in zip(tokens, gaps, sentence["gates"], strict=True)
        ]
        lines.append(Line(sentence["text"], chips))
    return HeatMap(fixed(low, 1), fixed(low + span, 1), lines)


def _gaps(tokens: Sequence[VisibleToken]) -> list[bool]:
    """Whether a gap follows each token. It stands behind a chip, so that lines start flush."""
    opens_next = [token.before for token in tokens[1:]] + [False]
    return [token.after or opens for token, opens in zip(tokens, opens_next, strict=True)]


def _chip(token: VisibleToken, space: bool, gate: float, warmth: float) -> Chip:
    return Chip(token.pieces, space, fixed(gate, 2), f"gate {gate:.4f}", f"{warmth:.0f}")
