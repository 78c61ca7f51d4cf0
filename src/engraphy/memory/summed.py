"""Gradients of one layer, duplicates summed by row, in an order that is defined.

The plain versions here say in which order numbers are added, so that the result is the same bits
whatever the machine and the number of threads:

- The gradients of a row are added one after the other, in the order of their positions.
- A sum of squares is taken over chunks of 4096 rows, which are added one after the other. A chunk
  has 16 running sums: column c belongs to number c % 16. They are folded in halves at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

LANES = 16  # running sums
_CHUNK = 4096  # rows


class SummedGrad:
    """Gradient of one layer's rows, duplicates summed.

    May be unpacked: `ids_U, grad_Ud = summed`.

    Attributes:
        ids: int64 [U], ascending and distinct.
    """

    def __init__(self, ids: np.ndarray, grad: np.ndarray) -> None:
        """Takes gradients that are summed already.

        Args:
            ids: int64 [U], ascending and distinct.
            grad: f32 [U, d].
        """
        self.ids = ids
        self._grad = grad

    @classmethod
    def of(cls, ids: Sequence[np.ndarray], grads: Sequence[np.ndarray]) -> SummedGrad:
        """Sums gradients by row.

        Args:
            ids: int64 [N] each, with duplicates; at least one array.
            grads: f32 [N, d] each. Gradients of a row are added in this order.
        """
        ids_N = np.concatenate(ids)
        grad_Nd = np.concatenate(grads)
        order_N = np.argsort(ids_N, kind="stable")
        sorted_N = ids_N[order_N]
        is_first_N = np.ones(len(ids_N), bool)
        is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
        return cls(sorted_N[is_first_N], _sum_runs(grad_Nd, order_N, is_first_N))

    @property
    def grad(self) -> np.ndarray:
        """f32 [U, d]: the sums."""
        return self._grad

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.ids
        yield self.grad

    def scaled(self, factor: float) -> SummedGrad:
        """The gradient times a factor, which is rounded to f32."""
        return SummedGrad(self.ids, self.grad * np.float32(factor))

    def square_sum(self) -> float:
        """Sum of the squares of all values, in f64."""
        return square_sum(self.grad)

    def bad_row(self) -> int | None:
        """The first row whose gradient is not finite; None if all are finite."""
        finite_U = np.isfinite(self.grad).all(axis=1)
        return None if finite_U.all() else int(self.ids[~finite_U][0])


def _sum_runs(grad_Nd: np.ndarray, order_N: np.ndarray, is_first_N: np.ndarray) -> np.ndarray:
    """f32 [U, d]: sums of runs of equal ids. order_N: the positions, sorted by id."""
    grad_Ud = grad_Nd[order_N[is_first_N]]
    run_N = np.cumsum(is_first_N) - 1
    later_N = ~is_first_N
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf: the optimiser's error names it
        np.add.at(grad_Ud, run_N[later_N], grad_Nd[order_N[later_N]])  # one after the other
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
