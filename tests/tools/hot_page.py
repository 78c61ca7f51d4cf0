"""The part of docs/results/hot-tier.md that follows from the runs in results/hot.

    python -m tests.tools.hot_page [--update]

Without --update it says whether the page is up to date.
"""

from __future__ import annotations

import sys

from engraphy.recipes.studies.hot import HOT, HotConfig
from engraphy.recipes.studies.queue import Results
from engraphy.recipes.studies.study import study_table
from tests.tools.paths import ROOT

PAGE = ROOT / "docs/results/hot-tier.md"
RESULTS = ROOT / "results/hot"
MARK = "one file a run.\n"
RATE = 4e-3
"""The first queue: one rate. `engraphy study hot` without --rate adds the search."""


def main() -> None:
    text = updated(PAGE.read_text())
    if "--update" in sys.argv[1:]:
        PAGE.write_text(text)
    elif text != PAGE.read_text():
        sys.exit(f"{PAGE}: not up to date; run it with --update")


def updated(page: str) -> str:
    """The page, with the part after MARK as the results give it."""
    head, mark, _ = page.partition(MARK)
    return f"{head}{mark}\n{section()}\n"


def section() -> str:
    """Which runs are there and which are not, and the tables once the first one is."""
    config = HotConfig(backbone="wide", rates=(RATE,))
    results = Results(RESULTS, HOT.dtype)
    jobs = HOT.jobs(config, results)
    there = [job.name.removesuffix(".json") for job in jobs if job in results]
    queued = [job.name.removesuffix(".json") for job in jobs if job not in results]
    lines = [
        f"There: {_listed(there)}.",
        "",
        f"Queued, in this order (`engraphy study hot --rate {RATE:g}`): {_listed(queued)}. Then "
        "`engraphy study hot` searches the rates of the three main arms.",
    ]
    if there:
        lines += ["", study_table(HOT, config, RESULTS)]
    else:
        lines += ["", "No run has finished, so there is nothing to conclude."]
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


if __name__ == "__main__":
    main()
