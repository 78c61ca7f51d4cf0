"""Several runs of bench/store.py together: medians of each figure that is asked for, and of each
path. One run is not enough on a virtual machine, which has neighbours.

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
    """The name without what distinguishes the variants of a path; the best variant counts."""
    return re.sub(", (depth|threads=).*", "", name)


def ratios(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str, float], list[float]]:
    """(title, path, other path, asked) -> the path's speed over the other path's, in each run."""
    measured: dict[tuple[str, str, str, float], list[float]] = {}
    for run in runs:
        for figure in run["figures"]:
            if "asked" not in figure:
                continue
            speeds = figure["rows_a_second"]
            for path, asked in figure["asked"].items():
                for least, other in asked:
                    if path in speeds and other in speeds:
                        key = figure["title"], plain(path), plain(other), least
                        measured.setdefault(key, []).append(speeds[path] / speeds[other])
    return measured


def speeds(
    runs: list[dict[str, Any]],
) -> dict[tuple[str, str], tuple[list[float], dict[str, list[float]]]]:
    """(title, path) -> rows a second in each run, and their ratio to those of each path that
    something is compared with."""
    by_path: dict[tuple[str, str], tuple[list[float], dict[str, list[float]]]] = {}
    for run in runs:
        for figure in run["figures"]:
            if "asked" not in figure:
                continue
            measured = figure["rows_a_second"]
            asked = [pair for pairs in figure["asked"].values() for pair in pairs]
            others = {other for _, other in asked if other in measured}
            for path, speed in measured.items():
                own, shares = by_path.setdefault((figure["title"], path), ([], {}))
                own.append(speed)
                for other in others:
                    shares.setdefault(plain(other), []).append(speed / measured[other])
    return by_path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="what --out wrote")
    paths = parser.parse_args().runs
    runs = [json.loads(path.read_text()) for path in paths]
    asked = ratios(runs)
    print("| | path | of | asked | median | lowest to highest |\n|---|---|---|---|---|---|")
    for (title, path, other, least), values in asked.items():
        print(
            f"| {title} | {path} | {other} | {least:g} | {statistics.median(values):.2f} | "
            f"{min(values):.2f} to {max(values):.2f} |"
        )
    below = sum(statistics.median(values) < least for (*_, least), values in asked.items())
    print("\n| | path | k rows/s | of |\n|---|---|---|---|")
    for (title, path), (own, shares) in speeds(runs).items():
        of = ", ".join(
            f"{statistics.median(values):.2f} {other}" for other, values in sorted(shares.items())
        )
        print(f"| {title} | {path} | {statistics.median(own) / 1e3:.1f} | {of} |")
    print(f"\n{len(paths)} runs. Medians below what is asked: {below} of {len(asked)}.")


if __name__ == "__main__":
    main()
