"""Gradients of one layer, duplicates summed by row, in an order that is defined.

The plain versions here say in which order numbers are added, so that the result is the same bits
whatever the machine and the number of threads:

- The gradients of a row are added one after the other, in the order of their positions.
- A sum of squares is taken over chunks of 2048 rows, which are added one after the other. A chunk
  has 16 running sums: column c belongs to number c % 16. They are folded in halves at its end.

The native core (`_native/update_kernel.cpp`) gives the same bits. It sums the gradients of rows
that have several, and leaves those of the others where they are.
"""

# _native is private to engraphy.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .. import _native

LANES = 16  # running sums
_CHUNK = 2048  # rows

# What native calls take (`Runs` in _core.pyi).
NativeRuns = tuple[int, int, int, int, int, int, int]


class SummedGrad:
    """Gradient of one layer's rows, duplicates summed.

    May be unpacked: `ids_U, grad_Ud = summed`.

    Attributes:
        ids: int64 [U], ascending and distinct.
        runs: the gradients before they are summed, for native calls.
        scale: multiplies their sums.
    """

    def __init__(self, ids: np.ndarray, grad: np.ndarray) -> None:
        """Takes gradients that are summed already.

        Args:
            ids: int64 [U], ascending and distinct.
            grad: f32 [U, d].
        """
        self.ids = np.ascontiguousarray(ids, np.int64)
        self.scale = 1.0
        grad_Ud = np.ascontiguousarray(grad, np.float32)
        self.runs = Runs([grad_Ud], len(grad_Ud), grad_Ud.shape[1])
        self._grad: np.ndarray | None = grad_Ud

    @classmethod
    def of(cls, ids: Sequence[np.ndarray], grads: Sequence[np.ndarray]) -> SummedGrad:
        """Sums gradients by row.

        Args:
            ids: int64 [N] each, with duplicates; at least one array.
            grads: f32 [N, d] each. Gradients of a row are added in this order.
        """
        ids_N = np.ascontiguousarray(ids[0] if len(ids) == 1 else np.concatenate(ids), np.int64)
        grads = [np.ascontiguousarray(grad_nd, np.float32) for grad_nd in grads]
        if not len(ids_N):
            return cls(ids_N, np.concatenate(grads))
        summed = cls.__new__(cls)
        summed.scale = 1.0
        summed.ids, order = _sorted(ids_N)
        summed.runs = Runs(grads, len(summed.ids), grads[0].shape[1], order)
        summed._grad = None
        return summed

    @property
    def grad(self) -> np.ndarray:
        """f32 [U, d]: the sums."""
        if self._grad is None:
            self._grad = self.runs.grad()
            if self.scale != 1:
                self._grad = self._grad * np.float32(self.scale)
        return self._grad

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.ids
        yield self.grad

    def scaled(self, factor: float) -> SummedGrad:
        """The gradient times a factor, which is rounded to f32."""
        if self.scale != 1:
            return SummedGrad(self.ids, self.grad * np.float32(factor))
        summed = SummedGrad.__new__(SummedGrad)
        summed.ids = self.ids
        summed.runs = self.runs
        summed.scale = float(np.float32(factor))
        summed._grad = None
        return summed

    def square_sum(self) -> float:
        """Sum of the squares of all values, in f64."""
        if _native.core is None or self.scale != 1:
            return square_sum(self.grad)
        return self.runs.square_sum()

    def bad_row(self) -> int | None:
        """The first row whose gradient is not finite; None if all are finite."""
        if _native.core is not None and abs(self.scale) <= 1 and self.runs.are_finite():
            return None
        finite_U = np.isfinite(self.grad).all(axis=1)
        return None if finite_U.all() else int(self.ids[~finite_U][0])


class Order(NamedTuple):
    """Positions of gradients, sorted by row.

    Attributes:
        positions_N: int64 [N].
        starts: int64 [U + 1]: where those of each row begin.
        several: how many rows have several gradients.
    """

    positions_N: np.ndarray
    starts: np.ndarray
    several: int


class Runs:
    """Gradients in the order of their rows. Those of a row are a run.

    Args:
        grads: f32 [n, d] each, C-contiguous.
        rows: U.
        dim: d.
        order: of the positions in all of them. None: row u has the gradient at position u.
    """

    def __init__(
        self, grads: list[np.ndarray], rows: int, dim: int, order: Order | None = None
    ) -> None:
        self._grads = grads
        self._rows = rows
        self._dim = dim
        self._order = order
        self._sums_Md: np.ndarray | None = None  # of rows that have several
        ends = np.cumsum([len(grad_nd) for grad_nd in grads])
        self._firsts = np.array([0, *ends[:-1]], np.int64)
        self._addresses: np.ndarray | None = None

    def grad(self) -> np.ndarray:
        """f32 [U, d]: the sums."""
        grad_Nd = np.concatenate(self._grads)
        if self._order is None:
            return grad_Nd
        if _native.core is None:
            return _sum_runs(grad_Nd, self._order)
        starts = self._order.starts
        sums_Md = self.sums()
        grad_Ud = grad_Nd[self._order.positions_N[starts[:-1]]]
        grad_Ud[np.diff(starts) > 1] = sums_Md
        return grad_Ud

    # With the native core alone.

    def are_finite(self) -> bool:
        """Whether all sums are finite."""
        return self._survey()[0]

    def square_sum(self) -> float:
        """Sum of the squares of all sums, in f64."""
        return self._survey(squares=True)[1]

    def sums(self) -> np.ndarray:
        """f32 [M, d]: the sums of rows that have several gradients."""
        if self._sums_Md is None:
            self._survey()
        assert self._sums_Md is not None
        return self._sums_Md

    def native(self) -> NativeRuns:
        """For native calls, as long as this object lives."""
        core = _native.compiled()
        if self._addresses is None:
            self._addresses = np.array([core.address(grad) for grad in self._grads], np.uint64)
        positions = starts = 0
        if self._order is not None:
            positions = core.address(self._order.positions_N)
            starts = core.address(self._order.starts)
        return (
            core.address(self._addresses),
            core.address(self._firsts),
            len(self._grads),
            positions,
            starts,
            self._rows,
            self._dim,
        )

    def _survey(self, squares: bool = False) -> tuple[bool, float]:
        core = _native.compiled()
        if self._sums_Md is None:
            several = 0 if self._order is None else self._order.several
            self._sums_Md = np.empty((several, self._dim), np.float32)
        return core.survey(self.native(), core.address(self._sums_Md), squares)


def _sorted(ids_N: np.ndarray) -> tuple[np.ndarray, Order]:
    """Distinct ids [U], and the order of the positions."""
    core = _native.core
    count = len(ids_N)
    if core is not None:
        # One array: malloc gives three back to the system at each step, and then takes new pages.
        room = np.empty(3 * count + 1, np.int64)
        order_N, rows_N, starts = np.split(room, [count, 2 * count])
        outputs = [core.address(out) for out in (order_N, rows_N, starts)]
        distinct, several = core.sort_rows(core.address(ids_N), count, *outputs)
        if distinct >= 0:
            return rows_N[:distinct], Order(order_N, starts[: distinct + 1], several)
    order_N = np.argsort(ids_N, kind="stable")
    sorted_N = ids_N[order_N]
    is_first_N = np.ones(count, bool)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    starts = np.append(np.flatnonzero(is_first_N), count)
    several = int((np.diff(starts) > 1).sum())
    return sorted_N[starts[:-1]], Order(order_N, starts, several)


def _sum_runs(grad_Nd: np.ndarray, order: Order) -> np.ndarray:
    """f32 [U, d]: the sum of each run."""
    order_N, starts, _ = order
    grad_Ud = grad_Nd[order_N[starts[:-1]]]
    run_N = np.repeat(np.arange(len(grad_Ud)), np.diff(starts))
    is_later_N = np.ones(len(order_N), bool)
    is_later_N[starts[:-1]] = False
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf: the optimiser's error names it
        np.add.at(grad_Ud, run_N[is_later_N], grad_Nd[order_N[is_later_N]])  # one after the other
    return grad_Ud


def square_sum(values_Nd: np.ndarray) -> float:
    """Sum of squares in f64, in the order that this module defines."""
    total = 0.0
    for first in range(0, len(values_Nd), _CHUNK):
        blocks_nk16 = in_lanes(values_Nd[first : first + _CHUNK].astype(np.float64))
        squares_K16 = np.square(blocks_nk16).reshape(-1, LANES)
        total += float(folded(np.add.reduce(squares_K16, axis=0)))
    return total


def in_lanes(values_Nd: np.ndarray) -> np.ndarray:
    """[N, k, 16]: columns in blocks of 16; zeros fill up the last one."""
    count, dim = values_Nd.shape
    blocks = -(-dim // LANES)
    padded_Nd = values_Nd
    if dim % LANES:
        padded_Nd = np.zeros((count, blocks * LANES), values_Nd.dtype)
        padded_Nd[:, :dim] = values_Nd
    return padded_Nd.reshape(count, blocks, LANES)


def folded(sums_16: np.ndarray) -> np.ndarray:
    """Sums on the last axis of 16: the second half is added to the first, four times."""
    while sums_16.shape[-1] > 1:
        half = sums_16.shape[-1] // 2
        sums_16 = sums_16[..., :half] + sums_16[..., half:]
    return sums_16[..., 0]
