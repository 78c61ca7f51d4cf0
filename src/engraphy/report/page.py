"""The page of a demo run: one HTML file with nothing outside it, and the numbers as JSON beside it.

`render` turns the dict of a run (format "engraphy-report-1") into the page, `write` puts both files
into a folder. Every section but the headline and the comparison is left out when its part of the
dict is missing. The page holds no script, and its content security policy forbids loading anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.files import publish_file
from . import charts, learned
from .markup import (
    change,
    digits_for,
    esc,
    fixed,
    mark,
    number,
    pairs,
    plus_minus,
    section,
    signed,
    size,
    table,
)

FORMAT = "engraphy-report-1"
_STYLE = Path(__file__).with_name("report.css")
_EQUAL = 0.01  # relative difference of parameter counts that still counts as equal
_NONE = "–"
_SPEED = "Tokens/s, whole steps, while the arms share the machine"
_TERMS = {"cpu": "CPU", "isa": "instruction set", "native": "native core"}

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """The report of a demo run as one self-contained HTML page.

    report: plain dicts, lists, strings and numbers in format "engraphy-report-1"; losses in nats
    per token. Raises ConfigError for another format, a number that is not finite, or a missing or
    malformed field.
    """
    if report.get("format") != FORMAT:
        raise ConfigError(f"report: expected format {FORMAT!r}, found {report.get('format')!r}")
    _check_finite(report, "report")
    _check_arms(report)
    parts = (
        _headline,
        _comparison,
        _curves,
        learned.frequency,
        learned.gates,
        _continuations,
        _run,
    )
    try:
        body = "\n".join(part(report) for part in parts)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        message = f"report: expected the fields of {FORMAT}, found {type(error).__name__}: {error}"
        raise ConfigError(message) from error
    return _PAGE.format(style=_STYLE.read_text(encoding="utf-8"), body=body)


def write(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Write report.json and report.html into `folder` (created if need be); returns the path of the
    page.

    Both are complete before either is put in place, each by a rename. Raises ConfigError as
    `render` does, and for values that JSON cannot hold, and WriteFailed if the system refuses;
    nothing has been written then.
    """
    page = render(report)
    try:
        body = json.dumps(report, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"report: expected values that JSON can hold, found {error}") from error
    folder = Path(folder)
    with (
        publish_file(folder / "report.json") as numbers,
        publish_file(folder / "report.html") as shown,
    ):
        for file, text in ((numbers, body), (shown, page)):
            file.write(text.encode())
            file.flush()
    return folder / "report.html"


def _headline(report: Report) -> str:
    """The result with number, sign and standard error as they came out: lower, higher, or no clear
    difference."""
    arms = {arm["name"]: arm for arm in report["arms"]}
    moe, memory, data = arms["moe"], arms["memory"], report.get("data", {})
    difference = report["differences"]["memory - moe"]
    gap, error = difference["all"], difference.get("all_stderr")
    digits = digits_for(error)
    if error is None:
        verdict, kind = "No standard error: whether the memory makes a difference is open", "tie"
    elif abs(gap) <= learned.CLEAR * error:
        verdict, kind = "The memory makes no clear difference to validation loss", "tie"
    else:
        way, kind = ("lowers", "lower") if gap < 0 else ("raises", "higher")
        verdict = f"The memory {way} validation loss"
    over = "held-out documents"
    if "heldout_documents" in data:
        over = f"{number(data['heldout_documents'])} {over}"
    spread = "" if error is None else f"± {fixed(error, digits)}"
    reading = (
        "" if error is None else f"; ± one standard error of the paired\ndifference over {over}"
    )
    perplexity = [math.exp(arm["validation_loss"]) for arm in (memory, moe)]
    facts = [
        f"Validation loss {fixed(memory['validation_loss'])} against {fixed(moe['validation_loss'])} nats per token; "
        f"perplexity {fixed(perplexity[0], 1)} against {fixed(perplexity[1], 1)} ({change(*perplexity)}).",
        _budget(moe["parameters"], memory["parameters"]),
    ]
    if error is None:
        facts.insert(
            0, "Fewer than two held-out documents: how far another one would be off is not known."
        )
    elif kind == "tie":
        facts.insert(0, "The difference is within two standard errors of zero.")
    if "seed" in report:
        covers = (
            ""
            if error is None
            else ": the standard error covers the documents, not the variation from run to run"
        )
        facts.append(f"One run per arm, seed {number(report['seed'])}{covers}.")
    alarm = ""
    if report.get("logits_equal") is False:
        alarm = (
            '<p class="alarm" role="alert"><strong>Check failed:</strong> '
            "the logits of the saved and reopened table differ from those of the trained one.</p>"
        )
    made = f"<span>{esc(report['created'])}</span>" if "created" in report else ""
    return f"""<header>
<p class="brand"><strong>Engraphy</strong> <span>demo report</span>{made}</p>{alarm}
<div class="hero"><div>
<h1>{verdict}</h1>
<p class="result {kind}"><span class="gap">{signed(gap, digits)}</span> <span class="error">{spread}
nats per token</span></p>
<p class="reading">{esc(memory["label"])} minus {esc(moe["label"])}, validation loss{reading}.</p>
<ul>{"".join(f"<li>{fact}</li>" for fact in facts)}</ul>
</div><figure>{charts.ladder(report["arms"], 400)}</figure></div>
</header>"""


def _budget(moe: Mapping[str, int], memory: Mapping[str, int]) -> str:
    counts = {kind: (memory[kind], moe[kind]) for kind in ("total", "activated")}
    equal = all(abs(new - old) <= _EQUAL * old for new, old in counts.values())
    told = ", ".join(
        f"{kind} {number(new)} against {number(old)} ({change(new, old)})"
        for kind, (new, old) in counts.items()
    )
    return f"{'Equal' if equal else '<strong>Unequal</strong>'} parameters: {told}."


def _comparison(report: Report) -> str:
    arms, differences = report["arms"], report["differences"]
    steps = [differences.get(f"{new['name']} - {old['name']}") for old, new in pairwise(arms)]
    losses = [
        f"<strong>{fixed(arm['validation_loss'])}</strong>{plus_minus(arm.get('validation_stderr'))}"
        for arm in arms
    ]
    rows = [
        ["<strong>Validation loss, nats per token</strong>", *losses],
        [
            "Minus the arm to its left",
            _NONE,
            *(
                signed(step["all"], digits_for(step.get("all_stderr")))
                + plus_minus(step.get("all_stderr"))
                if step
                else _NONE
                for step in steps
            ),
        ],
        ["Perplexity", *(fixed(math.exp(arm["validation_loss"]), 1) for arm in arms)],
    ]
    for kind, label in (
        ("total", "Parameters in total"),
        ("activated", "… activated per token"),
        ("table", "… in the table"),
        ("embedding", "… in the token embedding"),
    ):
        rows.append([label, *(number(arm["parameters"].get(kind) or 0) for arm in arms)])
    kept = [arm.get("table") for arm in arms]
    rows.append(["Table rows", *(number(one["rows"]) if one else _NONE for one in kept)])
    rows.append(["Table size", *(size(one["bytes"]) if one else _NONE for one in kept)])
    for key, label, digits in (
        ("tokens_per_second", _SPEED, 0),
        ("seconds", "Training time, s", 0),
        ("max_expert_load", "Highest expert load, × mean", 2),
    ):
        if any(arm.get(key) is not None for arm in arms):
            rows.append(
                [
                    label,
                    *(_NONE if arm.get(key) is None else fixed(arm[key], digits) for arm in arms),
                ]
            )
    head = [
        '<span class="sr">Measure</span>',
        *(mark(arm["name"]) + esc(arm["label"]) for arm in arms),
    ]
    note = (
        "<p>All arms train on the same tokens. ± is one standard error over documents; that of a difference is "
        "paired by document, and usually smaller than those of the losses.</p>"
    )
    return section("Comparison", note, table("Comparison of the arms", head, rows))


def _curves(report: Report) -> str:
    arms = report["arms"]
    if not any(arm.get("curve") or arm.get("heldout_curve") for arm in arms):
        return ""
    held = [{tokens: loss for tokens, loss in arm.get("heldout_curve") or []} for arm in arms]
    rows = [
        [number(tokens), *(fixed(losses[tokens]) if tokens in losses else _NONE for losses in held)]
        for tokens in sorted({tokens for losses in held for tokens in losses})
    ]
    details = ""
    if rows:
        numbers = table(
            "Held-out losses", ["Training tokens", *(esc(arm["label"]) for arm in arms)], rows
        )
        details = f"<details><summary>Held-out losses as numbers</summary>{numbers}</details>"
    note = (
        "<p>Lines: training loss, moving average over 3 % of the steps. Marks: held-out loss. At the right: "
        "validation loss of the finished models. The steep start lies above the axis.</p>"
    )
    figure = f"<figure>{charts.both(lambda width: charts.curves(arms, width))}</figure>"
    return section("Loss over training", note, figure + details)


def _continuations(report: Report) -> str:
    arms = [arm for arm in report["arms"] if arm.get("continuations")]
    if not arms:
        return ""
    cards = []
    for prompt in dict.fromkeys(one["prompt"] for arm in arms for one in arm["continuations"]):
        texts = [
            (arm, one["text"])
            for arm in arms
            for one in arm["continuations"]
            if one["prompt"] == prompt
        ]
        columns = "".join(
            f"<div><h4>{mark(arm['name'])}{esc(arm['label'])}</h4>"
            f'<p class="text" dir="auto"><span class="prompt">{esc(prompt)}</span>{esc(text)}</p></div>'
            for arm, text in texts
        )
        cards.append(f'<div class="columns">{columns}</div>')
    note = (
        "<p>The same prompts, in grey, continued by each model. "
        "At this size expect the shape of the text, not facts.</p>"
    )
    return section("Continuations", note, "".join(cards), "full")


def _run(report: Report) -> str:
    """How to get the same page again, and what it was made with."""
    command = (
        f'<pre class="command"><code>{esc(report["command"])}</code></pre>'
        if "command" in report
        else ""
    )
    data, kept, equal = (
        dict(report.get("data", {})),
        dict(report.get("table") or {}),
        report.get("logits_equal"),
    )
    if "bytes" in kept:
        kept["size"] = f"{number(kept.pop('bytes'))} bytes"
    blocks = [
        ("Settings", report.get("settings", {})),
        ("Text", data),
        ("Machine", report.get("machine", {})),
        ("Versions", report.get("versions", {})),
        ("Table", kept),
    ]
    if equal is not None:
        blocks.append(
            (
                "Check",
                {
                    "logits": "equal bit for bit after saving and reopening the table"
                    if equal
                    else "NOT equal after saving and reopening the table"
                },
            )
        )
    shown = "".join(
        f"<div><h3>{title}</h3>{pairs((_words(key), _value(key, value)) for key, value in items.items())}</div>"
        for title, items in blocks
        if items
    )
    if not command and not shown:
        return ""
    return section("How this was run", "", command + f'<div class="blocks">{shown}</div>', "full")


def _words(key: str) -> str:
    return _TERMS.get(key, key.replace("_", " ").replace("heldout", "held-out"))


def _value(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    return f"<code>{esc(value)}</code>" if key in ("table_id", "address_digest") else esc(value)


def _check_finite(value: object, place: str) -> None:
    """Raises ConfigError naming the first number that is not finite."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = ((f".{key}", inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((f"[{index}]", inner) for index, inner in enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: expected a finite number, found {value}")
    for step, inner in items:
        _check_finite(inner, f"{place}{step}")


def _check_arms(report: Report) -> None:
    names = [arm.get("name") for arm in report.get("arms") or []]
    if not {"moe", "memory"} <= set(names) <= set(charts.ARMS) or len(set(names)) < len(names):
        raise ConfigError(
            f"report: expected the arms {', '.join(charts.ARMS)} once each, found {names}"
        )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Engraphy demo report</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
