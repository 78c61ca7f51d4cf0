"""The needles study: which share of needle texts it settles on, and what it then asks for."""

from __future__ import annotations

import dataclasses

import pytest

from engraphy.errors import ConfigError
from engraphy.eval.needle_cases import TASKS
from engraphy.recipes.studies.backbones import backbone
from engraphy.recipes.studies.needles import NEEDLES, NeedlesConfig
from engraphy.recipes.studies.study import study_table
from tests.recipes.studies.test_comparison import RESULTS

CONFIG = NeedlesConfig((0, 1, 2), 1_000_000, "mix", "base", (4e-3,))


def result(*scores: float) -> dict:
    """Of one score for all tasks, or one each."""
    each = scores if len(scores) > 1 else scores * len(TASKS)
    needles = {task: {"score": score} for task, score in zip(TASKS, each, strict=True)}
    return {"validation_loss": 4.0, "needles": needles}


def asked(results) -> set[tuple[str, int]]:
    return {(job.arm, job.seed) for job in NEEDLES.jobs(CONFIG, results)}


def moe(share: float, seed: int = 0):
    return CONFIG.job(f"moe-{round(100 * share)}", seed, 4e-3)


def test_shares_are_tried_until_the_baseline_writes_some_answers_and_not_all():
    assert asked({}) == {("moe-25", 0)}
    assert asked({moe(0.25): result(0.1)}) == {("moe-25", 0), ("moe-50", 0)}
    results = {moe(0.25): result(0.1), moe(0.5): result(0.9)}
    assert asked(results) == {("moe-25", 0), ("moe-50", 0), ("moe-35", 0)}
    assert asked({moe(0.25): result(0.9)}) == {("moe-25", 0), ("moe-10", 0)}


def test_two_tasks_have_to_be_in_the_band_whatever_the_mean():
    tried = {("moe-25", 0)}
    assert asked({moe(0.25): result(1.0, 1.0, 0.0, 0.1)}) == {*tried, ("moe-50", 0)}
    assert asked({moe(0.25): result(1.0, 0.9, 0.9, 0.3)}) == {*tried, ("moe-10", 0)}
    assert ("memory-25", 0) in asked({moe(0.25): result(1.0, 1.0, 0.3, 0.7)})


def test_the_right_share_is_run_by_all_arms_and_the_others_by_none():
    results = {moe(0.25): result(0.1), moe(0.5): result(0.5)}
    kinds = ("memory", "early", "one-row", "conv")
    first = {("moe-25", 0), *(("moe-50", seed) for seed in range(3))}
    assert asked(results) == first | {(f"{kind}-50", 0) for kind in kinds}
    results |= {moe(0.5, 1): result(0.0), moe(0.5, 2): result(1.0)}
    assert asked(results) == first | {(f"{k}-50", seed) for k in kinds for seed in range(3)}


def test_three_shares_that_miss_end_the_study():
    results = {moe(share): result(0.05) for share in (0.25, 0.5, 0.9)}
    assert asked(results) == {("moe-25", 0), ("moe-50", 0), ("moe-90", 0)}
    assert NEEDLES.cost(CONFIG, results) == "no run is missing"


def test_the_report_of_three_misses_says_so(tmp_path):
    config = NeedlesConfig.smallest()
    path = RESULTS / "needles"
    (tmp_path / "results").mkdir()
    for source in path.glob("moe-25-seed0*.json"):
        (tmp_path / "results" / source.name).write_text(source.read_text())
    hard = type("Hard", (NeedlesConfig,), {"sizes": property(_hard_sizes)})(
        *(getattr(config, field.name) for field in dataclasses.fields(config))
    )
    page = study_table(NEEDLES, hard, tmp_path / "results")
    assert "50% to 80% of the answers of 2 tasks or more: no share does that so far" in page
    assert "answers written" not in page


def _hard_sizes(self):
    return dataclasses.replace(NeedlesConfig.smallest().sizes, band=(0.5, 0.8))


def test_rows_are_longer_and_a_step_has_as_many_tokens():
    base = CONFIG.base
    usual = backbone("base")
    assert base.length == 2 * usual.length and base.batch == usual.batch // 2
    assert dataclasses.replace(base, length=usual.length, batch=usual.batch) == usual


def test_several_rates_are_refused():
    config = dataclasses.replace(CONFIG, rates=(3e-3, 4e-3))
    with pytest.raises(ConfigError, match="needles: expected one rate"):
        NEEDLES.jobs(config, {})
