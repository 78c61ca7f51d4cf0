"""The tables and the picture of docs/results/hundred-billion.md, from the JSON of a run.

python bench/hundred_billion.py DIR --only report --json results/hundred-billion/xeon.json
python bench/hundred_page.py results/hundred-billion/xeon.json --svg FILE.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engraphy.recipes.studies.tables import head, row
from engraphy.report.estimates import Estimate, estimates

SHOWN = ("fixed", "warm-100", "warm-10", "disk-10", "cold-10", "sync-warm", "sync-cold")


def cell_table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = ["way", "tokens/s", "loses beside none, %", "beside fixed", "beside ram"]
    titles += ["of it in hooks", "look-up, ms", "layers", "waiting", "reading", "hits"]
    return "\n".join([*head(*titles), *(row(*_cells(one)) for one in rows)])


def _cells(found: Mapping[str, Any]) -> list[str]:
    losses = [found[f"loss_beside_{beside}"] for beside in ("none", "fixed", "ram")]
    losses.append(found["hooks_beside_fixed" if found["way"] == "ram" else "hooks_beside_ram"])
    texts = ["" if loss is None else f"{loss[0]:.2f} ± {loss[1]:.2f}" for loss in losses]
    times = [f"{found[f'{key}_ms']:.2f}" for key in ("lookup", "layers", "wait", "read")]
    hits = "" if not found["hits"] else f"{found['hits']:.0%}"
    return [found["way"], f"{found['tokens_a_second']:.1f}", *texts, *times, hits]


def picture(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    groups = {}
    for name, rows in cells.items():
        if "1 threads" not in name:
            continue
        by_way = {one["way"]: one["loss_beside_ram"] for one in rows}
        found = [(way, by_way.get(way)) for way in SHOWN]
        groups[name.removesuffix(", 1 threads")] = [
            Estimate(way, *loss) for way, loss in found if loss is not None
        ]
    title = "Tokens per second lost beside rows in RAM, by way to read a table of 100e9 parameters"
    return estimates(title, groups, "% of tokens per second lost beside rows in RAM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    for name, rows in result["cells"].items():
        print(f"\n### {name}\n\n{cell_table(rows)}")
    if options.svg:
        options.svg.write_text(picture(result["cells"]))


if __name__ == "__main__":
    main()
