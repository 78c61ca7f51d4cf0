"""Columns of buffers [B, n, ...], one per position; a column may be absent in some sequences."""

from __future__ import annotations

from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor


class CursorColumns(NamedTuple):
    """Columns of a buffer for a native cursor (`Cursor` in `_native/_core.pyi`).

    Attributes:
        oldest: Address of the first sequence's oldest column that is read.
        next: Address of its next column, which is to be written.
        stride: Values from one sequence's columns to the next one's.
        bytes: Bytes from one column to the next.
        room: Columns that may be written.
        values: Values of a column, in one sequence.
        wide: Whether they are float64 conv inputs.
    """

    oldest: int
    next: int
    stride: int
    bytes: int
    room: int
    values: int
    wide: bool


def kept_columns(present_Bn: np.ndarray, look_back: int, margin: int) -> np.ndarray:
    """int64 [B, columns]: the columns to keep.

    The last `margin` columns are kept as they are, since they may be taken back. Before them come
    the last `look_back` columns that are present, with -1 in front if there are fewer.
    """
    batch, count = present_Bn.shape
    recent = max(count - margin, 0)
    older = last_present(present_Bn[:, :recent], look_back)
    return np.concatenate([older, np.tile(np.arange(recent, count), (batch, 1))], axis=1)


def last_present(present_Bn: np.ndarray, count: int) -> np.ndarray:
    """int64 [B, count]: the last columns that are present, in order.

    -1 in front if there are fewer.
    """
    order = np.argsort(present_Bn, axis=1, kind="stable")  # absent ones first
    order = np.where(np.take_along_axis(present_Bn, order, axis=1), order, -1)
    missing = max(count - order.shape[1], 0)
    return np.pad(last(order, count), ((0, 0), (missing, 0)), constant_values=-1)


def taken(values_Bn: np.ndarray, index_BK: np.ndarray, nothing: int) -> np.ndarray:
    """[B, K]: the columns of `index_BK`; `nothing` for an index of -1."""
    if not values_Bn.shape[1]:
        return np.full(index_BK.shape, nothing, values_Bn.dtype)
    values_BK = np.take_along_axis(values_Bn, np.maximum(index_BK, 0), axis=1)
    return np.where(index_BK < 0, np.asarray(nothing, values_Bn.dtype), values_BK)


def taken_inputs(inputs_BnSD: Tensor, index_BK: np.ndarray) -> Tensor:
    """[B, K, S, D]: the columns of `index_BK`; zeros for an index of -1."""
    index = torch.from_numpy(index_BK).to(inputs_BnSD.device)
    sequence = torch.arange(len(index), device=index.device)[:, None]
    inputs_BKSD = inputs_BnSD[sequence, index.clamp_min(0)]
    return torch.where((index < 0)[:, :, None, None], 0.0, inputs_BKSD)


def padded(values_Bn: np.ndarray, columns: int, fill: int) -> np.ndarray:
    """[B, columns]: the values, with `fill` in front of them."""
    missing = columns - values_Bn.shape[1]
    return np.pad(values_Bn, ((0, 0), (missing, 0)), constant_values=fill)


def since_start(starts_Bn: np.ndarray) -> np.ndarray:
    """bool [B, n]: no later position begins a document."""
    from_here = np.cumsum(starts_Bn[:, ::-1], axis=1)[:, ::-1]
    return from_here == starts_Bn


@overload
def last(values_Bn: np.ndarray, count: int) -> np.ndarray: ...
@overload
def last(values_Bn: None, count: int) -> None: ...
def last(values_Bn: np.ndarray | None, count: int) -> np.ndarray | None:
    """The last `count` columns, or all if there are fewer. None for None."""
    return None if values_Bn is None else values_Bn[:, max(values_Bn.shape[1] - count, 0) :]
