"""What several runs of bench/store.py found for each figure that is asked, and for each path: a
virtual machine has neighbours.

    for n in 1 2 3; do python bench/store.py --peer DIR --out results/store/run-$n.json; done
    python bench/store_runs.py results/store/*.json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any


def plain(name: str) -> str:
    """Without what tells the variants of a path apart, of which the best counts."""
    return re.sub(", (depth|threads=).*", "", name)


def ratios(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str, float], list[float]]:
    """(title, path, other path, asked) -> how many times as many rows a second the path had, in
    each run."""
    found: dict[tuple[str, str, str, float], list[float]] = {}
    for run in runs:
        for figure in run["figures"]:
            if "asked" not in figure:
                continue
            speeds = figure["rows_a_second"]
            for path, asked in figure["asked"].items():
                for least, other in asked:
                    if path in speeds and other in speeds:
                        key = figure["title"], plain(path), plain(other), least
                        found.setdefault(key, []).append(speeds[path] / speeds[other])
    return found


def speeds(
    runs: list[dict[str, Any]],
) -> dict[tuple[str, str], tuple[list[float], dict[str, list[float]]]]:
    """(title, path) -> rows a second in each run, and how many times those of each path that
    something is asked of."""
    found: dict[tuple[str, str], tuple[list[float], dict[str, list[float]]]] = {}
    for run in runs:
        for figure in run["figures"]:
            if "asked" not in figure:
                continue
            measured = figure["rows_a_second"]
            others = {
                other
                for asked in figure["asked"].values()
                for _, other in asked
                if other in measured
            }
            for path, speed in measured.items():
                each, shares = found.setdefault((figure["title"], path), ([], {}))
                each.append(speed)
                for other in others:
                    shares.setdefault(plain(other), []).append(speed / measured[other])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="what --out wrote")
    paths = parser.parse_args().runs
    runs = [json.loads(path.read_text()) for path in paths]
    found = ratios(runs)
    print("| | path | of | asked | median | lowest to highest |\n|---|---|---|---|---|---|")
    for (title, path, other, least), values in found.items():
        print(
            f"| {title} | {path} | {other} | {least:g} | {statistics.median(values):.2f} | "
            f"{min(values):.2f} to {max(values):.2f} |"
        )
    below = sum(statistics.median(values) < least for (*_, least), values in found.items())
    print("\n| | path | k rows/s | of |\n|---|---|---|---|")
    for (title, path), (each, shares) in speeds(runs).items():
        of = ", ".join(
            f"{statistics.median(values):.2f} {other}" for other, values in sorted(shares.items())
        )
        print(f"| {title} | {path} | {statistics.median(each) / 1e3:.1f} | {of} |")
    print(f"\n{len(paths)} runs. Medians below what is asked: {below} of {len(found)}.")


if __name__ == "__main__":
    main()
