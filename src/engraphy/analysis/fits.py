"""Lines and parabolas through losses of several seeds, with standard errors.

Each seed has a level of its own, since one seed fixes the text: the fit is of what changes within
seeds. Ordinary least squares; errors come from the residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError


@dataclass(frozen=True)
class Line:
    """y = level of the group + slope * x.

    Attributes:
        slope: The slope.
        error: Its standard error; None without residual degrees of freedom.
        r2: Share of the variance within groups that the line explains.
    """

    slope: float
    error: float | None
    r2: float


@dataclass(frozen=True)
class Parabola:
    """y = level of the group + linear * x + square * x**2.

    Attributes:
        linear: The linear coefficient.
        square: The square coefficient.
        square_error: Its standard error; None without residual degrees of freedom.
        lowest: The x of the minimum; None if the parabola does not open upwards.
        lowest_error: Its standard error (delta method).
    """

    linear: float
    square: float
    square_error: float | None
    lowest: float | None
    lowest_error: float | None


def fit_line(x: ArrayLike, y: ArrayLike, groups: ArrayLike) -> Line:
    """The line through points of several groups.

    Args:
        x: Positions, [M].
        y: Values, [M].
        groups: The group of each point, [M].

    Raises:
        InputError: Sizes differ, or there are too few points.
    """
    x_M, y_M = _within(x, y, groups, 1)
    design = x_M[:, None]
    (slope,), covariance, residual = _least_squares(design, y_M, groups)
    r2 = 1 - residual / float(y_M @ y_M) if y_M.any() else 1.0
    return Line(float(slope), _error(covariance, 0), r2)


def fit_parabola(x: ArrayLike, y: ArrayLike, groups: ArrayLike) -> Parabola:
    """The parabola through points of several groups. Arguments and errors: as in `fit_line`."""
    x = np.asarray(x, float)
    x_M, y_M = _within(x, y, groups, 2)
    square_M, _ = _within(x**2, y, groups, 2)
    design = np.stack([x_M, square_M], 1)
    (linear, square), covariance, _ = _least_squares(design, y_M, groups)
    lowest = lowest_error = None
    if square > 0:
        lowest = float(-linear / (2 * square))
        if covariance is not None:
            gradient = np.array([-1 / (2 * square), linear / (2 * square**2)])
            lowest_error = float(np.sqrt(gradient @ covariance @ gradient))
    return Parabola(float(linear), float(square), _error(covariance, 1), lowest, lowest_error)


def _within(
    x: ArrayLike, y: ArrayLike, groups: ArrayLike, coefficients: int
) -> tuple[np.ndarray, np.ndarray]:
    """x and y less the means of their groups. Raises InputError for sizes that do not fit."""
    x_M, y_M, group_M = np.asarray(x, float), np.asarray(y, float), np.asarray(groups)
    if not x_M.shape == y_M.shape == group_M.shape or x_M.ndim != 1:
        raise InputError(
            f"expected x, y and groups of one length, found {x_M.shape}, {y_M.shape} "
            f"and {group_M.shape}"
        )
    needed = coefficients + len(set(group_M.tolist()))
    if len(x_M) < needed or len(set(x_M.tolist())) <= coefficients:
        raise InputError(
            f"expected at least {needed} points at {coefficients + 1} positions, found "
            f"{len(x_M)} at {len(set(x_M.tolist()))}"
        )
    x_M, y_M = x_M.copy(), y_M.copy()
    for group in set(group_M.tolist()):
        inside = group_M == group
        x_M[inside] -= x_M[inside].mean()
        y_M[inside] -= y_M[inside].mean()
    return x_M, y_M


def _least_squares(
    design: np.ndarray, y_M: np.ndarray, groups: ArrayLike
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Coefficients, their covariance (None without degrees of freedom), and the sum of squared
    residuals."""
    coefficients, *_ = np.linalg.lstsq(design, y_M, rcond=None)
    residual = float(np.square(y_M - design @ coefficients).sum())
    free = len(y_M) - design.shape[1] - len(set(np.asarray(groups).tolist()))
    if free < 1:
        return coefficients, None, residual
    return coefficients, np.linalg.inv(design.T @ design) * (residual / free), residual


def _error(covariance: np.ndarray | None, index: int) -> float | None:
    return None if covariance is None else float(np.sqrt(covariance[index, index]))
