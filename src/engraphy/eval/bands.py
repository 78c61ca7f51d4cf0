"""How often a training text held the n-gram that ends at a target: a memory's gain is repeated
local text, so a loss is only told apart from another when it is split by this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..data.packing import IGNORED
from ..errors import ConfigError

BANDS: Mapping[str, tuple[int, int]] = {
    "never": (0, 0),
    "1-3": (1, 3),
    "4-30": (4, 30),
    "31+": (31, 2**62),
}
"""Names of frequency bands and the counts, both included, that they take."""


@dataclass(frozen=True)
class BandLoss:
    """Mean loss in nats of the targets in a band, and how many they are. loss is NaN where there
    are none."""

    loss: float
    targets: int


class NgramCounts:
    """Counts of the n-grams of a training text, within documents: 16 bytes for each distinct one.

    documents: integer ids of each, without special tokens; as in `pack`, each counts between two
    end tokens. Raises ConfigError where vocab_size ** order does not fit 63 bits.
    """

    def __init__(
        self, documents: Sequence[np.ndarray], end_id: int, vocab_size: int, order: int = 3
    ):
        if order < 1 or vocab_size < 1 or vocab_size**order > 2**63:
            raise ConfigError(
                f"expected vocab_size ** order up to 2 ** 63, found {vocab_size} ** {order}"
            )
        self.vocab_size, self.order = vocab_size, order
        end = np.array([end_id])
        # A document too short for an n-gram has none; the others are never joined.
        keys = [self._keys(np.concatenate([end, ids, end])) for ids in documents]
        self._distinct, self._counts = np.unique(
            np.concatenate([*keys, np.empty(0, np.int64)]), return_counts=True
        )

    def count(self, ids_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor) -> np.ndarray:
        """Training count of the n-gram that ends at each target, int64 [B, T].

        -1 where there is none: the target is IGNORED, or the n-gram would reach over a start.
        """
        ids, targets, starts = (values.cpu().numpy() for values in (ids_BT, targets_BT, starts_BT))
        position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        begin = np.maximum.accumulate(np.where(starts, position, 0), axis=1)
        whole = (targets != IGNORED) & (position - begin >= self.order - 2)
        counts = np.full(ids.shape, -1, dtype=np.int64)
        row, last = np.nonzero(whole)
        if not len(row):
            return counts
        key = np.zeros(len(row), dtype=np.int64)
        for back in range(self.order - 2, -1, -1):
            key = key * self.vocab_size + ids[row, last - back]
        key = key * self.vocab_size + targets[row, last]
        at = np.searchsorted(self._distinct, key)
        found = np.append(self._distinct, -1)[at] == key
        counts[row, last] = np.where(found, np.append(self._counts, 0)[at], 0)
        return counts

    def _keys(self, ids: np.ndarray) -> np.ndarray:
        """Each n-gram of a text as one number: int64 [max(0, len(ids) - order + 1)]."""
        keys = np.zeros(max(0, len(ids) - self.order + 1), dtype=np.int64)
        for offset in range(self.order):
            keys = keys * self.vocab_size + ids[offset : offset + len(keys)]
        return keys


def loss_by_band(losses: np.ndarray, counts: np.ndarray) -> dict[str, BandLoss]:
    """Mean loss of the targets in each of BANDS. losses and counts: of the same shape; counts of -1
    are left out."""
    told = {}
    for name, (low, high) in BANDS.items():
        inside = losses[(counts >= low) & (counts <= high)]
        told[name] = BandLoss(
            float(inside.mean(dtype=np.float64)) if len(inside) else float("nan"), len(inside)
        )
    return told
