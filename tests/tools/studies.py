"""Runs every comparison in its smallest form, and compares losses with the committed results.

    python -m tests.tools.studies [NAME ...] [--update]

It shows that each study runs from its text to its tables. The losses are no result: the models are
tiny, and see 2,048 tokens. --update commits new results to results/smallest, and their pages.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from engraphy.recipes.studies import COMPARISONS, STUDIES
from engraphy.recipes.studies.study import run_study, study_table
from tests.tools.paths import ROOT

RESULTS = ROOT / "results" / "smallest"
CLOSE = 0.02  # nats: other processors add in another order
PAGE = "`engraphy study {0} --smallest`: the smallest form, no result.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    failures = []
    with tempfile.TemporaryDirectory() as work:
        for name in options.names or COMPARISONS:
            out = Path(work) / "results" / name
            begun = time.monotonic()
            study = STUDIES[name].load()
            workers = len(os.sched_getaffinity(0))
            config = study.config.smallest()
            run_study(study, config, out, workers, lambda _: None, Path(work) / "work")
            table = study_table(study, config, out)
            print(f"{name}: {len(list(out.glob('*.json')))} runs, {time.monotonic() - begun:.0f} s")
            if options.update:
                shutil.rmtree(RESULTS / name, ignore_errors=True)
                shutil.copytree(out, RESULTS / name)
                page = f"{PAGE.format(name)}\n{table}\n"
                (RESULTS / f"{name}.md").write_text(page)
            else:
                failures += differences(out, RESULTS / name)
    for failure in failures:
        print(failure, file=sys.stderr)
    sys.exit(bool(failures))


def differences(found: Path, expected: Path) -> list[str]:
    """Runs that are missing or new, and losses that differ by more than CLOSE."""
    losses = {folder: _losses(folder) for folder in (found, expected)}
    lines = []
    for name in sorted(losses[found].keys() ^ losses[expected].keys()):
        side = "committed" if name in losses[expected] else "new"
        lines.append(f"{expected.name}: {name}: expected in both, found in the {side} results")
    for name in sorted(losses[found].keys() & losses[expected].keys()):
        mine, theirs = losses[found][name], losses[expected][name]
        if abs(mine - theirs) > CLOSE:
            lines.append(
                f"{expected.name}: {name}: expected a loss of {theirs:.4f}, found {mine:.4f}"
            )
    return lines


def _losses(folder: Path) -> dict[str, float]:
    paths = sorted(folder.glob("*.json"))
    return {path.name: json.loads(path.read_text())["validation_loss"] for path in paths}


if __name__ == "__main__":
    main()
