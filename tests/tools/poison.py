"""Poison in uninitialised buffers, so that a test fails if code reads what nobody wrote.

`poisoned` replaces `np.empty`, `np.empty_like`, `torch.empty`, `torch.empty_like`,
`Tensor.new_empty` and `BufferPool.take` by versions that fill what they return. Of
numpy's and torch's functions only calls from modules of engraphy are changed: libraries and tests
keep the originals. What `torch.compile` traces is left alone too, and so are buffers above LIMIT
bytes, which would slow the tests. A child that is forked has the poison; a process that is started
has not.

The patterns are chosen to do harm:

    floats            NaN
    uint8             0xFF: the records of every row format that are made of it decode to NaN
    uint16            0xFFA5: NaN as bits of bfloat16 and of float16
    other integers    bytes of 0xA5: an id far below zero, or far beyond each table
    bool              True
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from engraphy.memory.buffers import BufferPool

LIMIT = 64 << 20
"""Bytes. Larger buffers are not poisoned."""
PATTERNS = {"uint8": 0xFF, "uint16": 0xFFA5}


def fill_array(array: np.ndarray) -> np.ndarray:
    """Fill a new array with the pattern of its dtype; returns it."""
    if array.nbytes > LIMIT:
        return array
    if array.dtype.kind in "fc":
        array.fill(np.nan)
    elif array.dtype.kind == "b":
        array.fill(True)
    elif array.dtype.kind in "iu":
        array.fill(_integer(array.dtype.name, array.dtype.itemsize, array.dtype.kind == "i"))
    return array


def fill_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a new tensor with the pattern of its dtype; returns it."""
    if tensor.device.type == "meta" or tensor.numel() * tensor.element_size() > LIMIT:
        return tensor
    dtype = tensor.dtype
    with torch.no_grad():
        if dtype.is_floating_point or dtype.is_complex:
            tensor.fill_(torch.nan)
        elif dtype == torch.bool:
            tensor.fill_(True)
        else:
            name = str(dtype).removeprefix("torch.")
            tensor.fill_(_integer(name, dtype.itemsize, dtype.is_signed))
    return tensor


def _integer(name: str, size: int, signed: bool) -> int:
    return PATTERNS.get(name, int.from_bytes(b"\xa5" * size, "little", signed=signed))


def _filling(
    owner: Any, original: Callable[..., Any], fill: Callable[[Any], Any]
) -> Callable[..., Any]:
    """`original`, whose result is filled if it is engraphy's, or if a module of engraphy calls it."""

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
    originals = [getattr(owner, name) for owner, name, _ in places]
    try:
        for (owner, name, fill), original in zip(places, originals, strict=True):
            setattr(owner, name, _filling(owner, original, fill))
        yield
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
