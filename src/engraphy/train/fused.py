"""One native pass over rows and moments: gradients are summed, and rows updated where they lie.

`RowOptimizer.update` of each optimiser is the specification; the native core
(`_native/update_kernel.cpp`) gives the same bits.
"""

# _native is private to engraphy.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .. import _native
from ..memory.summed import SummedGrad
from ..rows.format import RowFormat
from ..rows.read import addresses, check_ids
from ..store.base import RowStore

# What native calls take (`Place` in _core.pyi).
NativePlace = tuple[int, int, int, bool, bool]


class Rule(NamedTuple):
    """What an optimiser does to a row.

    Attributes:
        name: as in update_rows of _core.pyi.
        factors: numbers of this step, which are rounded to f32. At most four.
    """

    name: str
    factors: tuple[float, ...]


class Rows(NamedTuple):
    """Rows of a layer, or their moments."""

    store: RowStore
    format: RowFormat


def update(
    rule: Rule, grad: SummedGrad, rows: Rows, moments: Rows, stochastic: bool, key: int
) -> None:
    """Updates the rows of `grad` and their moments.

    Rows that cannot be written in place are gathered, updated and scattered.

    Args:
        rule: of this step.
        grad: gradients of a layer.
        rows: the rows of this layer.
        moments: the moments of this layer.
        stochastic: how bf16 is rounded.
        key: of the random bits.

    Raises:
        RowOutOfRange: an id is out of range. Nothing is changed.
        StoreError: a store cannot be read or written.
    """
    if not len(grad.ids):
        return
    count = len(grad.ids)
    with (
        rows.store.updating(count, grad.ids) as row_shards,
        moments.store.updating(count, grad.ids) as moment_shards,
    ):
        _update(
            rule,
            grad,
            _Target(rows, row_shards, grad.ids),
            _Target(moments, moment_shards, grad.ids),
            stochastic,
            key,
        )


class _Target:
    """Records that are updated: mapped shards, or a copy."""

    def __init__(self, rows: Rows, shards: Sequence[np.ndarray] | None, ids_U: np.ndarray) -> None:
        core = _native.compiled()
        self._store = rows.store
        self._ids_U = ids_U
        self._copy_UR: np.ndarray | None = None
        is_bf16 = rows.format.kind == "bf16"
        if shards is not None:
            at = addresses(shards, rows.store.info)
            self.place: NativePlace = (at.address, at.shard_rows, at.rows, is_bf16, False)
            return
        self._copy_UR = rows.store.gather(ids_U)
        self._address = np.array([core.address(self._copy_UR)], np.uint64)
        self.place = (core.address(self._address), len(ids_U), len(ids_U), is_bf16, True)

    def put(self) -> None:
        """Writes a copy back."""
        if self._copy_UR is not None:
            self._store.scatter(self._ids_U, self._copy_UR)


def _update(
    rule: Rule, grad: SummedGrad, rows: _Target, moments: _Target, stochastic: bool, key: int
) -> None:
    core = _native.compiled()
    a, b, c, d = (*rule.factors, 0.0, 0.0, 0.0)[:4]
    bad = core.update_rows(
        rule.name,
        (a, b, c, d),
        grad.runs.native(),
        core.address(grad.runs.sums()),
        grad.scale,
        core.address(grad.ids),
        rows.place,
        moments.place,
        stochastic,
        key,
    )
    if bad >= 0:
        check_ids(grad.ids, min(rows.place[2], moments.place[2]))
    rows.put()
    moments.put()
