"""The report of bench/hundred_billion.py: speeds, losses and where the time goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claim, median_and_error
from hundred_memory import DISK, MEMORY
from hundred_table import read_state, space_of
from hundred_ways import FIXED, NONE, RAM, WAYS
from hundred_workload import Cell, Workload
from probe import machine

ROUNDS = "rounds.jsonl"
LOSS_GOAL = 2.8  # %, of a warm cache read ahead, beside rows in RAM
LAYERS_GOAL = 1.0  # %, of rows in RAM, beside one fixed row
MEMORY_GOAL = 300.0  # MB beyond the cache's budget


def read_rounds(folder: Path, cell: Cell, threads: int) -> list[dict[str, Any]]:
    """The rounds of a cell that were timed with so many threads."""
    path = folder / ROUNDS
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if (line["cell"], line["threads"]) == (cell.name, threads)]


def rounds_of(folder: Path, cell: Cell, threads: int, names: Sequence[str]) -> int:
    """How many rounds have all of these ways."""
    rounds = read_rounds(folder, cell, threads)
    return sum(set(names) <= set(line["seconds"]) for line in rounds)


def loss(rounds: list[dict[str, Any]], name: str, beside: str) -> tuple[float, float] | None:
    """Tokens/s that a way loses beside another, in percent, and the standard error."""
    pairs = [line["seconds"] for line in rounds if {name, beside} <= set(line["seconds"])]
    if len(pairs) < 2:
        return None
    lost = [100 * (1 - pair[beside]["total"] / pair[name]["total"]) for pair in pairs]
    return median_and_error(lost)


def hook_loss(rounds: list[dict[str, Any]], name: str, beside: str) -> tuple[float, float] | None:
    """As `loss`, of the time within the memory's hooks alone: look-up, waiting and fusion. It says
    nothing of what the memory does to the rest of the model, and is far less noisy."""
    pairs = [line["seconds"] for line in rounds if {name, beside} <= set(line["seconds"])]
    if len(pairs) < 2:
        return None
    more = [
        sum(pair[name][key] - pair[beside][key] for key in ("lookup", "layers")) for pair in pairs
    ]
    totals = [pair[name]["total"] for pair in pairs]
    return median_and_error([100 * one / total for one, total in zip(more, totals, strict=True)])


def row_of(rounds: list[dict[str, Any]], cell: Cell, name: str) -> dict[str, Any]:
    """What one way took in a cell: milliseconds are medians a forward."""
    mine = [line for line in rounds if name in line["seconds"]]
    parts = [line["seconds"][name] for line in mine]
    row: dict[str, Any] = {"way": name, "rounds": len(parts)}
    row["tokens_a_second"] = cell.tokens / float(np.median([part["total"] for part in parts]))
    for beside in (NONE, FIXED, RAM):
        row[f"loss_beside_{beside}"] = None if beside == name else loss(rounds, name, beside)
    for beside in (FIXED, RAM):
        in_hooks = None if name in (NONE, beside) else hook_loss(rounds, name, beside)
        row[f"hooks_beside_{beside}"] = in_hooks
    for key in ("total", "lookup", "layers", "wait"):
        row[f"{key}_ms"] = 1e3 * float(np.median([part[key] for part in parts]))
    counts = [line["counts"][name] for line in mine]
    rows = sum(count["rows"] for count in counts)
    row["hits"] = sum(count["hits"] for count in counts) / rows if rows else None
    row["read_ms"] = 1e3 * float(np.median([count["seconds"] for count in counts]))
    return row


def cell_claims(rows: dict[str, dict[str, Any]], title: str) -> list[Claim]:
    """The figures of a cell that have goals."""
    claims = []
    goals = [(RAM, FIXED, LAYERS_GOAL), ("warm-10", RAM, LOSS_GOAL), ("warm-100", RAM, LOSS_GOAL)]
    for name, beside, goal in goals:
        found = rows.get(name, {}).get(f"loss_beside_{beside}")
        if found is not None:
            what = f"{title}: tokens/s that {name} loses beside {beside}"
            claims.append(Claim(what, found[0], "%", goal, "at most", error=found[1]))
    return claims


def memory_claims(folder: Path) -> list[Claim]:
    """How much more memory a way takes than its cache's budget."""
    path = folder / MEMORY
    if not path.exists():
        return []
    claims = []
    for name, taken in json.loads(path.read_text()).items():
        if name == FIXED:
            continue
        beyond = (taken["grown"] - taken["budget"]) / 1e6
        what = f"memory of {name} beyond {taken['budget'] / 1e6:.1f} MB of cache"
        claims.append(Claim(what, beyond, "MB", MEMORY_GOAL, "at most"))
    return claims


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Prints the table of a cell."""
    print(f"\n{title}")
    print(
        f"  {'':10}{'tokens/s':>9}{'lost % beside':>16}{NONE:>4}{FIXED:>16}{RAM:>16}"
        f"{'in hooks':>16}{'look-up':>10}{'layers':>9}{'wait':>9}{'reading':>9}{'hits':>7}"
    )
    for row in rows.values():
        losses = [row[f"loss_beside_{beside}"] for beside in (NONE, FIXED, RAM)]
        losses.append(row[f"hooks_beside_{FIXED if row['way'] == RAM else RAM}"])
        texts = ["" if one is None else f"{one[0]:.2f} +- {one[1]:.2f}" for one in losses]
        hits = "" if row["hits"] is None else f"{row['hits']:.1%}"
        print(
            f"  {row['way']:10}{row['tokens_a_second']:9.1f}{texts[0]:>20}{texts[1]:>16}"
            f"{texts[2]:>16}{texts[3]:>16}{row['lookup_ms']:10.3f}{row['layers_ms']:9.3f}{row['wait_ms']:9.3f}"
            f"{row['read_ms']:9.3f}{hits:>7}"
        )


def report(folder: Path, workload: Workload, path: Path | None) -> None:
    """Prints everything that was measured. path: a JSON file for it."""
    facts = {**machine(folder), "torch": torch.__version__}
    print(" | ".join(f"{key} {value}" for key, value in facts.items()))
    space = space_of(workload)
    table = {
        "parameters": workload.config.table_parameters(),
        "rows": workload.config.row_count(),
        "row_bytes": workload.format.row_bytes,
        "touched_rows": workload.rows,
        "bytes": dataclasses.asdict(space),
        "text": workload.text,
        "tokens": len(workload.ids),
        "sealed": (read_state(folder) or {}).get("sealed", False),
    }
    print("\n".join(f"{key}: {value}" for key, value in table.items()))
    written: dict[str, Any] = {"table": table, "cells": {}}
    for name in (DISK, MEMORY):
        if (folder / name).exists():
            written[name.removesuffix(".json")] = json.loads((folder / name).read_text())
    claims: list[Claim] = []
    for threads in range(1, 257):
        for cell in workload.sizes.cells:
            rounds = read_rounds(folder, cell, threads)
            names = [name for name in WAYS if any(name in line["seconds"] for line in rounds)]
            if not names:
                continue
            title = f"{cell.phase}, batch {cell.batch}, {threads} threads"
            rows = {name: row_of(rounds, cell, name) for name in names}
            show(title, rows)
            written["cells"][title] = list(rows.values())
            claims += cell_claims(rows, title)
    claims += memory_claims(folder)
    print()
    for claim in claims:
        error = "" if claim.error is None else f" +- {claim.error:.2f}"
        print(f"  {claim.what:70}{claim.found:8.2f}{error} {claim.unit}, goal {claim.goal:g}")
    if path is not None:
        written["claims"] = [dataclasses.asdict(claim) for claim in claims]
        content = {"bench": "hundred_billion", "machine": facts, **written}
        path.write_text(json.dumps(rounded(content), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same JSON value with four significant digits, so that the file is small."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return value
