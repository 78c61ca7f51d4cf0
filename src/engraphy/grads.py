"""Gradients of rows: as a backward pass hands them over, and summed by row. Knows neither tables nor optimisers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class RowGrad(NamedTuple):
    """Gradient of rows as they were read: ids int64 [N] with duplicates, grad f32 [N, d]."""

    layer: int
    ids: np.ndarray
    grad: np.ndarray


class SummedGrad(NamedTuple):
    """Gradient of one layer's rows: ids int64 [U], ascending and distinct; grad f32 [U, d], duplicates summed."""

    ids: np.ndarray
    grad: np.ndarray


def coalesce(row_grads: Iterable[RowGrad]) -> dict[int, SummedGrad]:
    """Sort row gradients by id and sum duplicates, per layer. The order of the sum is that of the batch: repeatable."""
    by_layer: dict[int, list[RowGrad]] = {}
    for entry in row_grads:
        by_layer.setdefault(entry.layer, []).append(entry)
    summed = {}
    for layer, entries in by_layer.items():
        ids_N = np.concatenate([entry.ids for entry in entries])
        grad_Nd = np.concatenate([entry.grad for entry in entries])
        order = np.argsort(ids_N, kind="stable")
        ids_N = ids_N[order]
        firsts = np.flatnonzero(np.concatenate([[True], ids_N[1:] != ids_N[:-1]])) if len(ids_N) else order
        grad_Ud = np.add.reduceat(grad_Nd[order], firsts, axis=0) if len(ids_N) else grad_Nd
        summed[layer] = SummedGrad(ids_N[firsts], grad_Ud)
    return summed
