"""The report's sections on what the memory has learned: loss by n-gram frequency, gates token by
token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import charts
from .markup import esc, fixed, joined, mark, number, percent, section, signed, table, visible

CLEAR = 2.0  # standard errors from zero: beyond them a difference counts as one
_PAIRS = {"moe - dense": ("moe", "dense"), "memory - moe": ("memory", "moe")}
_SAME = 0.005  # nats: below it, a bucket without a standard error counts as unchanged

Report = Mapping[str, Any]


def frequency(report: Report) -> str:
    """Where the differences between the arms come from: chart, words and table. Buckets without
    tokens are left out."""
    buckets = [bucket for bucket in report.get("frequency") or [] if bucket["tokens"]]
    gaps = {pair: report["differences"][pair] for pair in _PAIRS if pair in report["differences"]}
    if not any(bucket["bucket"] in gaps["memory - moe"] for bucket in buckets):
        return ""
    labels = {arm["name"]: arm["label"] for arm in report["arms"]}
    titles = {
        pair: f"{labels[new]} \u2212 {labels[old]}"
        for pair, (new, old) in _PAIRS.items()
        if pair in gaps
    }

    def group(label: str, note: str, bucket: str) -> charts.Group:
        return charts.Group(
            label,
            note,
            [
                charts.Bar(
                    _PAIRS[pair][0],
                    gap[bucket],
                    gap.get(f"{bucket}_stderr"),
                    f"{titles[pair]}, {label}: {signed(gap[bucket], 4)} nats",
                )
                for pair, gap in gaps.items()
            ],
        )

    groups = [group("All tokens", "", "all")]
    groups += [
        group(
            bucket["bucket"],
            f"{_times(bucket)}, {percent(bucket['share'])} of tokens",
            bucket["bucket"],
        )
        for bucket in buckets
    ]
    spoken = "; ".join(
        f"{one.label}: {', '.join(signed(bar.value) for bar in one.bars)}" for one in groups
    )
    chart = charts.both(
        lambda width: charts.bars(
            groups,
            width,
            f"Difference in validation loss by n-gram frequency ({', '.join(titles.values())}): {spoken}",
            "\u2190 better: difference in loss, nats per token",
            True,
        )
    )
    legend = "".join(
        f"<li>{mark(_PAIRS[pair][0])}{esc(title)}</li>" for pair, title in titles.items()
    )
    note = (
        "<p>Held-out tokens by how often the trigram that ends at the predicted token occurs in the training text. "
        f"{_where(buckets, gaps['memory - moe'])}</p><p>Whiskers: one standard error.</p>"
    )
    return section(
        "By n-gram frequency",
        note,
        f'<figure><ul class="legend">{legend}</ul>{chart}</figure>'
        + _frequency_table(report, buckets, gaps["memory - moe"]),
    )


def _times(bucket: Mapping[str, Any]) -> str:
    low, high = bucket["low"], bucket["high"]
    if low is None:
        return "no trigram"
    if high is None:
        return f"{number(low)} times or more"
    return f"{number(low)} times" if low == high else f"{number(low)}–{number(high)} times"


def _where(buckets: Sequence[Mapping[str, Any]], gap: Mapping[str, float]) -> str:
    """In words, where the memory lowers and where it raises the loss against MoE."""
    found: dict[str, list[str]] = {"lowers": [], "raises": [], "hardly changes": []}
    for bucket in buckets:
        name, value = bucket["bucket"], gap[bucket["bucket"]]
        least = CLEAR * gap.get(f"{name}_stderr", _SAME / CLEAR)
        way = "hardly changes" if abs(value) <= least else "lowers" if value < 0 else "raises"
        found[way].append(f"{esc(name)} ({percent(bucket['share'])})")
    told = [f"{way} the loss on {joined(names)}" for way, names in found.items() if names]
    return f"Against MoE, the memory {joined(told)}; in brackets, the share of tokens."


def _frequency_table(
    report: Report, buckets: Sequence[Mapping[str, Any]], gap: Mapping[str, float]
) -> str:
    arms = [arm for arm in report["arms"] if arm.get("loss_by_frequency")]
    head = ["Trigram", "Tokens", *(esc(arm["label"]) for arm in arms), "Share × difference"]
    rows = [
        [
            esc(f"{bucket['bucket']}, {_times(bucket)}"),
            number(bucket["tokens"]),
            *(fixed(arm["loss_by_frequency"][bucket["bucket"]]) for arm in arms),
            signed(bucket["share"] * gap[bucket["bucket"]]),
        ]
        for bucket in buckets
    ]
    return (
        "<details><summary>Losses as numbers, and what each row contributes to the memory's difference</summary>"
        f"{table('Loss by n-gram frequency', head, rows)}</details>"
    )


def gates(report: Report) -> str:
    """The gate at each token of some sentences, and its mean by n-gram frequency."""
    part = report.get("gates") or {}
    sentences, by_frequency = part.get("sentences") or [], part.get("by_frequency") or []
    if not sentences and not by_frequency:
        return ""
    figures = _heat_map(sentences) if sentences else ""
    if by_frequency:
        times = {
            bucket["bucket"]: f"{_times(bucket)}, " for bucket in report.get("frequency") or []
        }
        groups = [
            charts.Group(
                one["bucket"],
                f"{times.get(one['bucket'], '')}{number(one['tokens'])} tokens",
                [
                    charts.Bar(
                        "memory",
                        one["mean"],
                        None,
                        f"{one['bucket']}: mean gate {fixed(one['mean'], 4)}",
                    )
                ],
            )
            for one in by_frequency
        ]
        spoken = "; ".join(f"{one['bucket']} {fixed(one['mean'])}" for one in by_frequency)
        figures += (
            "<h3>Mean gate by n-gram frequency</h3><figure>"
            + charts.both(
                lambda width: charts.bars(
                    groups, width, f"Mean gate by n-gram frequency: {spoken}", "mean gate", False
                )
            )
            + "</figure>"
        )
    note = (
        f"<p>The gate of the memory in layer {number(part['layer'])} at each token: near 0 the value from the "
        "table is ignored, near 1 it is added in full. It belongs to the n-grams that end at the token itself.</p>"
    )
    return section("Where the gate opens", note, figures)


def _heat_map(sentences: Sequence[Mapping[str, Any]]) -> str:
    """Tokens in reading order, coloured by gate between the rounded lowest and highest of all, the
    value below each."""
    values = [gate for sentence in sentences for gate in sentence["gates"]]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    span = max(high - low, 0.1)
    lines = []
    for sentence in sentences:
        tokens = [visible(token) for token in sentence["tokens"]]
        opens = [before for _, before, _ in tokens[1:]] + [
            False
        ]  # a gap stands behind a chip: lines start flush
        chips = "".join(
            f'<span class="chip{" space" if after or opens_next else ""}" title="gate {gate:.4f}" '
            f'style="--g:{100 * (gate - low) / span:.0f}%"><bdi>{text}</bdi><small>{fixed(gate, 2)}</small></span>'
            for (text, _, after), opens_next, gate in zip(
                tokens, opens, sentence["gates"], strict=True
            )
        )
        lines.append(
            f'<div role="group" class="tokens" aria-label="{esc(sentence["text"])}">{chips}</div>'
        )
    legend = (
        f'<p class="scale"><span>gate {fixed(low, 1)}</span><span class="ramp" aria-hidden="true"></span>'
        f"<span>{fixed(low + span, 1)}</span></p>"
    )
    return f'<figure class="heat">{legend}{"".join(lines)}</figure>'
