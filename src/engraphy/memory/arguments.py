"""Arguments of a SequenceState as arrays: tensors, arrays or lists, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import InputError


def is_int(value: Any) -> bool:
    """Whether it is an integer of Python or numpy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def as_array(values: Any) -> np.ndarray:
    """A tensor, array or list as an array. Raises InputError for anything else."""
    try:
        return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:  # ragged lists
        raise InputError(f"expected an array, found {type(values).__name__}: {error}") from None


def as_flags(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Flags as bool of this shape; None for None. Raises InputError for another dtype or shape."""
    if values is None:
        return None
    flags = as_array(values)
    if flags.dtype != np.bool_ or flags.shape != tuple(shape):
        raise InputError(
            f"{name}: expected bool {list(shape)}, found {flags.dtype} {list(flags.shape)}"
        )
    return flags


class TokenArrays(NamedTuple):
    """T tokens of each sequence, as `SequenceState.extend` takes them.

    Attributes:
        ids: integers [B, T].
        live, starts, present: bool [B, T]; None = all, none, all. Where no token is present, live
            and starts are False.
    """

    ids: np.ndarray
    live: np.ndarray | None
    starts: np.ndarray | None
    present: np.ndarray | None


def as_tokens(ids_BT: Any, live: Any, starts: Any, present: Any, batch: int) -> TokenArrays:
    """The arguments of `SequenceState.extend` for `batch` sequences.

    Raises InputError if a shape or dtype is invalid, or an id at a live position is negative.
    """
    ids = as_array(ids_BT)
    if ids.ndim != 2 or len(ids) != batch or ids.dtype.kind not in "iu":
        raise InputError(
            f"ids: expected integers [{batch}, T], found {ids.dtype} {list(ids.shape)}"
        )
    begins = as_flags("starts", starts, ids.shape)
    alive = as_flags("live", live, ids.shape)
    there = as_flags("present", present, ids.shape)
    if there is not None:
        alive = there if alive is None else alive & there
        begins = None if begins is None else begins & there
    live_ids = ids if alive is None else ids[alive]
    if live_ids.size and live_ids.min() < 0:
        raise InputError(
            f"ids: expected no negative id at a live position, found {int(live_ids.min())}"
        )
    return TokenArrays(ids, alive, begins, there)


def as_index(values: Any, batch: int) -> np.ndarray:
    """int64 [n], each of 0..batch-1. Raises InputError for anything else."""
    index = as_array(values)
    if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
        raise InputError(f"index: expected integers [n], found {index.dtype} {list(index.shape)}")
    if index.size and not (0 <= index.min() and index.max() < batch):
        raise InputError(
            f"index: expected sequences 0 to {batch - 1}, found {index.min()} to {index.max()}"
        )
    return index.astype(np.int64)
