"""Arms of a comparison: equal parameters, counted on the models as built."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engraphy import EngramMemory, VocabMap
from engraphy.errors import ConfigError
from engraphy.lm import (
    LM,
    LMConfig,
    MemorySizes,
    count_parameters,
    demo_config,
    memory_arm,
    three_arms,
)

SMALL = LMConfig(
    64,
    16,
    layers=3,
    heads=2,
    ffn=40,
    moe_layers=(1, 2),
    experts=8,
    top_k=2,
    expert_ffn=12,
    shared_ffn=60,
)


@pytest.mark.parametrize("rho", [0.25, 0.5, 0.75])
def test_arms_have_equal_activated_and_the_last_two_equal_total_parameters(rho):
    arms = three_arms(demo_config(), 1500, pad_id=1, rho=rho)
    goal = arms.moe.parameters
    for arm in arms:
        assert arm.parameters.activated == pytest.approx(goal.activated, rel=0.01)
    assert arms.memory.parameters.total == pytest.approx(goal.total, rel=0.01)
    assert arms.dense.parameters.total < goal.total
    assert arms.memory.model.experts == round(rho * 32)
    assert (arms.dense.memory, arms.moe.memory) == (None, None)


def test_the_demo_counts_as_the_published_comparison():
    arms = three_arms(demo_config(), 1500, pad_id=1)
    assert (arms.moe.parameters.total, arms.moe.parameters.activated) == (2_573_184, 836_480)
    assert (arms.memory.model.experts, arms.memory.model.shared_ffn) == (24, 151)
    assert arms.memory.parameters.activated == 836_736


@pytest.mark.parametrize("moe", [SMALL, dataclasses.replace(SMALL, tie_embeddings=True)])
def test_counts_told_are_those_of_the_models_as_built(moe):
    for arm in three_arms(moe, 40, pad_id=1, heads=2, dim=2):
        memory = (
            None
            if arm.memory is None
            else EngramMemory(arm.memory, VocabMap(np.arange(moe.vocab_size) % 40))
        )
        assert count_parameters(LM(arm.model, memory)) == arm.parameters


def test_activated_parameters_leave_out_idle_experts_unread_rows_and_the_copied_embedding():
    arm = three_arms(SMALL, 40, pad_id=1, heads=2, dim=2).memory
    assert arm.memory is not None
    idle = 2 * (arm.model.experts - 2) * 3 * 16 * 12
    unread = arm.parameters.table - arm.memory.hash.columns * 2
    assert arm.parameters.embedding == 64 * 16
    assert arm.parameters.total - arm.parameters.activated == idle + unread + 64 * 16


@pytest.mark.parametrize(
    ("moe", "options", "named"),
    [
        (SMALL, {"rho": 1.0}, "rho"),
        (SMALL, {"rho": 0.1}, "top_k|experts of a token"),
        (dataclasses.replace(SMALL, shared_ffn=4), {"heads": 2, "dim": 16}, "shared_ffn"),
        (SMALL, {"rho": 0.95}, "to spare"),
        (SMALL, {"rho": 0.9, "heads": 8, "dim": 4}, "within 1%"),
        (LMConfig(64, 16, layers=2, heads=2, ffn=40), {}, "moe_layers"),
    ],
)
def test_arms_that_cannot_be_made_equal_are_refused(moe, options, named):
    with pytest.raises(ConfigError, match=named):
        three_arms(moe, 40, pad_id=1, **options)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
def test_rows_that_move_to_hot_ngrams_leave_each_order_of_the_table_as_large(share):
    sizes = MemorySizes(heads=2)
    plain = memory_arm(demo_config(), 0.75, sizes, 1500, 1)
    divided = memory_arm(demo_config(), 0.75, dataclasses.replace(sizes, hot=share), 1500, 1)
    assert plain.memory and divided.memory and not plain.hot
    assert divided.parameters == plain.parameters
    whole, rest = plain.memory.hash.primes(1), divided.memory.hash.primes(1)
    for number, slots in enumerate(divided.hot.values()):
        own = slice(2 * number, 2 * number + 2)
        assert sum(rest[own]) + 2 * slots == sum(whole[own])
        assert slots == pytest.approx(share * whole[own][0], rel=0.05, abs=20)


@pytest.mark.parametrize("cold", [0.4, 1.0, 2.0])
def test_a_share_of_cold_rows_changes_the_hashed_rows_alone(cold):
    sizes = MemorySizes(heads=2, hot=0.2)
    equal = memory_arm(demo_config(), 0.75, sizes, 1500, 1)
    other = memory_arm(demo_config(), 0.75, dataclasses.replace(sizes, cold=cold), 1500, 1)
    assert equal.memory and other.memory
    assert other.hot == equal.hot and other.model == equal.model
    hashed = other.memory.hash.row_count(1) / equal.memory.hash.row_count(1)
    assert hashed == pytest.approx(cold / 0.8, rel=0.01)


def test_heads_whose_rows_do_not_divide_into_hot_ngrams_are_refused():
    refused = 0
    for share in (0.2, 0.5):
        sizes = MemorySizes(heads=3, dim=16, hot=share)
        try:
            arm = memory_arm(demo_config(), 0.75, sizes, 1500, 1)
        except ConfigError as error:
            assert "rows for whole n-grams of order" in str(error)
            refused += 1
        else:
            plain = memory_arm(demo_config(), 0.75, dataclasses.replace(sizes, hot=0), 1500, 1)
            assert arm.parameters == plain.parameters
    assert refused
