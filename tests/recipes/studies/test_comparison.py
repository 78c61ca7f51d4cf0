"""Comparisons: equal arms, and pages that the committed results of the smallest form give."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engraphy import VocabMap
from engraphy.errors import ConfigError
from engraphy.recipes.studies import COMPARISONS, STUDIES
from engraphy.recipes.studies.allocation import ALLOCATION, shares
from engraphy.recipes.studies.arm_recipe import ArmRecipe, build
from engraphy.recipes.studies.backbones import backbone
from engraphy.recipes.studies.comparison import Comparison, ComparisonConfig
from engraphy.recipes.studies.study import study_table
from tests.tools.paths import ROOT

RESULTS = ROOT / "results" / "smallest"
SMALLEST = ComparisonConfig.smallest()


def comparison(name: str) -> Comparison:
    """The comparison behind a study's record."""
    return STUDIES[name].load().jobs.__self__  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_committed_results_of_the_smallest_form_give_its_page_to_the_letter(name):
    page = (RESULTS / f"{name}.md").read_text()
    assert "no result" in page.splitlines()[0]
    study = STUDIES[name].load()
    table = study_table(study, study.config.smallest(), RESULTS / name)
    assert page.partition("\n\n")[2] == table + "\n"
    assert "Missing: nothing." in table


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, "smallest") for name in COMPARISONS),
        ("allocation", "base"),
        ("controls", "Engram-27B/20"),
    ],
)
def test_arms_activate_as_many_parameters_as_the_backbone(name, size):
    base = backbone(size)
    vocab = VocabMap(np.arange(base.moe.vocab_size) * 3 // 4)
    goal = ArmRecipe("MoE", "moe").arm(base, vocab, 1).parameters
    for arm, recipe in comparison(name).arms(base).items():
        counted = recipe.arm(base, vocab, 1).parameters
        assert counted.activated == pytest.approx(goal.activated, rel=0.01), arm
        sizes = recipe.memory or base.memory
        if recipe.kind == "memory" and not sizes.rows_per_head and sizes.cold is None:
            assert counted.total == pytest.approx(goal.total, rel=0.01), arm


@pytest.mark.parametrize("kind", ["dense", "moe", "memory", "adapter"])
def test_counts_are_those_of_the_model_as_built(kind):
    base = backbone("smallest")
    vocab = VocabMap.identity(base.moe.vocab_size)
    recipe = ArmRecipe("an arm", kind)
    _, counted = build(recipe, base, vocab, 1, 0)
    planned = recipe.arm(base, vocab, 1).parameters
    assert counted.activated == pytest.approx(planned.activated, rel=0.01)
    if kind != "adapter":
        assert counted == planned


def test_the_shares_of_an_allocation_end_where_no_expert_is_left_over():
    assert list(shares(backbone("base")).values()) == [1.0, 0.9, 0.75, 0.5, 0.25, 0.125]
    fewer = dataclasses.replace(backbone("base").moe, experts=4)
    few = dataclasses.replace(backbone("base"), moe=fewer)
    assert list(shares(few).values()) == [1.0, 0.9, 0.75, 0.5]


def test_a_smallest_form_leaves_no_checkpoint_that_a_real_run_would_find(tmp_path):
    study = comparison("allocation")
    small = SMALLEST.job("rho-1", 0, 3e-3)
    real = ComparisonConfig(backbone="Engram-27B/20").job("rho-1", 0, 3e-3)
    folders = [study._folder(job, tmp_path) for job in (small, real)]
    assert folders[0] != folders[1]
    assert {len(folder.relative_to(tmp_path).parts) for folder in folders} == {3}


def test_several_rates_are_searched_on_the_first_seed_and_one_is_not():
    config = ComparisonConfig((0, 1, 2), rates=(3e-3, 6e-3))
    jobs = ALLOCATION.jobs(config, {})
    assert {(job.seed, job.lr) for job in jobs} == {(0, 3e-3), (0, 6e-3)}
    one = ComparisonConfig((0, 1, 2), rates=(3e-3,))
    assert {(job.seed, job.lr) for job in ALLOCATION.jobs(one, {})} == {(n, 3e-3) for n in range(3)}


def test_the_cost_counts_what_is_missing_alone():
    study = ALLOCATION
    config = dataclasses.replace(SMALLEST, seeds=(0, 1, 2))
    cost = study.cost(config, {})
    assert cost.startswith("18 runs or more, 0.0M tokens, ")
    done = {job: {"validation_loss": 1.0} for job in study.jobs(SMALLEST, {})}
    assert study.cost(config, done).startswith("6 runs or more, ")
    assert study.cost(SMALLEST, done) == "no run is missing"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"backbone": "tall"}, "expected one of smallest, .*found 'tall'"),
        ({"tokens": 0}, "tokens: expected 1 or more"),
        ({"rates": (2e-3, 1e-3)}, "ascending rates"),
        ({"rates": ()}, "ascending rates"),
        ({"seeds": (1, 1)}, "all different"),
    ],
)
def test_invalid_settings_are_refused(fields, found):
    with pytest.raises(ConfigError, match=found):
        ComparisonConfig(**fields)
