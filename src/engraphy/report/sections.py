"""The values of a report's sections: what the templates show, as text and charts.

Each function takes the dict of a run and returns the values of one section, or None if the run has
nothing for it. It reads every field that its template needs, so that a malformed report fails here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from . import charts
from .markup import change, digits_for, fixed, number, plus_minus, signed, size

Report = Mapping[str, Any]

CLEAR = 2.0
"""Standard errors from zero: a difference beyond them counts as one."""

NONE = "–"
_EQUAL = 0.01  # relative difference of parameter counts that still counts as equal
_SPEED = "Tokens/s, whole steps, while the arms share the machine"
_TERMS = {"cpu": "CPU", "isa": "instruction set", "native": "native core"}
_IDENTITIES = ("table_id", "address_digest")  # shown as code


@dataclass(frozen=True)
class ArmName:
    """An arm as the page names it.

    Attributes:
        name: A key of charts.ARMS; chooses mark and colour.
        label: What the reader sees.
    """

    name: str
    label: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        error: A standard error, shown smaller behind it; may be empty.
    """

    text: str
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: Head of the row.
        cells: One for each further column.
        strong: True for the row that matters most.
    """

    label: str
    cells: Sequence[Cell]
    strong: bool = False


@dataclass(frozen=True)
class Budget:
    """Parameters of one kind in two arms, and their relative change."""

    kind: str
    memory: str
    moe: str
    change: str


@dataclass(frozen=True)
class Headline:
    """The result, with number, sign and standard error as they came out.

    Attributes:
        created: When the report was made; may be empty.
        logits_differ: True if the reopened table gave other logits.
        verdict: What came out, in words.
        kind: "lower", "higher" or "tie".
        gap: Loss of the memory arm minus that of MoE.
        stderr: Standard error of `gap`; empty if it is not known.
        documents: What the standard error covers.
        labels: Labels of the memory arm and of MoE; `losses` and `perplexities` too.
        losses: Validation losses.
        perplexities: Perplexities of the validation losses.
        perplexity_change: Relative change of the perplexity.
        budgets: Parameters of both arms.
        equal: True if the budgets are equal.
        seed: Seed of the run; may be empty.
        ladder: Chart of the losses.
    """

    created: object
    logits_differ: bool
    verdict: str
    kind: str
    gap: str
    stderr: str
    documents: str
    labels: tuple[str, str]
    losses: tuple[str, str]
    perplexities: tuple[str, str]
    perplexity_change: str
    budgets: Sequence[Budget]
    equal: bool
    seed: str
    ladder: Markup


def headline(report: Report) -> Headline:
    """Returns the values of the headline: lower, higher, or no clear difference.

    Args:
        report: The dict of a run.
    """
    arms = {arm["name"]: arm for arm in report["arms"]}
    pair = (arms["memory"], arms["moe"])
    difference = report["differences"]["memory - moe"]
    gap, error = difference["all"], difference.get("all_stderr")
    digits = digits_for(error)
    verdict, kind = _verdict(gap, error)
    documents = "held-out documents"
    data = report.get("data", {})
    if "heldout_documents" in data:
        documents = f"{number(data['heldout_documents'])} {documents}"
    seed = number(report["seed"]) if "seed" in report else ""
    losses = [arm["validation_loss"] for arm in pair]
    perplexities = [math.exp(loss) for loss in losses]
    memory, moe = (arm["parameters"] for arm in pair)
    kinds = ("total", "activated")
    return Headline(
        created=report.get("created", ""),
        logits_differ=report.get("logits_equal") is False,
        verdict=verdict,
        kind=kind,
        gap=signed(gap, digits),
        stderr="" if error is None else fixed(error, digits),
        documents=documents,
        labels=(pair[0]["label"], pair[1]["label"]),
        losses=(fixed(losses[0]), fixed(losses[1])),
        perplexities=(fixed(perplexities[0], 1), fixed(perplexities[1], 1)),
        perplexity_change=change(*perplexities),
        budgets=[_budget(kind, memory[kind], moe[kind]) for kind in kinds],
        equal=all(abs(memory[kind] - moe[kind]) <= _EQUAL * moe[kind] for kind in kinds),
        seed=seed,
        ladder=charts.ladder(report["arms"], 400),
    )


def _verdict(gap: float, error: float | None) -> tuple[str, str]:
    """What came out, in words, and as "lower", "higher" or "tie"."""
    if error is None:
        return "No standard error: whether the memory makes a difference is open", "tie"
    if abs(gap) <= CLEAR * error:
        return "The memory makes no clear difference to validation loss", "tie"
    if gap < 0:
        return "The memory lowers validation loss", "lower"
    return "The memory raises validation loss", "higher"


def _budget(kind: str, memory: int, moe: int) -> Budget:
    return Budget(kind, number(memory), number(moe), change(memory, moe))


@dataclass(frozen=True)
class Comparison:
    """The arms side by side: a column for each, a row for each measure."""

    arms: Sequence[ArmName]
    rows: Sequence[Row]


def comparison(report: Report) -> Comparison:
    """Returns the values of the table that compares the arms.

    Args:
        report: The dict of a run.
    """
    arms = report["arms"]
    losses = [
        Cell(fixed(arm["validation_loss"]), plus_minus(arm.get("validation_stderr")))
        for arm in arms
    ]
    rows = [
        Row("Validation loss, nats per token", losses, strong=True),
        Row("Minus the arm to its left", _steps(report)),
        _row("Perplexity", [fixed(math.exp(arm["validation_loss"]), 1) for arm in arms]),
    ]
    for kind, label in (
        ("total", "Parameters in total"),
        ("activated", "… activated per token"),
        ("table", "… in the table"),
        ("embedding", "… in the token embedding"),
    ):
        rows.append(_row(label, [number(arm["parameters"].get(kind) or 0) for arm in arms]))
    tables = [arm.get("table") for arm in arms]
    rows.append(_row("Table rows", [number(one["rows"]) if one else NONE for one in tables]))
    rows.append(_row("Table size", [size(one["bytes"]) if one else NONE for one in tables]))
    for key, label, digits in (
        ("tokens_per_second", _SPEED, 0),
        ("seconds", "Training time, s", 0),
        ("max_expert_load", "Highest expert load, × mean", 2),
    ):
        values = [arm.get(key) for arm in arms]
        if any(value is not None for value in values):
            texts = [NONE if value is None else fixed(value, digits) for value in values]
            rows.append(_row(label, texts))
    return Comparison(_names(arms), rows)


def _steps(report: Report) -> list[Cell]:
    """The difference of each arm from the arm to its left, if the report has it."""
    cells = [Cell(NONE)]
    for old, new in pairwise(report["arms"]):
        step = report["differences"].get(f"{new['name']} - {old['name']}")
        if not step:
            cells.append(Cell(NONE))
            continue
        error = step.get("all_stderr")
        cells.append(Cell(signed(step["all"], digits_for(error)), plus_minus(error)))
    return cells


def _row(label: str, texts: Sequence[str]) -> Row:
    return Row(label, [Cell(text) for text in texts])


def _names(arms: Sequence[Mapping[str, Any]]) -> list[ArmName]:
    return [ArmName(arm["name"], arm["label"]) for arm in arms]


@dataclass(frozen=True)
class Curves:
    """Loss over training.

    Attributes:
        chart: The curves.
        arms: Columns of the table.
        rows: Held-out losses by training tokens; may be empty.
    """

    chart: charts.Chart
    arms: Sequence[ArmName]
    rows: Sequence[Row]


def curves(report: Report) -> Curves | None:
    """Returns the values of the training curves, or None if no arm has one.

    Args:
        report: The dict of a run.
    """
    arms = report["arms"]
    if not any(arm.get("curve") or arm.get("heldout_curve") for arm in arms):
        return None
    losses = [_by_tokens(arm.get("heldout_curve") or []) for arm in arms]
    rows = []
    for tokens in sorted(set().union(*losses)):
        texts = [fixed(loss[tokens]) if tokens in loss else NONE for loss in losses]
        rows.append(_row(number(tokens), texts))
    return Curves(charts.both(lambda width: charts.curves(arms, width)), _names(arms), rows)


def _by_tokens(curve: Sequence[Sequence[Any]]) -> dict[int, float]:
    return {tokens: loss for tokens, loss in curve}


@dataclass(frozen=True)
class Continuation:
    """What an arm wrote after a prompt."""

    arm: ArmName
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with its continuations, one for each arm that has one."""

    text: str
    continuations: Sequence[Continuation]


def continuations(report: Report) -> list[Prompt] | None:
    """Returns the prompts in their order, or None if no arm has continued one.

    Args:
        report: The dict of a run.
    """
    by_prompt: dict[str, list[Continuation]] = {}
    for arm in report["arms"]:
        name = ArmName(arm["name"], arm["label"])
        for one in arm.get("continuations") or []:
            by_prompt.setdefault(one["prompt"], []).append(Continuation(name, one["text"]))
    prompts = [Prompt(text, texts) for text, texts in by_prompt.items()]
    return prompts or None


@dataclass(frozen=True)
class Term:
    """A line of a block: what it says, and True if the value is shown as code."""

    name: str
    value: object
    code: bool


@dataclass(frozen=True)
class Block:
    """Terms under a title."""

    title: str
    terms: Sequence[Term]


@dataclass(frozen=True)
class Run:
    """How to get the same page again, and what it was made with.

    Attributes:
        command: The command line; None if it is not known.
        blocks: What was recorded; may be empty if there is a command.
    """

    command: object
    blocks: Sequence[Block]


def run(report: Report) -> Run | None:
    """Returns the values of "How this was run", or None if nothing was recorded.

    Args:
        report: The dict of a run.
    """
    table = dict(report.get("table") or {})
    if "bytes" in table:
        table["size"] = f"{number(table.pop('bytes'))} bytes"
    recorded = {
        "Settings": report.get("settings", {}),
        "Text": report.get("data", {}),
        "Machine": report.get("machine", {}),
        "Versions": report.get("versions", {}),
        "Table": table,
        "Check": _check(report.get("logits_equal")),
    }
    blocks = [Block(title, _terms(items)) for title, items in recorded.items() if items]
    command = report.get("command")
    return Run(command, blocks) if blocks or command is not None else None


def _check(logits_equal: bool | None) -> dict[str, str]:
    if logits_equal is None:
        return {}
    result = "equal bit for bit" if logits_equal else "NOT equal"
    return {"logits": f"{result} after saving and reopening the table"}


def _terms(items: Mapping[str, Any]) -> list[Term]:
    return [_term(key, value) for key, value in items.items()]


def _term(key: str, value: object) -> Term:
    name = _TERMS.get(key, key.replace("_", " ").replace("heldout", "held-out"))
    if isinstance(value, bool):
        return Term(name, "yes" if value else "no", False)
    if isinstance(value, (int, float)):
        return Term(name, number(value), False)
    return Term(name, value, key in _IDENTITIES)
