"""Gradients of one layer, duplicates summed by row, in an order that is defined.

The plain versions here say in which order numbers are added, so that the result is the same bits
whatever the machine and the number of threads:

- The gradients of a row are added one after the other, in the order of their positions.
- A sum of squares is taken over chunks of 4096 rows, which are added one after the other. A chunk
  has 16 running sums: column c belongs to number c % 16. They are folded in halves at its end.

The native core (`_native/update_kernel.cpp`) gives the same bits. With it the sums are made where
they are used, and take no memory of their own unless `grad` is asked for.
"""

# _native is private to engraphy.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .. import _native

LANES = 16  # running sums
_CHUNK = 4096  # rows
_FEW = 1 << 27  # gradients of a row whose sum is finite, if each is at most _SMALL
_SMALL = 1e30

# What native calls take (`Runs` in _core.pyi).
NativeRuns = tuple[int, int, int, int, int, int, int, float]


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
        self.ids = np.ascontiguousarray(ids, np.int64)
        grad_Ud = np.ascontiguousarray(grad, np.float32)
        self._runs = _Runs([grad_Ud], None, None, grad_Ud.shape)
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
        ids_U, order_N, starts = _sorted(ids_N)
        summed = cls.__new__(cls)
        summed.ids = ids_U
        summed._runs = _Runs(grads, order_N, starts, (len(ids_U), grads[0].shape[1]))
        summed._grad = None
        return summed

    @property
    def grad(self) -> np.ndarray:
        """f32 [U, d]: the sums."""
        if self._grad is None:
            self._grad = self._runs.sums()
        return self._grad

    def __iter__(self) -> Iterator[np.ndarray]:
        yield self.ids
        yield self.grad

    def scaled(self, factor: float) -> SummedGrad:
        """The gradient times a factor, which is rounded to f32."""
        if self._runs.scale != 1:
            return SummedGrad(self.ids, self.grad * np.float32(factor))
        summed = SummedGrad.__new__(SummedGrad)
        summed.ids = self.ids
        summed._runs = self._runs.scaled(factor)
        summed._grad = None
        return summed

    def square_sum(self) -> float:
        """Sum of the squares of all values, in f64."""
        core = _native.core
        return square_sum(self.grad) if core is None else core.square_runs(self.native())

    def bad_row(self) -> int | None:
        """The first row whose gradient is not finite; None if all are finite."""
        if self._runs.are_small():
            return None
        finite_U = np.isfinite(self.grad).all(axis=1)
        return None if finite_U.all() else int(self.ids[~finite_U][0])

    def native(self) -> NativeRuns:
        """For native calls, as long as this object lives."""
        return self._runs.native()


class _Runs:
    """Gradients in the order of their rows. Those of a row are a run.

    Args:
        grads: f32 [n, d] each, C-contiguous.
        order_N: int64 [N], positions in all of them, sorted by row. None if each row has one.
        starts: int64 [U + 1], where each run begins. None if each row has one gradient.
        shape: (U, d).
        scale: multiplies the sums; an f32.
    """

    def __init__(
        self,
        grads: list[np.ndarray],
        order_N: np.ndarray | None,
        starts: np.ndarray | None,
        shape: tuple[int, ...],
        scale: float = 1.0,
    ) -> None:
        self.scale = scale
        self._grads = grads
        self._order_N = order_N
        self._starts = starts
        self._shape = shape
        ends = np.cumsum([len(grad_nd) for grad_nd in grads])
        self._firsts = np.array([0, *ends[:-1]], np.int64)
        self._addresses: np.ndarray | None = None

    def scaled(self, factor: float) -> _Runs:
        scale = float(np.float32(factor))
        return _Runs(self._grads, self._order_N, self._starts, self._shape, scale)

    def native(self) -> NativeRuns:
        core = _native.compiled()
        if self._addresses is None:
            self._addresses = np.array([core.address(grad) for grad in self._grads], np.uint64)
        return (
            core.address(self._addresses),
            core.address(self._firsts),
            len(self._grads),
            0 if self._order_N is None else core.address(self._order_N),
            0 if self._starts is None else core.address(self._starts),
            *self._shape,
            self.scale,
        )

    def sums(self) -> np.ndarray:
        """f32 [U, d]."""
        core = _native.core
        if core is not None:
            sums_Ud = np.empty(self._shape, np.float32)
            core.sum_runs(self.native(), core.address(sums_Ud))
            return sums_Ud
        sums_Ud = np.concatenate(self._grads)
        if self._order_N is not None and self._starts is not None:
            sums_Ud = _sum_runs(sums_Ud, self._order_N, self._starts)
        return sums_Ud * np.float32(self.scale)

    def are_small(self) -> bool:
        """Whether all gradients are so small that each sum is finite; False if that is not known.

        This reads them in the order of memory, which is faster than summing.
        """
        core = _native.core
        if core is None or sum(map(len, self._grads)) > _FEW:
            return False
        return all(core.within(core.address(g), g.size, _SMALL) for g in self._grads)


def _sorted(ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ids [U], positions [N] sorted by id, and where each id begins in them [U + 1]."""
    core = _native.core
    count = len(ids_N)
    if core is not None:
        order_N = np.empty(count, np.int64)
        rows_N = np.empty(count, np.int64)
        starts = np.empty(count + 1, np.int64)
        distinct = core.sort_rows(
            core.address(ids_N), count, *(core.address(out) for out in (order_N, rows_N, starts))
        )
        if distinct >= 0:
            return rows_N[:distinct], order_N, starts[: distinct + 1]
    order_N = np.argsort(ids_N, kind="stable")
    sorted_N = ids_N[order_N]
    is_first_N = np.ones(count, bool)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    starts = np.append(np.flatnonzero(is_first_N), count)
    return sorted_N[starts[:-1]], order_N, starts


def _sum_runs(grad_Nd: np.ndarray, order_N: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """f32 [U, d]: the sum of each run."""
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
