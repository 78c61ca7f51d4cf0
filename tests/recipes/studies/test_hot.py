"""The hot-tier study: which runs it asks for, what its numbers mean, and how it judges."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch

from engraphy import VocabMap
from engraphy.addresses import HotIndex, Ngrams
from engraphy.data.packing import Batches
from engraphy.errors import ConfigError
from engraphy.lm import LM, LMConfig, MemorySizes, memory_arm
from engraphy.lm.controls import make_memory
from engraphy.lm.loop import Run, TrainConfig
from engraphy.recipes.studies.arm_recipe import build
from engraphy.recipes.studies.backbones import backbone
from engraphy.recipes.studies.costs import _any_ngrams
from engraphy.recipes.studies.hot import HOT, MAIN, HotConfig, _arms
from engraphy.recipes.studies.hot_collisions import collisions
from engraphy.recipes.studies.hot_paper import _verdict
from engraphy.recipes.studies.hot_values import differences, flips, over_training
from engraphy.recipes.studies.study import study_table
from tests.recipes.studies.test_comparison import RESULTS

CONFIG = HotConfig((0, 1, 2), 1_000_000, "mix", "wide", (3e-3, 4e-3, 6e-3))
ARMS = _arms(CONFIG.base)


def best_at(rates: dict[str, float]) -> dict:
    """Results of the searches of the main arms."""
    results = {}
    for arm, best in rates.items():
        tried = dict.fromkeys((3e-3, 4e-3, 6e-3, best))
        for lr in tried:
            results[CONFIG.job(arm, 0, lr)] = {"validation_loss": 4.0 if lr == best else 5.0}
    return results


def asked(results) -> list[tuple[str, int, float]]:
    return [(job.arm, job.seed, job.lr) for job in HOT.jobs(CONFIG, results) if job not in results]


def test_the_main_arms_search_their_rates_and_the_others_run_once_at_theirs():
    assert {(arm, seed) for arm, seed, _ in asked({})} == {(arm, 0) for arm in MAIN}
    results = best_at({"none": 4e-3, "hash": 4e-3, "hot": 4e-3})
    jobs = asked(results)
    main, others = jobs[:6], jobs[6:]
    assert set(main) == {(arm, seed, 4e-3) for arm in MAIN for seed in (1, 2)}
    assert {arm for arm, *_ in others} == ARMS.keys() - set(MAIN)
    assert {(seed, lr) for _, seed, lr in others} == {(0, 4e-3)}


def test_the_noise_is_measured_at_the_rate_of_the_arm_that_has_it():
    rates = {"none": 4e-3, "hash": 4e-3, "hot": 4e-3}
    assert ("noise", 0, 4e-3) in asked(best_at(rates))
    results = best_at(rates)
    for lr in (3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2):
        results[CONFIG.job("hot", 0, lr)] = {"validation_loss": 5.0 - lr}
    jobs = asked(results)
    assert ("hash", 0, 2.4e-2) in jobs and "noise" not in {arm for arm, *_ in jobs}
    results[CONFIG.job("hash", 0, 2.4e-2)] = {"validation_loss": 5.0}
    assert ("noise", 0, 2.4e-2) in asked(results)


@pytest.mark.slow
def test_tables_are_equal_unless_the_rows_are_what_an_arm_changes():
    base = HotConfig(backbone="smallest").base
    vocab = VocabMap(np.arange(base.moe.vocab_size) * 3 // 4)
    arms = {name: recipe.arm(base, vocab, 1) for name, recipe in _arms(base).items()}
    tables = {name: arm.parameters for name, arm in arms.items() if arm.memory}
    larger = {name: p.table for name, p in tables.items() if p.table != tables["hash"].table}
    assert larger.keys() == {"cold-20", "cold-40", "cold-140", "double", "private"}
    same = [p for name, p in tables.items() if name not in larger]
    assert set(same) == {tables["hash"]}
    slots = arms["hot"].hot
    assert {name for name, arm in arms.items() if arm.hot == slots} == {
        *("hot", "cold-20", "cold-40", "cold-140"),
        *("fingerprint", "noise", "private", "dropout"),
    }


def test_a_model_with_hot_ngrams_has_the_counts_of_its_arm_and_needs_enough_of_them():
    base = HotConfig(backbone="smallest").base
    vocab = VocabMap.identity(base.moe.vocab_size)
    recipe = _arms(base)["hot"]
    model, counted = build(recipe, base, vocab, 1, 0, lambda slots: _any_ngrams(slots, vocab))
    assert counted == recipe.arm(base, vocab, 1).parameters
    assert model.memory.hot.spec.slots == sum(recipe.arm(base, vocab, 1).hot.values())
    few = Ngrams({2: [[1, 2]], 3: [[1, 2, 3]]}, vocab.digest)
    with pytest.raises(ConfigError, match="collision-free: expected a text of .* found 1"):
        build(recipe, base, vocab, 1, 0, few.top)


# --- numbers --------------------------------------------------------------------------------------


def result(*gaps: float) -> dict:
    """Hot minus cold at steps 10, 20, ..."""
    steps = [(10 * (i + 1), {"loss": {"hot": 3 + gap, "cold": 3.0}}) for i, gap in enumerate(gaps)]
    return {"by_step": steps}


def test_differences_are_paired_by_seed_and_less_those_without_a_memory():
    runs = {
        "none": {0: result(-0.5, -0.25), 1: result(-0.25, 0.5)},
        "hot": {0: result(-1.0, 0.0), 1: result(-0.5, 0.5), 2: result(9.0, 9.0)},
    }
    assert over_training(runs["none"], "loss") == {10: -0.375, 20: 0.125}
    assert over_training(runs["none"], "gate") == {}
    assert differences(runs, "hot") == {10: -0.375, 20: 0.125}
    assert differences(runs, "none") == {}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([-1, -1, 1, 1], [30]),
        ([-1, 1, -1], [20, 30]),
        ([1, 2, 3], []),
        ([-1, 0, 1], [30]),
        ([-1, 0, -1], []),
        ([0, 0, 1], []),
        ([], []),
    ],
)
def test_a_flip_is_a_step_whose_sign_is_not_that_before(values, found):
    assert flips({10 * (i + 1): value for i, value in enumerate(values)}) == found


def test_a_verdict_needs_two_standard_errors_and_two_seeds():
    words = ("same", "below", "above")
    assert _verdict([], *words) == "not run"
    assert _verdict([0.5], *words) == "one seed: no error known"
    assert _verdict([0.01, -0.01, 0.0], *words) == "same"
    assert _verdict([0.01, 0.011, 0.009], *words) == "above"
    assert _verdict([-0.01, -0.011, -0.009], *words) == "below"


@pytest.mark.parametrize(
    "names",
    [("none-seed0",), ("hot-seed0",), ("hash-seed0", "noise-seed0"), ("none-seed0", "hot-seed1")],
)
def test_the_tables_of_some_runs_show_these_and_say_what_is_missing(names, tmp_path):
    for name in names:
        shutil.copy(RESULTS / "hot" / f"{name}-lr0.003.json", tmp_path)
    table = study_table(HOT, HotConfig.smallest(), tmp_path)
    (missing,) = [line for line in table.splitlines() if line.startswith("Missing: ")]
    assert ("hot-seed0" in missing) is ("hot-seed0" not in names)
    shown = {name.rpartition("-")[0] for name in names}
    for arm, recipe in _arms(HotConfig.smallest().base).items():
        sizes = rf"^\| {re.escape(recipe.label)} \| [\d,]+ \| 43,\d+ \|"
        assert bool(re.search(sizes, table, re.MULTILINE)) is (arm in shown)
    assert "| figure | paper | here | verdict |" in table


# --- collisions -----------------------------------------------------------------------------------

V = 16
MOE = LMConfig(
    V,
    16,
    layers=2,
    heads=2,
    ffn=40,
    moe_layers=(0, 1),
    experts=8,
    top_k=2,
    expert_ffn=12,
    shared_ffn=60,
)


def run_with(rows: int, hot: HotIndex | None) -> Run:
    vocab = VocabMap.identity(V)
    arm = memory_arm(MOE, 0.5, MemorySizes(heads=2, dim=2, rows_per_head=rows), V, 0)
    torch.manual_seed(0)
    model = LM(arm.model, make_memory(arm.memory, vocab, 0.02, 0, "", hot))
    documents = [np.random.default_rng(0).integers(1, V, 2000).astype(np.int32)]
    batches = Batches(documents, 0, batch=2, tokens=16, seed=0)
    return Run(model, batches, TrainConfig(tokens=3200, lr=1e-2))


def test_only_rows_that_are_shared_move_between_two_readings():
    bigrams = np.stack(np.meshgrid(np.arange(1, 6), np.arange(1, 6)), -1).reshape(-1, 2)
    index = HotIndex.build(Ngrams({2: bigrams}, VocabMap.identity(V).digest))
    shared = collisions(run_with(3, None), index, steps=8)
    alone = collisions(run_with(3, index), index, steps=8)
    assert shared.readings == alone.readings >= 10
    assert alone.change == pytest.approx(0, abs=1e-7)  # sums of gradients are rounded
    assert shared.change > 1e-3 and shared.share > 0.05


def test_the_backbone_of_the_study_has_two_heads_and_that_of_others_is_as_it_was():
    assert HotConfig(backbone="wide").base.memory.heads == 2
    assert backbone("wide").memory.heads == 4
