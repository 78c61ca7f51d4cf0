"""Rows in the memory of this process."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np

from ..errors import ConfigError, StoreError
from ..system.environment import HUGE_PAGES, switch
from .base import StoreInfo
from .mapped import MappedStore


class RamStore(MappedStore):
    """Rows in private anonymous memory, zero at first.

    The memory lies on huge pages if the kernel has any and ENGRAPHY_HUGE_PAGES is not "off". It is
    taken as rows are touched.

    Args:
        rows: number of rows.
        row_bytes: bytes of a row.
        layer: only a label in `info`.

    Raises:
        ConfigError: if a size is not a positive integer.
        StoreError: if the system refuses the memory.
    """

    in_memory = True

    def __init__(self, rows: int, row_bytes: int, layer: int | None = None) -> None:
        _check_positive("rows", rows)
        _check_positive("row_bytes", row_bytes)
        self._info = StoreInfo("ram", int(rows), int(row_bytes), writable=True, layer=layer)
        super().__init__([zeros(self._info.rows, self._info.row_bytes)])

    @property
    def info(self) -> StoreInfo:
        return self._info


def zeros(rows: int, row_bytes: int) -> np.ndarray:
    """uint8 [rows, row_bytes] in memory of this process, taken as it is touched.

    Raises:
        StoreError: if the system refuses.
    """
    size = rows * row_bytes
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise StoreError(
            f"the system refuses to map {rows} rows of {row_bytes} bytes = {size} bytes ({error})"
        ) from error
    advice = mmap.MADV_HUGEPAGE if switch(HUGE_PAGES) == "on" else mmap.MADV_NOHUGEPAGE
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(advice)
    return np.frombuffer(memory, np.uint8).reshape(rows, row_bytes)


def _check_positive(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_number or value < 1:
        raise ConfigError(f"ram store, {name}: expected a positive integer, found {value!r}")
