"""Gradients of rows: as a backward pass makes them, and summed by row.

This module knows neither tables nor optimisers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .summed import SummedGrad

_MANY_PENDING = 1024  # pending gradients; an optimiser should have drained them by then
_FEW_WAITING = 16_384  # rows that may wait unsummed in a large table


class RowGrad(NamedTuple):
    """Gradient of rows as they were read: ids int64 [N] with duplicates, grad f32 [N, d]."""

    layer: int
    ids: np.ndarray
    grad: np.ndarray


def coalesce(row_grads: Iterable[RowGrad]) -> dict[int, SummedGrad]:
    """Sums row gradients by layer and row.

    Gradients of a row are summed in their order in `row_grads`, so the result is repeatable.
    """
    by_layer: dict[int, list[RowGrad]] = {}
    for entry in row_grads:
        by_layer.setdefault(entry.layer, []).append(entry)
    return {
        layer: SummedGrad.of([entry.ids for entry in entries], [entry.grad for entry in entries])
        for layer, entries in by_layer.items()
    }


class Waiting:
    """Sums row gradients that wait to be drained, and warns if nothing drains them.

    The gradients of a layer are summed by row as soon as more rows wait than twice the rows of the
    last sum, and more than the layer has (or 16,384, if that is less). The order of the sum does
    not change, so the result equals one sum at the end, bit for bit.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._count = 0
        self._warned = False
        self._rows: dict[int, int] = {}  # layer -> rows that wait
        self._summed: dict[int, int] = {}  # layer -> distinct rows after the last sum
        self._weights: dict[int, Tensor] = {}  # layer -> a few weights, at the first gradient

    def join(self, pending: list[RowGrad], entry: RowGrad, weight: Tensor, table_rows: int) -> None:
        """Appends `entry` to `pending`.

        Args:
            pending: the gradients that wait.
            entry: the next gradient.
            weight: a weight of its layer, which a dense optimiser changes.
            table_rows: how many rows the layer has.
        """
        if not pending:
            self._forget()
        layer = entry.layer
        self._warn_if_undrained(layer, weight)
        pending.append(entry)
        self._count += 1
        self._rows[layer] = self._rows.get(layer, 0) + len(entry.ids)
        limit = max(2 * self._summed.get(layer, 0), min(table_rows, _FEW_WAITING))
        if self._rows[layer] > limit and self._rows[layer] > len(entry.ids):
            self._rows[layer] = self._summed[layer] = _sum_waiting(pending, layer)

    def _warn_if_undrained(self, layer: int, weight: Tensor) -> None:
        """Warns if the layer's weights have changed since its first pending gradient."""
        # Compares values: fused optimisers do not count up a tensor's version.
        now = weight.detach().reshape(-1)[:4].nan_to_num().cpu()
        has_moved = not torch.equal(self._weights.setdefault(layer, now), now)
        if not self._warned and (has_moved or self._count == _MANY_PENDING):
            self._warned = True
            warnings.warn(
                f"{self._count} row gradients wait in row_grads; if nothing drains them, no row "
                "learns: train with OptimizerPair or hf.trainer_kwargs, or set "
                "rows_require_grad = False",
                stacklevel=5,
            )


def _sum_waiting(pending: list[RowGrad], layer: int) -> int:
    """Replaces the layer's entries by their sum. Returns the number of its rows."""
    ids_U, grad_Ud = coalesce(entry for entry in pending if entry.layer == layer)[layer]
    first = next(index for index, entry in enumerate(pending) if entry.layer == layer)
    others = [entry for entry in pending[first:] if entry.layer != layer]
    pending[first:] = [RowGrad(layer, ids_U, grad_Ud), *others]
    return len(ids_U)
