"""Tables: what the documentation prints is what the results in this repository say."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from engraphy.recipes.studies.adapt import ADAPT, AdaptConfig
from engraphy.recipes.studies.demo_study import DEMO, StudyConfig
from engraphy.recipes.studies.study import study_table
from engraphy.recipes.studies.tables import NONE, fixed, head, mean_and_error, p_value, paired, row
from tests.tools.paths import ROOT

MODEL = Path("SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    "study, config",
    [(DEMO, StudyConfig()), (ADAPT, AdaptConfig(MODEL, MODEL, tokens=40_000))],
    ids=["demo", "adapt"],
)
def test_the_documentation_has_the_tables_of_the_results(study, config):
    table = study_table(study, config, ROOT / "results" / study.name)
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")]
    assert "Missing: nothing." in table
    # The pages hold "a ± b" together with spaces that do not break.
    assert any(table in page.replace("\u00a0", " ") for page in pages)


def test_arms_that_were_given_have_rows_of_their_own():
    config = AdaptConfig(MODEL, MODEL, 40_000, rates=(("lora-dense", 3e-4),))
    table = study_table(ADAPT, config, ROOT / "results" / "adapt-low")
    label = "LoRA, as many parameters as the memory's dense layers"
    assert f"| {label} | 0.0003 | 3 | 610,560 | 0 (0) | 2.4 | 2.1708 |" in table
    assert "Missing: nothing." in table and "seed 0 |" not in table


def test_the_error_is_that_of_a_mean_over_seeds():
    values = [1.0, 2.0, 6.0]
    error = statistics.stdev(values) / 3**0.5
    assert mean_and_error(values) == f"+3.0000 ± {error:.4f}"  # two errors: not beyond chance
    assert mean_and_error([-0.25], digits=1) == "-0.2"


@pytest.mark.parametrize(
    "seeds, t", [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (11, 2.228)]
)
def test_the_p_value_is_that_of_published_tables(seeds, t):
    """Means at the bound of Student's distribution at 5 %, by the number of values."""
    spread = np.arange(seeds) - (seeds - 1) / 2
    error = statistics.stdev(spread) / seeds**0.5
    for sign in (1, -1):
        assert p_value(spread + sign * t * error) == pytest.approx(0.05, abs=1e-4)
    assert mean_and_error(spread + 1.01 * t * error, 1).endswith(" *")
    assert not mean_and_error(spread + 0.99 * t * error, 1).endswith("*")


def test_equal_differences_are_beyond_chance_unless_they_are_none():
    assert p_value([0.5, 0.5, 0.5]) == 0 and p_value([0.0, 0.0]) == 1


def test_differences_are_of_the_seeds_that_both_have():
    one = {0: {"loss": 3.0}, 2: {"loss": 5.0}, 4: {}}
    other = {2: {"loss": 1.0}, 3: {"loss": 9.0}, 0: {"loss": 1.0}, 4: {"loss": 1.0}}
    assert paired(one, other, lambda result: result.get("loss")) == [2.0, 4.0]


def test_cells_without_a_value_are_marked():
    assert [*head("a", "b"), row("c", fixed(None)), row("d", fixed(0.5, 1))] == [
        "| a | b |",
        "|---|---|",
        f"| c | {NONE} |",
        "| d | 0.5 |",
    ]
