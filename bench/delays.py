"""A store that is slow on purpose, for benchmarks of reading ahead."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from engraphy.store.base import RowStore
from engraphy.store.wrapper import WrapperStore


class Delayed(WrapperStore):
    """A store whose reads take longer by a fixed time, as those of another machine do."""

    def __init__(
        self, store: RowStore, seconds: float, pause: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__(store)
        self._seconds = seconds
        self._pause = pause

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        self._pause(self._seconds)
        super()._gather(ids_N, out_NR)
