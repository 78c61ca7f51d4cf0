"""Memory for rows that becomes tensors, and is used again when the last tensor over it is gone."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch

_LEAST = 4096  # bytes of the smallest buffer
_LINE = 64  # bytes: outputs that begin with a cache line can be written past the caches


class BufferPool:
    """Keeps up to `limit` bytes that nothing refers to.

    Not safe for several threads at once: its owner holds a lock. Buffers may come back at any time.

    Args:
        limit: bytes.
        pinned: page-locked memory, for copies to a GPU.
    """

    def __init__(self, limit: int, pinned: bool = False) -> None:
        self._limit = limit
        self._pinned = pinned
        self._free: dict[int, list[np.ndarray]] = {}  # by size, in bytes
        self._free_bytes = 0
        self._returned: deque[np.ndarray] = deque()

    def take(
        self, shape: tuple[int, ...], dtype: type[np.float32 | np.uint16] = np.float32
    ) -> np.ndarray:
        """An array of this shape, with any content. Its memory begins with a cache line.

        The pool watches the life of this very array, not that of its views. A tensor made from it
        (`torch.from_numpy`) keeps it, and whatever is made from the tensor keeps the tensor's
        memory.
        """
        while self._returned:
            memory = self._returned.popleft()
            self._free.setdefault(len(memory), []).append(memory)
            self._free_bytes += memory.nbytes
        used = math.prod(shape) * np.dtype(dtype).itemsize
        size = 1 << (max(used, _LEAST) - 1).bit_length()
        same_size = self._free.get(size)
        memory = self._pop(same_size) if same_size else self._new(size)
        while self._free_bytes > self._limit:
            self._pop(next(stack for stack in self._free.values() if stack))
        rows = memory[:used].view(dtype).reshape(shape)
        weakref.finalize(rows, _give_back, weakref.ref(self), memory).atexit = False
        return rows

    def _pop(self, stack: list[np.ndarray]) -> np.ndarray:
        memory = stack.pop()
        self._free_bytes -= memory.nbytes
        return memory

    def _new(self, size: int) -> np.ndarray:
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        memory = np.empty(size + _LINE, np.uint8)
        first = -memory.ctypes.data % _LINE
        return memory[first : first + size]


def _give_back(pool: weakref.ref[BufferPool], memory: np.ndarray) -> None:
    """Takes no lock: the garbage collector may call it in a thread that holds the pool's."""
    alive = pool()
    if alive is not None:
        alive._returned.append(memory)
