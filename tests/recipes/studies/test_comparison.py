"""Comparisons: equal arms, and pages that the committed results of the smallest form give."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from engraphy import VocabMap
from engraphy.cli.arguments import split_rates
from engraphy.errors import ConfigError
from engraphy.lm.loop import Run
from engraphy.recipes.studies import COMPARISONS, STUDIES
from engraphy.recipes.studies.arm_recipe import ArmRecipe, build
from engraphy.recipes.studies.backbones import backbone
from engraphy.recipes.studies.comparison import Comparison, ComparisonConfig
from engraphy.recipes.studies.study import run_one, study_table
from tests.tools.paths import ROOT
from tests.tools.study_pages import PAGES

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


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_runs_of_a_study_give_its_page_to_the_letter(name):
    assert PAGES[name].updated() == PAGES[name].path.read_text()


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


def test_a_smallest_form_leaves_no_checkpoint_that_a_real_run_would_find(tmp_path):
    study = comparison("allocation")
    small = SMALLEST.job("rho-1", 0, 3e-3)
    real = ComparisonConfig(backbone="Engram-27B/20").job("rho-1", 0, 3e-3)
    folders = [
        study._folder(job, config, tmp_path)
        for job, config in ((small, SMALLEST), (real, ComparisonConfig()))
    ]
    assert folders[0] != folders[1]
    assert {len(folder.relative_to(tmp_path).parts) for folder in folders} == {3}


def test_studies_share_the_training_of_equal_arms_and_of_no_others(tmp_path):
    def folder(study: str, arm: str, rho: float | None = None) -> Path:
        config = dataclasses.replace(SMALLEST, rho=rho)
        return comparison(study)._folder(config.job(arm, 0, 3e-3), config, tmp_path)

    assert folder("baseline", "moe") == folder("allocation", "rho-1") == folder("where", "moe", 0.5)
    assert folder("controls", "memory") == folder("allocation", "rho-0.75")
    assert folder("controls", "no-conv", 0.5) == folder("ablation", "no-conv", 0.5)
    names = {folder("baseline", arm) for arm in comparison("baseline").recipes(SMALLEST)}
    names |= {folder("ablation", arm, 0.5) for arm in comparison("ablation").recipes(SMALLEST)}
    assert len(names) == sum(len(comparison(s).recipes(SMALLEST)) for s in ("baseline", "ablation"))
    hot = STUDIES["hot"].load().config.smallest()
    own = comparison("hot")._folder(hot.job("none", 0, 3e-3), hot, tmp_path)
    assert own.relative_to(tmp_path).parts[0] == "hot"  # it is watched while it trains


def words(folder: Path) -> Path:
    """A text of forty documents."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(2000)]
    documents = [" ".join(words[start : start + 50]) for start in range(0, len(words), 50)]
    text = folder / "words.txt"
    text.write_text("\f".join(documents))
    return text


def run_arm(study: str, arm: str, config: ComparisonConfig, out: Path, work: Path) -> str:
    """Runs an arm at the first rate. Returns its line."""
    record = comparison(study).study
    job = config.job(arm, 0, config.rates[0])
    record.prepare(config, [job], work)
    out.mkdir(parents=True)
    return run_one(job, record, config, out, work)


def test_an_arm_that_another_study_has_trained_is_only_measured(tmp_path, monkeypatch):
    config = ComparisonConfig((0,), 512, str(words(tmp_path)), "smallest", (3e-3,))
    run_arm("baseline", "moe", config, tmp_path / "results/baseline", tmp_path)
    monkeypatch.setattr(Run, "step", lambda run: pytest.fail("a step"))
    run_arm("controls", "moe", config, tmp_path / "elsewhere/controls", tmp_path)
    name = config.job("moe", 0, 3e-3).name
    one, other = tmp_path / "results/baseline" / name, tmp_path / "elsewhere/controls" / name
    assert one.read_text() == other.read_text()


def test_a_result_of_the_same_run_beside_it_is_taken_and_no_other(tmp_path, monkeypatch):
    config = ComparisonConfig((0,), 512, str(words(tmp_path)), "smallest", (3e-3,))
    results = tmp_path / "results"
    run_arm("baseline", "moe", config, results / "baseline", tmp_path / "work")
    first = json.loads((results / "baseline" / config.job("moe", 0, 3e-3).name).read_text())

    monkeypatch.setattr(Run, "step", lambda run: pytest.fail("a step"))
    line = run_arm("allocation", "rho-1", config, results / "allocation", tmp_path / "none")
    job = config.job("rho-1", 0, 3e-3)
    assert line == f"{job.name}: the same as {results / 'baseline' / 'moe-seed0-lr0.003.json'}"
    taken = json.loads((results / "allocation" / job.name).read_text())
    assert taken == first | {"job": job.fields}

    other_runs = {
        "recipe": ("controls", "memory", config),
        "measure": ("where", "moe", config),  # asks for more than the result has
        "tokens": ("allocation", "rho-1", dataclasses.replace(config, tokens=640)),
        "rate": ("allocation", "rho-1", dataclasses.replace(config, rates=(4e-3,))),
    }
    for what, (study, arm, other) in other_runs.items():
        with pytest.raises(pytest.fail.Exception, match="a step"):
            run_arm(study, arm, other, results / what, tmp_path / what)
    (results / "baseline/other-seed0-lr0.003.json").write_text("{")
    with pytest.raises(ConfigError, match="other-seed0-lr0.003.json: expected the result of a run"):
        run_arm("allocation", "rho-0.9", config, results / "damaged", tmp_path / "damaged")


def test_a_result_that_says_more_is_taken_as_well(tmp_path, monkeypatch):
    config = ComparisonConfig((0,), 512, str(words(tmp_path)), "smallest", (3e-3,))
    results = tmp_path / "results"
    run_arm("where", "memory", config, results / "where", tmp_path / "work")
    monkeypatch.setattr(Run, "step", lambda run: pytest.fail("a step"))
    line = run_arm("baseline", "memory", config, results / "baseline", tmp_path / "none")
    name = config.job("memory", 0, 3e-3).name
    assert line == f"{name}: the same as {results / 'where' / name}"


def test_an_arm_whose_rate_is_known_searches_none():
    config = ComparisonConfig((0, 1), rates=(3e-3, 6e-3), arm_rates=(("moe", 4e-3),))
    study = STUDIES["where"].load()
    jobs = study.jobs(config, {})
    assert [(job.seed, job.lr) for job in jobs if job.arm == "moe"] == [(0, 4e-3), (1, 4e-3)]
    assert [(job.seed, job.lr) for job in jobs if job.arm == "memory"] == [(0, 3e-3), (0, 6e-3)]
    assert {job.lr for job in jobs if job.arm == "moe-half"} == {4e-3}
    assert study.cost(config, {}).startswith("13 runs or more, ")
    for arm in ("moe-half", "nothing"):
        other = dataclasses.replace(config, arm_rates=((arm, 4e-3),))
        with pytest.raises(ConfigError, match=f"one of moe, memory, found {arm}"):
            study.jobs(other, {})
    with pytest.raises(ConfigError, match="depth: expected one rate for all arms"):
        depth = dataclasses.replace(config, rates=(3e-3,), arm_rates=(("moe-12", 4e-3),))
        STUDIES["depth"].load().jobs(depth, {})


def test_rates_of_a_command_are_of_all_arms_or_of_one():
    assert split_rates(["6e-3", "memory=0.008", "4e-3"]) == ((4e-3, 6e-3), (("memory", 8e-3),))
    for text in ("fast", "memory=fast"):
        with pytest.raises(ConfigError, match=f"RATE, found '{text}'"):
            split_rates([text])


def test_several_rates_are_searched_on_the_first_seed_and_one_is_not():
    config = ComparisonConfig((0, 1, 2), rates=(3e-3, 6e-3))
    study = STUDIES["baseline"].load()
    assert {(job.seed, job.lr) for job in study.jobs(config, {})} == {(0, 3e-3), (0, 6e-3)}
    one = ComparisonConfig((0, 1, 2), rates=(3e-3,))
    assert {(job.seed, job.lr) for job in study.jobs(one, {})} == {(n, 3e-3) for n in range(3)}


@pytest.mark.parametrize("name", COMPARISONS)
def test_arms_that_search_no_rate_have_one_that_does(name):
    for size in ("smallest", "base", "wide"):
        study = comparison(name)
        base = backbone(size)
        arms, like = study.arms(base).keys(), study.like(base)
        assert like.keys() <= arms
        assert set(like.values()) <= arms - like.keys()


def test_the_cost_counts_what_is_missing_alone():
    study = STUDIES["baseline"].load()
    config = dataclasses.replace(SMALLEST, seeds=(0, 1, 2))
    cost = study.cost(config, {})
    assert cost.startswith("12 runs or more, 0.0M tokens, ")  # three arms on one seed
    done = {job: {"validation_loss": 1.0} for job in study.jobs(SMALLEST, {})}
    assert study.cost(config, done).startswith("3 runs or more, ")
    assert study.cost(SMALLEST, done) == "no run is missing"
    searched = dataclasses.replace(config, rates=(3e-3, 6e-3))
    controls = STUDIES["controls"].load()  # five of nine arms search
    assert controls.cost(searched, {}).startswith("32 runs or more, ")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"backbone": "tall"}, "expected one of smallest, .*found 'tall'"),
        ({"tokens": 0}, "tokens: expected 1 or more"),
        ({"rates": (2e-3, 1e-3)}, "ascending rates"),
        ({"rates": ()}, "ascending rates"),
        ({"rates": (float("nan"),)}, "ascending rates"),
        ({"arm_rates": (("moe", 0.0),)}, "arm_rates: expected one above 0 an arm"),
        ({"arm_rates": (("moe", 1e-3), ("moe", 2e-3))}, "arm_rates: expected one above 0 an arm"),
        ({"rho": 1.5}, "rho: expected a share between 0 and 1, found 1.5"),
        ({"seeds": (1, 1)}, "all different"),
    ],
)
def test_invalid_settings_are_refused(fields, found):
    with pytest.raises(ConfigError, match=found):
        ComparisonConfig(**fields)


def test_arms_keep_the_keys_that_committed_results_have():
    page = PAGES["baseline"]
    recipes = page.study.jobs.__self__.recipes(page.config)
    for path in (ROOT / "results" / "baseline").glob("*.json"):
        result = json.loads(path.read_text())
        assert recipes[result["job"]["arm"]].key(page.config.base) == result["recipe"], path.name


def test_another_draw_begins_with_other_weights_and_has_a_key_of_its_own():
    base, vocab = backbone("smallest"), VocabMap.identity(512)
    arms = [ArmRecipe("a", "moe", draw=draw) for draw in (0, 1, 1)]
    first, other, again = (
        dict(build(arm, base, vocab, 0, 0)[0].named_parameters())["head.weight"] for arm in arms
    )
    assert (other == again).all() and not (first == other).any()
    assert len({arm.key(base) for arm in arms}) == 2
