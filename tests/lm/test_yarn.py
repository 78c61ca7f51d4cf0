"""Rotary positions and YaRN: factor 1 is plain, other factors are those of transformers."""

from __future__ import annotations

import math

import pytest
import torch

from engraphy.errors import ConfigError
from engraphy.lm.config import YarnConfig
from engraphy.lm.yarn import rotary_rates, rotary_table, rotated, temperature


def test_a_factor_of_one_leaves_positions_bit_for_bit():
    yarn = YarnConfig(1.0, trained_tokens=64)
    assert torch.equal(rotary_table(100, 8, 10_000.0, yarn), rotary_table(100, 8, 10_000.0))
    assert temperature(yarn) == temperature(None) == 1.0


@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
@pytest.mark.parametrize(("pairs", "theta"), [(32, 10_000.0), (8, 10_000.0), (64, 500_000.0)])
def test_rates_and_temperature_equal_those_of_transformers(factor, pairs, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * pairs,
        num_attention_heads=2,
        max_position_embeddings=int(4096 * factor),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": 4096,
        },
    )
    rates, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    yarn = YarnConfig(factor)
    torch.testing.assert_close(rotary_rates(pairs, theta, yarn), rates, rtol=2e-6, atol=0)
    # transformers multiplies queries and keys by it, so the logits twice.
    assert temperature(yarn) == pytest.approx(attention_factor**2, rel=1e-12)


def test_fast_pairs_keep_their_rate_and_slow_pairs_are_divided_by_the_factor():
    plain = rotary_rates(32, 10_000.0)
    ratio = rotary_rates(32, 10_000.0, YarnConfig(8.0, trained_tokens=4096)) / plain
    turns = 4096 * plain / (2 * math.pi)
    assert (ratio[turns > 40] == 1).all() and (turns > 40).any()
    torch.testing.assert_close(ratio[turns < 0.5], torch.full_like(ratio[turns < 0.5], 1 / 8))
    assert (ratio.diff() <= 0).all()


def test_products_of_turned_vectors_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 16, dtype=torch.float64)
    table = torch.view_as_complex(rotary_table(64, 8, 10_000.0, YarnConfig(4.0, 16)))
    products = [rotated(query, table[t + 5]) @ rotated(key, table[t]) for t in (0, 7, 40)]
    for product in products[1:]:
        assert float(product) == pytest.approx(float(products[0]), abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"factor": 0.5},
        {"factor": math.inf},
        {"trained_tokens": 0},
        {"slow_turns": 40.0},
        {"mscale": -1.0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change):
    with pytest.raises(ConfigError, match="yarn"):
        YarnConfig(**{"factor": 4.0, **change})
