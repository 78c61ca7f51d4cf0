"""The allocation study: which runs it asks for, and what it says of a curve."""

from __future__ import annotations

import dataclasses

import pytest

from engraphy import VocabMap
from engraphy.errors import ConfigError
from engraphy.lm.sizes import expert_share, parts
from engraphy.recipes.studies.allocation import ALLOCATION, _arms, _curve, shares
from engraphy.recipes.studies.backbones import BACKBONES
from engraphy.recipes.studies.comparison import ComparisonConfig

CONFIG = ComparisonConfig((0, 1, 2), rates=(6e-3,))
BASE = CONFIG.base
SEEDS = {"rho-1": 3, "rho-0.9": 1, "rho-0.75": 1, "rho-0.5": 3, "rho-0.25": 1, "rho-0.125": 3}


def curve(losses: dict[str, float], lucky: tuple[str, float] = ("", 0.0)) -> str:
    """What the study says if its arms have these losses.

    lucky: an arm whose loss on seed 0 is so much lower.
    """
    runs = {}
    for name, recipe in _arms(BASE).items():
        arm = recipe.arm(BASE, VocabMap.identity(BASE.moe.vocab_size), 0)
        gain = lucky[1] if name == lucky[0] else 0.0
        runs[name] = {
            number: {
                "validation_loss": losses[name] + number - gain * (number == 0),
                "parameters": {"table": arm.parameters.table},
            }
            for number in range(SEEDS[name])
        }
    return "\n".join(_curve(CONFIG, runs))


def named(*losses: float) -> dict[str, float]:
    return dict(zip(shares(BASE), losses, strict=True))


@pytest.mark.parametrize(
    ("best", "deciding"),
    [
        ("rho-1", "rho-0.9"),
        ("rho-0.9", "rho-0.9"),
        ("rho-0.5", "rho-0.5"),
        ("rho-0.125", "rho-0.25"),
    ],
)
def test_shares_that_decide_run_on_all_seeds_and_the_others_on_one(best, deciding):
    config = ComparisonConfig((0, 1, 2), rates=(4e-3, 6e-3, 8e-3))
    results = {}
    while missing := [job for job in ALLOCATION.jobs(config, results) if job not in results]:
        rates = 4 * abs(missing[0].lr - 6e-3)
        results[missing[0]] = {"validation_loss": 4.0 + rates - (missing[0].arm == best)}
    seeds = {name: {job.seed for job in results if job.arm == name} for name in shares(config.base)}
    many = {name for name, found in seeds.items() if found == {0, 1, 2}}
    assert many == {"rho-1", "rho-0.125", deciding}
    assert all(seeds[name] == {0} for name in seeds.keys() - many)
    rates = {name: {job.lr for job in results if job.arm == name} for name in seeds}
    assert {name for name, found in rates.items() if found == {6e-3}} == {
        "rho-0.9",
        "rho-0.5",
        "rho-0.25",
    }


@pytest.mark.parametrize("name", ["base", "wide", "deep"])
def test_the_tables_have_the_rho_of_the_paper(name):
    base = BACKBONES[name]
    config = ComparisonConfig((0,), backbone=name)
    runs, expected = {}, []
    for arm_name, recipe in _arms(base).items():
        arm = recipe.arm(base, VocabMap.identity(base.moe.vocab_size), 0)
        expected.append(expert_share(parts(arm.model, arm.memory)))
        runs[arm_name] = {
            0: {"validation_loss": 4.0, "parameters": {"table": arm.parameters.table}}
        }
    lines = list(_curve(config, runs))[2 : 2 + len(runs)]
    found = [float(line.split("|")[2]) for line in lines]
    assert found == pytest.approx(expected, abs=6e-4)


def test_a_share_below_both_ends_is_shown_on_the_seeds_that_did_not_choose_it():
    text = curve(named(4.0, 3.9, 3.8, 3.7, 3.8, 3.9))
    assert "Lowest on seed 0: rho 0.43." in text
    expected = "On the other seeds, which did not choose it: minus all experts -0.3000 ± 0.0000 *, "
    assert f"{expected}minus the fewest -0.2000 ± 0.0000 *." in text
    assert "| -0.3000 ± 0.0000 * | -0.2000 ± 0.0000 * |" in text


def test_a_drop_that_then_stays_flat_has_its_lowest_loss_at_an_end():
    """A parabola through all shares would find a minimum between."""
    text = curve(named(4.0, 3.94, 3.91, 3.895, 3.89, 3.888))
    assert "Lowest on seed 0: rho 0.00." in text
    assert "That is an end: no minimum between." in text


def test_luck_of_the_seed_that_chose_is_not_in_the_verdict():
    losses = named(4.0, 3.9, 3.8, 3.75, 3.72, 3.7)
    text = curve(losses, lucky=("rho-0.5", 0.2))
    assert "Lowest on seed 0: rho 0.43." in text
    assert "minus all experts -0.2500 ± 0.0000 *, minus the fewest +0.0500 ± 0.0000 *." in text


def test_the_shares_of_an_allocation_end_where_no_expert_is_left_over():
    assert list(shares(BASE).values()) == [1.0, 0.9, 0.75, 0.5, 0.25, 0.125]
    fewer = dataclasses.replace(BASE.moe, experts=4)
    few = dataclasses.replace(BASE, moe=fewer)
    assert list(shares(few).values()) == [1.0, 0.9, 0.75, 0.5]


def test_a_share_of_experts_is_refused_where_every_arm_has_its_own():
    with pytest.raises(ConfigError, match="rho: expected none, since the arms of allocation"):
        ALLOCATION.jobs(dataclasses.replace(CONFIG, rho=0.5), {})


def test_too_few_runs_say_so():
    runs = {"rho-1": {0: {"validation_loss": 4.0, "parameters": {"table": 0}}}}
    text = "\n".join(_curve(CONFIG, runs))
    assert "The lowest loss is not known yet." in text and "Too few runs for a parabola." in text
