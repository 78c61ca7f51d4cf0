"""Rounding to bf16: stochastic rounding keeps the mean, and is a function of what it is given."""

from __future__ import annotations

import numpy as np
import pytest

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.errors import ConfigError
from engraphy.memory import RowGrad
from engraphy.rows.codecs import to_bf16
from engraphy.train import RowAdam, RowNesterov
from engraphy.train.rounding import FIRST_MOMENT, ROW, Rounding, random_bits, stochastic_bf16
from engraphy.train.testing import random_grads, rows_of, small_memory

DIM = 16


def wide(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def one_layer(rows: int, dim: int, row_format: str) -> EngramMemory:
    spec = HashSpec.demo((2,), (2,), 1, rows, vocab_size=50, pad_id=0)
    config = EngramConfig(spec, LayerSpec(8, dim, order=2), dim)
    return EngramMemory(config, VocabMap.identity(50), row_format=row_format)


def test_a_value_is_rounded_up_as_often_as_its_place_between_two_says():
    for low_bits in (1, 0x4000, 0x8000, 0xFFFF):
        bits = np.full(65536, 0x3F800000 + low_bits, np.uint32)
        up = stochastic_bf16(bits.view(np.float32), np.arange(65536, dtype=np.uint32)) == 0x3F81
        assert up.sum() == low_bits


def test_values_that_bf16_holds_and_what_is_not_finite_stay():
    held = wide(np.arange(65536, dtype=np.uint16))
    most = np.full(held.shape, 0xFFFF, np.uint32)
    rounded = stochastic_bf16(held, most)
    finite = ~np.isnan(held)
    np.testing.assert_array_equal(wide(rounded)[finite], held[finite])
    assert np.isnan(wide(rounded)[~finite]).all()
    np.testing.assert_array_equal(np.signbit(wide(rounded)), np.signbit(held))
    odd_nan = np.array([0x7F800001, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(wide(stochastic_bf16(odd_nan, most[:3]))).all()


def test_random_bits_depend_on_the_row_and_not_on_its_place():
    ids_N = np.random.default_rng(0).integers(0, 10**12, 200)
    all_Nd = random_bits(12345, ids_N, DIM, ROW)
    some = np.array([7, 100, 3])
    np.testing.assert_array_equal(random_bits(12345, ids_N[some], DIM, ROW), all_Nd[some])
    np.testing.assert_array_equal(random_bits(12345, ids_N, 5, ROW), all_Nd[:, :5])
    assert all_Nd.max() < 65536


def test_random_bits_are_uniform_and_those_of_neighbours_are_independent():
    key = Rounding("stochastic", 3).key(1, 2)
    ids_N = np.arange(4096)
    base_Nd = random_bits(key, ids_N, DIM, ROW).astype(np.float64)
    assert abs(base_Nd.mean() - 32767.5) < 5 * 65536 / np.sqrt(12 * base_Nd.size)
    counts = np.bincount((base_Nd.ravel() / 256).astype(int), minlength=256)
    expected = base_Nd.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255)
    others = {
        "step": random_bits(Rounding("stochastic", 3).key(2, 2), ids_N, DIM, ROW),
        "layer": random_bits(Rounding("stochastic", 3).key(1, 3), ids_N, DIM, ROW),
        "seed": random_bits(Rounding("stochastic", 4).key(1, 2), ids_N, DIM, ROW),
        "row": random_bits(key, ids_N + 1, DIM, ROW),
        "part": random_bits(key, ids_N, DIM, FIRST_MOMENT),
        "next part": random_bits(key, ids_N, DIM, FIRST_MOMENT + 1),
        "column": np.roll(base_Nd, 1, axis=1),
    }
    for name, other_Nd in others.items():
        correlation = np.corrcoef(base_Nd.ravel(), other_Nd.astype(np.float64).ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(base_Nd.size), name


def after_tiny_steps(rounding: str) -> np.ndarray:
    """Rows of ones after 10,000 steps of 1e-5 downwards, of which each is 1/390 of a bf16 step."""
    memory = one_layer(101, DIM, "bf16")
    rows_Nd = np.ones((101, DIM), np.float32)
    store = memory.stores[2]
    ids_N = np.arange(101)
    store.scatter(ids_N, memory.format.encode(rows_Nd))
    optimizer = RowNesterov(memory, lr=1e-5, momentum=0.0, rounding=rounding)
    for _ in range(10_000):
        memory.row_grads.append(RowGrad(2, ids_N, rows_Nd))
        optimizer.step()
    return memory.format.decode(store.gather(ids_N))


@pytest.mark.slow
def test_ten_thousand_tiny_steps_move_the_mean_with_stochastic_rounding_alone():
    assert (after_tiny_steps("nearest") == 1.0).all()
    rows_Nd = after_tiny_steps("stochastic")
    # 10,000 steps of 1e-5 are 0.1. A step adds at most 2**-18 * 1e-5 * 256 of variance.
    deviation = np.sqrt(10_000 * 1e-5 * 2.0**-8)
    assert rows_Nd.mean() == pytest.approx(0.9, abs=5 * deviation / np.sqrt(rows_Nd.size))
    assert rows_Nd.std() < 2 * deviation


def mean_square_after(rounding: str, moment_dtype: str, steps: int = 3000) -> float:
    """Mean of the second moments of Adam whose gradients are N(0, 1); 1 is right."""
    memory = one_layer(101, DIM, "f32")
    optimizer = RowAdam(memory, betas=(0.9, 0.999), moment_dtype=moment_dtype, rounding=rounding)
    rng = np.random.default_rng(0)
    ids_N = np.arange(101)
    for _ in range(steps):
        grad_Nd = rng.standard_normal((101, DIM)).astype(np.float32)
        memory.row_grads.append(RowGrad(2, ids_N, grad_Nd))
        optimizer.step()
    moments = optimizer.moment_format.decode(optimizer.moments[2].gather(ids_N))
    return float(moments[:, DIM:].mean())


@pytest.mark.slow
def test_second_moments_in_bf16_follow_the_gradients_with_stochastic_rounding_alone():
    exact = mean_square_after("stochastic", "f32")
    assert mean_square_after("stochastic", "bf16") == pytest.approx(exact, rel=0.01)
    # To nearest only large gradients move a moment, and only up.
    assert mean_square_after("nearest", "bf16") > 1.2 * exact


def test_to_nearest_is_the_format_s_own_rounding():
    values = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
    bits = Rounding("nearest").to_bf16(values, np.arange(40), 5, ROW)
    np.testing.assert_array_equal(bits, to_bf16(values))


@pytest.mark.parametrize(
    ("rounding", "message"),
    [(("up", 0), "expected one of"), (("stochastic", -1), "seed"), (("nearest", 2**64), "seed")],
)
def test_an_unknown_mode_and_a_seed_out_of_range_are_errors(rounding, message):
    with pytest.raises(ConfigError, match=f"rounding: .*{message}"):
        Rounding(*rounding)


def stepped(seed: int, **settings) -> np.ndarray:
    memory = small_memory("bf16")
    optimizer = RowAdam(memory, seed=seed, **settings)
    for step in range(3):
        memory.row_grads += random_grads(step)
        optimizer.step()
    return rows_of(memory)


def test_the_seed_decides_the_random_bits():
    np.testing.assert_array_equal(stepped(1), stepped(1))
    assert (stepped(1) != stepped(2)).any()
    np.testing.assert_array_equal(stepped(1, rounding="nearest"), stepped(2, rounding="nearest"))


@pytest.mark.parametrize("row_format", ["f32", "bf16"])
def test_a_state_without_rounding_is_that_of_f32_moments_to_nearest(row_format):
    memory = small_memory(row_format)
    old = {"name": "row_adam", "steps": 7, "lr": 0.5, "hyper": {"betas": [0.9, 0.999], "eps": 1e-8}}
    optimizer = RowAdam(memory, rounding="nearest")
    optimizer.load_state_dict(old)
    assert (optimizer.steps, optimizer.lr) == (7, 0.5)
    with pytest.raises(ConfigError, match="row optimiser: expected .*bf16.*found .*f32"):
        RowAdam(memory, moment_dtype="bf16").load_state_dict(old)
    if row_format == "f32":
        RowAdam(memory).load_state_dict(old)
    else:
        with pytest.raises(ConfigError, match="'nearest'.*: rounding= and seed= choose"):
            RowAdam(memory).load_state_dict(old)


def test_rounding_counts_in_the_state_only_where_something_is_rounded():
    exact = RowAdam(small_memory(), seed=1).state_dict()
    RowAdam(small_memory(), seed=2, rounding="nearest").load_state_dict(exact)
    rounded = RowAdam(small_memory(), moment_dtype="bf16", seed=1).state_dict()
    with pytest.raises(ConfigError, match="choose how bf16 is rounded"):
        RowAdam(small_memory(), moment_dtype="bf16", seed=2).load_state_dict(rounded)
    with pytest.raises(ConfigError, match="moment_dtype: expected one of .* found 'f16'"):
        RowAdam(small_memory(), moment_dtype="f16")
