"""Memory for rows that becomes tensors, used again when the last tensor over it is gone."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch

_LEAST = 1024  # values


class BufferPool:
    """Keeps up to `limit` bytes that nothing refers to. pinned: page-locked, for copies to a GPU.

    Not safe for several threads at once: its owner holds a lock. What comes back may come at any
    time.
    """

    def __init__(self, limit: int, pinned: bool = False) -> None:
        self._limit, self._pinned = limit, pinned
        self._free: dict[int, list[np.ndarray]] = {}
        self._free_bytes = 0
        self._returned: deque[np.ndarray] = deque()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 of this shape, filled with anything.

        The life of this very array is watched, not that of views of it: a tensor made from it
        (`torch.from_numpy`) keeps it, and whatever is made from the tensor keeps the tensor's
        memory.
        """
        while self._returned:
            memory = self._returned.popleft()
            self._free.setdefault(len(memory), []).append(memory)
            self._free_bytes += memory.nbytes
        values = math.prod(shape)
        size = 1 << (max(values, _LEAST) - 1).bit_length()
        same = self._free.get(size)
        memory = self._out_of(same) if same else self._new(size)
        while self._free_bytes > self._limit:
            self._out_of(next(each for each in self._free.values() if each))
        rows = memory[:values].reshape(shape)
        weakref.finalize(rows, _give_back, weakref.ref(self), memory).atexit = False
        return rows

    def _out_of(self, stack: list[np.ndarray]) -> np.ndarray:
        memory = stack.pop()
        self._free_bytes -= memory.nbytes
        return memory

    def _new(self, size: int) -> np.ndarray:
        return (
            torch.empty(size, pin_memory=True).numpy()
            if self._pinned
            else np.empty(size, np.float32)
        )


def _give_back(pool: weakref.ref[BufferPool], memory: np.ndarray) -> None:
    """Takes no lock: the garbage collector may call it in a thread that holds the pool's."""
    if (alive := pool()) is not None:
        alive._returned.append(memory)
