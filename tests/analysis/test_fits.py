"""Lines and parabolas through points of several seeds, against cases solved by hand."""

import numpy as np
import pytest

from engraphy.analysis.fits import fit_line, fit_parabola
from engraphy.errors import InputError


def test_a_line_has_one_slope_and_a_level_for_each_seed():
    x = [0, 1, 2, 0, 1, 2]
    y = [5, 4, 3, 9, 8, 7]  # both seeds fall by 1
    line = fit_line(x, y, [0, 0, 0, 1, 1, 1])
    assert line.slope == pytest.approx(-1)
    assert line.error == pytest.approx(0, abs=1e-12)
    assert line.r2 == pytest.approx(1)


def test_the_error_of_a_slope_is_that_of_the_textbook():
    # y = 0, 1, 1, 2 over x = 0..3: slope 0.6, residuals 0.1 * (-1, 3, -3, 1), sum of squares 0.2;
    # 2 degrees of freedom are left; sum of squared x is 5: error = sqrt(0.1 / 5).
    line = fit_line([0, 1, 2, 3], [0, 1, 1, 2], [0, 0, 0, 0])
    assert line.slope == pytest.approx(0.6)
    assert line.error == pytest.approx((0.1 / 5) ** 0.5)
    assert line.r2 == pytest.approx(1 - 0.2 / 2)


def test_a_parabola_finds_its_minimum_whatever_the_levels():
    x = np.array([0.1, 0.25, 0.5, 0.75, 1.0])
    y = 3 * (x - 0.7) ** 2
    both = fit_parabola([*x, *x], [*(y + 1), *(y + 2)], [0] * 5 + [1] * 5)
    assert both.square == pytest.approx(3)
    assert both.linear == pytest.approx(-4.2)
    assert both.lowest == pytest.approx(0.7)
    assert both.lowest_error == pytest.approx(0, abs=1e-9)


def test_a_parabola_that_opens_downwards_has_no_minimum():
    curve = fit_parabola([0, 1, 2, 3], [0, 2, 2, 0], [0] * 4)
    assert curve.square == pytest.approx(-1)
    assert curve.lowest is None and curve.lowest_error is None


def test_the_error_of_a_minimum_is_that_of_repeated_fits():
    random = np.random.default_rng(0)
    x = np.linspace(0, 1, 12)
    seeds = [0] * 12
    fits = [
        fit_parabola(x, (x - 0.6) ** 2 + random.normal(0, 0.02, 12), seeds) for _ in range(2000)
    ]
    spread = np.std([fit.lowest for fit in fits])
    assert np.median([fit.lowest_error for fit in fits]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(
    ("x", "y", "groups", "found"),
    [
        ([0, 1], [0, 1, 2], [0, 0], "of one length"),
        ([0, 1], [0, 1], [0, 1], "at least 3 points"),
        ([1, 1, 1], [0, 1, 2], [0, 0, 0], "3 at 1"),
    ],
)
def test_too_few_points_are_an_error(x, y, groups, found):
    with pytest.raises(InputError, match=found):
        fit_line(x, y, groups)


def test_without_degrees_of_freedom_there_is_no_error():
    assert fit_line([0, 1], [0, 1], [0, 0]).error is None
