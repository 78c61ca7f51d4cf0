"""The parts of pages in docs/results that follow from the committed runs of studies.

    python -m tests.tools.study_pages [NAME ...] [--update]

A page has such a part after the line that ends with MARK. Without --update it says whether the
pages are up to date.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engraphy.recipes.studies.baseline import BASELINE
from engraphy.recipes.studies.comparison_config import ComparisonConfig
from engraphy.recipes.studies.hot import HOT, HotConfig
from engraphy.recipes.studies.queue import Results
from engraphy.recipes.studies.study import Study, study_table
from engraphy.recipes.studies.where import WHERE
from tests.tools.paths import ROOT

MARK = "one file a run.\n"


@dataclass(frozen=True)
class Page:
    """A page of docs/results, and the study whose tables it ends with.

    Attributes:
        file: Its name in docs/results.
        study: The study.
        config: Its settings.
        command: What runs what is missing.
        results: Folder of the runs, below results.
    """

    file: str
    study: Study
    config: Any
    command: str
    results: str

    @property
    def path(self) -> Path:
        return ROOT / "docs/results" / self.file

    def updated(self) -> str:
        """The page, with the part after MARK as the results give it."""
        head, mark, _ = self.path.read_text().partition(MARK)
        return f"{head}{mark}\n{self._runs()}\n"

    def _runs(self) -> str:
        """Which runs are queued, and the tables of those that are there."""
        folder = ROOT / "results" / self.results
        results = Results(folder, self.study.dtype)
        jobs = self.study.jobs(self.config, results)
        queued = [job.name.removesuffix(".json") for job in jobs if job not in results]
        lines = []
        if queued:
            names = ", ".join(f"`{name}`" for name in queued)
            lines = [f"Queued, in this order (`{self.command}`): {names}.", ""]
        return "\n".join([*lines, study_table(self.study, self.config, folder)])


_CAMPAIGN = ComparisonConfig(tokens=6_000_000, data="mix+books:books", rates=(4e-3, 6e-3))
_TEXT = "--data mix --books books --tokens 6000000"
_SETTINGS = f"{_TEXT} --rate 4e-3 --rate 6e-3"

PAGES: Mapping[str, Page] = {
    "baseline": Page(
        "baseline.md",
        BASELINE,
        _CAMPAIGN,
        f"engraphy study baseline {_SETTINGS}",
        "baseline",
    ),
    "hot": Page(
        "hot-tier.md",
        HOT,
        HotConfig(backbone="wide"),
        "engraphy study hot",
        "hot",
    ),
    "where": Page(
        "where.md",
        WHERE,
        dataclasses.replace(_CAMPAIGN, arm_rates=(("moe", 6e-3), ("memory", 8e-3))),
        f"engraphy study where {_TEXT} --rate moe=6e-3 --rate memory=8e-3",
        "where",
    ),
}
"""The pages, by the names of their studies."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    stale = []
    for name in options.names or PAGES:
        page = PAGES[name]
        text = page.updated()
        if options.update:
            page.path.write_text(text)
        elif text != page.path.read_text():
            stale.append(str(page.path))
    if stale:
        sys.exit(f"not up to date; --update writes them: {', '.join(stale)}")


if __name__ == "__main__":
    main()
