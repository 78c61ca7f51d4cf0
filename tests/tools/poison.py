"""Poison in uninitialised buffers, so that a test fails if code reads what was never written.

`poisoned` replaces `np.empty`, `np.empty_like`, `torch.empty`, `torch.empty_like`,
`Tensor.new_empty` and `BufferPool.take` by versions that fill what they return. Only calls from
modules of engraphy are changed: libraries and tests keep numpy's and torch's own functions.

Not poisoned are buffers above LIMIT bytes, which would slow the tests, tensors on a GPU, and what
`torch.compile` traces. A child that is forked has the poison; a process that is started has not.

The bytes are chosen to do harm:

    floats            0xFF: NaN
    uint8, uint16     0xFF: records that decode to NaN in every row format, bits of NaNs
    other integers    0xA5: an id far below zero, or far beyond each table
    bool              1: True
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._device import _device_constructors

from engraphy.memory.buffers import BufferPool

LIMIT = 64 << 20
"""Bytes. Larger buffers are not poisoned."""
ROWS = ("uint8", "uint16")
"""Dtypes of records, and of bits of bfloat16."""


def fill_array(array: np.ndarray) -> np.ndarray:
    """Fill a new array with the pattern of its dtype; returns it."""
    if array.nbytes <= LIMIT and array.dtype.kind in "fciub":
        _set(array.__array_interface__["data"][0], array.dtype.name, array.nbytes)
    return array


def fill_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a new tensor with the pattern of its dtype; returns it."""
    if type(tensor) is torch.Tensor and tensor.device.type == "cpu":  # no meta, no fake tensor
        memory = tensor.untyped_storage()
        if memory.nbytes() <= LIMIT:
            _set(memory.data_ptr(), str(tensor.dtype).removeprefix("torch."), memory.nbytes())
    return tensor


def _set(address: int, dtype: str, size: int) -> None:
    """Lets no other thread of Python run, as allocating does not: tests look at that."""
    ctypes.pythonapi.memset(ctypes.c_void_p(address), _byte(dtype), ctypes.c_size_t(size))


def _byte(dtype: str) -> int:
    if dtype == "bool":
        return 1
    integer = dtype.startswith(("int", "uint"))
    return 0xA5 if integer and dtype not in ROWS else 0xFF


def _filling(
    owner: Any, original: Callable[..., Any], fill: Callable[[Any], Any]
) -> Callable[..., Any]:
    """`original`, with its result filled if it is engraphy's own or called by engraphy."""

    def poisoning(*arguments: Any, **keywords: Any) -> Any:
        made = original(*arguments, **keywords)
        if torch.compiler.is_compiling():
            return made
        ours = owner is BufferPool or _of_engraphy(sys._getframe(1).f_globals)
        return fill(made) if ours else made

    return poisoning


def _of_engraphy(names: dict[str, Any]) -> bool:
    return names.get("__name__", "").partition(".")[0] == "engraphy"


@contextmanager
def poisoned() -> Iterator[None]:
    """Poison what engraphy allocates without filling it, within a `with` block."""
    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (np, "empty", fill_array),
        (np, "empty_like", fill_array),
        (torch, "empty", fill_tensor),
        (torch, "empty_like", fill_tensor),
        (torch.Tensor, "new_empty", fill_tensor),
        (BufferPool, "take", fill_array),  # a buffer used again still holds old rows
    ]
    # torch keeps the functions for which `with torch.device(...)` counts: ask before they change.
    _device_constructors()
    originals = [getattr(owner, name) for owner, name, _ in places]
    try:
        for (owner, name, fill), original in zip(places, originals, strict=True):
            setattr(owner, name, _filling(owner, original, fill))
        yield
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
