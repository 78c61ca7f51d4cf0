"""The search over learning rates: every run follows from the results that are there."""

from __future__ import annotations

import random

import pytest

from engraphy.recipes.studies.queue import Job
from engraphy.recipes.studies.rates import Rates, RateSearch

SCALE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def walked(search: RateSearch, losses: dict[tuple[str, float], float]) -> list[Job]:
    """Runs in order, each asked for by the results before it."""
    found: dict[Job, dict] = {}
    while missing := [job for job in search.jobs(found) if job not in found]:
        found[missing[0]] = {"loss": losses[missing[0].arm, missing[0].lr]}
    return list(found)


def search_of(**rates: Rates) -> RateSearch:
    return RateSearch(rates, (5, 6, 7), Job, lambda result: result["loss"])


@pytest.mark.parametrize("seed", range(20))
def test_every_seed_runs_at_the_best_rate_that_was_tried_and_nothing_runs_twice(seed):
    rng = random.Random(seed)
    losses = {(arm, lr): rng.random() for arm in "ab" for lr in SCALE}
    rates = Rates.around(SCALE, 1e-3, beyond=1)
    jobs = walked(search_of(a=rates, b=rates), losses)
    assert len(set(jobs)) == len(jobs)
    for arm in "ab":
        tried = [job.lr for job in jobs if job.arm == arm and job.seed == 5]
        best = min(tried, key=lambda lr: losses[arm, lr])
        assert tried[:3] == [1e-3, 3e-4, 3e-3]
        # It stops only at a best rate with others on both sides, or at the end of the scale.
        assert min(tried) < best < max(tried) or best in (SCALE[0], SCALE[-1])
        others = [(job.seed, job.lr) for job in jobs if job.arm == arm and job.seed != 5]
        assert others == [(6, best), (7, best)]


def test_fixed_rates_are_all_tried_and_none_beyond_them():
    rates = Rates.fixed(*SCALE)
    assert rates.to_try({}) == rates.to_try(dict.fromkeys(SCALE, 1.0)) == list(SCALE)
    assert rates.best({lr: lr for lr in SCALE[:-1]}) is None
    assert rates.best({lr: -lr for lr in SCALE}) == SCALE[-1]


def test_a_single_rate_is_chosen_before_it_has_run():
    search = search_of(a=Rates.fixed(3e-3))
    assert search.chosen({}) == {"a": 3e-3}
    assert [job.seed for job in search.jobs({})] == [5, 6, 7]
    assert search.runs({}) == {}


def test_runs_are_those_at_the_chosen_rate():
    search = search_of(a=Rates.fixed(1e-3, 3e-3))
    found = {Job("a", 5, lr): {"loss": lr} for lr in (1e-3, 3e-3)}
    found |= {Job("a", 7, 1e-3): {"loss": 2.0}, Job("a", 6, 3e-3): {"loss": 0.0}}
    assert search.losses("a", found) == {1e-3: 1e-3, 3e-3: 3e-3}
    assert search.runs(found) == {"a": {5: {"loss": 1e-3}, 7: {"loss": 2.0}}}
