"""Sums of gradients by row: each number is added in the order that memory/summed.py defines."""

from __future__ import annotations

import numpy as np
import pytest

from engraphy.memory.summed import SummedGrad, folded, in_lanes, square_sum

SIZES = [(1, 1), (40, 4), (300, 16), (257, 20), (100, 64), (30, 130)]


def gradients(count: int, dim: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    grad_Nd = rng.standard_normal((count, dim)) * 10.0 ** rng.integers(-6, 6, (count, 1))
    return rng.integers(0, rows, count), grad_Nd.astype(np.float32)


def summed_one_by_one(ids_N: np.ndarray, grad_Nd: np.ndarray) -> dict[int, np.ndarray]:
    sums: dict[int, np.ndarray] = {}
    for row, grad_d in zip(ids_N.tolist(), grad_Nd, strict=True):
        sums[row] = sums[row] + grad_d if row in sums else grad_d
    return sums


def squares_one_by_one(grad_Ud: np.ndarray) -> float:
    total = np.float64(0)
    for first in range(0, len(grad_Ud), 2048):
        lanes = [np.float64(0)] * 16
        for grad_d in grad_Ud[first : first + 2048]:
            for column, value in enumerate(grad_d):
                lanes[column % 16] += np.float64(value) * np.float64(value)
        for half in (8, 4, 2, 1):
            lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        total += lanes[0]
    return float(total)


@pytest.mark.parametrize("rows", [1, 7, 10**12])
@pytest.mark.parametrize(("count", "dim"), SIZES)
def test_gradients_of_a_row_are_added_in_the_order_of_their_positions(count, dim, rows):
    ids_N, grad_Nd = gradients(count, dim, rows)
    expected = summed_one_by_one(ids_N, grad_Nd)
    cut = count // 3
    for summed in (
        SummedGrad.of([ids_N], [grad_Nd]),
        SummedGrad.of([ids_N[:cut], ids_N[cut:]], [grad_Nd[:cut], grad_Nd[cut:]]),
    ):
        ids_U, grad_Ud = summed
        assert ids_U.tolist() == sorted(expected)
        np.testing.assert_array_equal(
            grad_Ud, np.stack([expected[row] for row in sorted(expected)])
        )


@pytest.mark.parametrize(("count", "dim"), [*SIZES, (4100, 3), (2049, 16)])
def test_squares_are_added_in_lanes_and_chunks(count, dim):
    ids_N, grad_Nd = gradients(count, dim, 10**9)
    summed = SummedGrad.of([ids_N], [grad_Nd])
    assert summed.square_sum() == squares_one_by_one(summed.grad)
    assert square_sum(grad_Nd[:0]) == 0.0


def test_a_scale_multiplies_the_sum_rounded_to_f32():
    ids_N, grad_Nd = gradients(50, 4, 9)
    summed = SummedGrad.of([ids_N], [grad_Nd])
    scaled = summed.scaled(0.1)
    np.testing.assert_array_equal(scaled.ids, summed.ids)
    np.testing.assert_array_equal(scaled.grad, summed.grad * np.float32(0.1))
    again = scaled.scaled(0.3)
    np.testing.assert_array_equal(again.grad, scaled.grad * np.float32(0.3))
    assert scaled.square_sum() == squares_one_by_one(scaled.grad)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(bad):
    ids_N, grad_Nd = gradients(200, 20, 50)
    assert SummedGrad.of([ids_N], [grad_Nd]).bad_row() is None
    grad_Nd[[120, 60], [19, 3]] = bad
    summed = SummedGrad.of([ids_N], [grad_Nd])
    assert summed.bad_row() == min(ids_N[120], ids_N[60])
    assert not np.isfinite(summed.square_sum())


def test_a_sum_that_overflows_is_not_finite_though_its_parts_are():
    grad_Nd = np.full((3, 2), 2e38, np.float32)
    assert SummedGrad.of([np.array([4, 9, 4])], [grad_Nd]).bad_row() == 4
    assert SummedGrad.of([np.array([4, 9, 5])], [grad_Nd]).bad_row() is None


def test_no_gradients_sum_to_none():
    summed = SummedGrad.of([np.empty(0, np.int64)], [np.empty((0, 5), np.float32)])
    assert len(summed.ids) == 0 and summed.grad.shape == (0, 5)
    assert summed.square_sum() == 0.0 and summed.bad_row() is None


def test_lanes_are_columns_and_zeros():
    blocks = in_lanes(np.arange(1.0, 41.0).reshape(2, 20))
    assert blocks.shape == (2, 2, 16)
    assert blocks[0, 1].tolist() == [17.0, 18.0, 19.0, 20.0] + [0.0] * 12
    assert folded(blocks[:, 0]).tolist() == [sum(range(1, 17)), sum(range(21, 37))]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("position", [3, 998, 999])
def test_what_is_not_finite_is_found_among_rows_that_mostly_have_one_gradient(bad, position):
    ids_N = np.arange(1000)
    ids_N[-1] = 998  # the last two gradients are of one row
    grad_Nd = np.full((1000, 5), 1e38, np.float32)
    assert (
        SummedGrad.of([ids_N[:400], ids_N[400:]], [grad_Nd[:400], grad_Nd[400:]]).bad_row() is None
    )
    grad_Nd[position, 2] = bad
    is_bad = position > 3 or not np.isfinite(bad)
    summed = SummedGrad.of([ids_N[:400], ids_N[400:]], [grad_Nd[:400], grad_Nd[400:]])
    assert summed.bad_row() == (ids_N[position] if is_bad else None)
