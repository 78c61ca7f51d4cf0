"""A store over memory that other stores look at as well; for the other benchmarks."""

from __future__ import annotations

import numpy as np

from engraphy.store import StoreInfo
from engraphy.store.mapped import MappedStore


class MemoryStore(MappedStore):
    """As many rows of `row_bytes` as fit into `memory`, uint8 [n]."""

    in_memory = True

    def __init__(self, memory: np.ndarray, row_bytes: int) -> None:
        rows = len(memory) // row_bytes
        self._info = StoreInfo("ram", rows, row_bytes, writable=False)
        super().__init__([memory[: rows * row_bytes].reshape(rows, row_bytes)])

    @property
    def info(self) -> StoreInfo:
        return self._info
