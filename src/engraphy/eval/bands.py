"""How often a training text held the n-gram that ends at a target.

What a memory gains is repeated local text. So two losses say more once they are split by this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..addresses.counts import Counts
from ..data.packing import IGNORED, Batch
from ..errors import ConfigError

BANDS: Mapping[str, tuple[int, int]] = {
    "never": (0, 0),
    "1-3": (1, 3),
    "4-30": (4, 30),
    "31+": (31, 2**62),
}
"""Frequency bands by name: the lowest and the highest count, both included."""


@dataclass(frozen=True)
class BandLoss:
    """The loss in a band.

    Attributes:
        loss: Mean nats of the targets in the band; NaN if there are none.
        targets: Number of targets.
    """

    loss: float
    targets: int


class NgramCounts:
    """Counts of the n-grams of a training text, within documents. Takes 16 bytes for each distinct
    n-gram.

    Args:
        documents: Integer ids of each, without special tokens. As in `pack`, each stands between
            two end tokens.
        end_id: Id of the end token.
        vocab_size: Ids are below it.
        order: Tokens of an n-gram.

    Raises:
        ConfigError: vocab_size ** order does not fit 63 bits.
    """

    def __init__(
        self, documents: Sequence[np.ndarray], end_id: int, vocab_size: int, order: int = 3
    ):
        self._set_sizes(vocab_size, order)
        end = np.array([end_id])
        # Keys are made document by document, so that no n-gram joins two of them.
        keys = [self._keys(np.concatenate([end, ids, end])) for ids in documents]
        self._counts = Counts(np.concatenate([*keys, np.empty(0, np.int64)]))

    @classmethod
    def of_batches(cls, batches: Iterable[Batch], vocab_size: int, order: int = 3) -> NgramCounts:
        """Counts of the n-grams whose last token is a target of `batches`: those that a model has
        trained on, which may be a part of its corpus, or parts of it several times.

        Args:
            batches: What was trained on.
            vocab_size: Ids are below it.
            order: Tokens of an n-gram.

        Raises:
            ConfigError: vocab_size ** order does not fit 63 bits.
        """
        self = cls.__new__(cls)
        self._set_sizes(vocab_size, order)
        keys = [self._ends(*batch)[2] for batch in batches]
        self._counts = Counts(np.concatenate([*keys, np.empty(0, np.int64)]))
        return self

    def _set_sizes(self, vocab_size: int, order: int) -> None:
        if order < 1 or vocab_size < 1 or vocab_size**order > 2**63:
            raise ConfigError(
                f"expected vocab_size ** order up to 2 ** 63, found {vocab_size} ** {order}"
            )
        self.vocab_size = vocab_size
        self.order = order

    def count(self, ids_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor) -> np.ndarray:
        """Training counts of the n-grams that end at the targets.

        Args:
            ids_BT: As in `Batch`.
            targets_BT: As in `Batch`.
            starts_BT: As in `Batch`.

        Returns:
            int64 [B, T]. -1 = no n-gram ends here: the target is IGNORED, or the n-gram would reach
            over a start.
        """
        counts = np.full(tuple(ids_BT.shape), -1, dtype=np.int64)
        row, last, key = self._ends(ids_BT, targets_BT, starts_BT)
        counts[row, last] = self._counts.of(key)
        return counts

    def _ends(
        self, ids_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows and positions of the targets that end an n-gram, and these n-grams as numbers: int64
        [M] each."""
        ids, targets, starts = (values.cpu().numpy() for values in (ids_BT, targets_BT, starts_BT))
        position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        begin = np.maximum.accumulate(np.where(starts, position, 0), axis=1)
        whole = (targets != IGNORED) & (position - begin >= self.order - 2)
        row, last = np.nonzero(whole)
        key = np.zeros(len(row), dtype=np.int64)
        for back in range(self.order - 2, -1, -1):
            key = key * self.vocab_size + ids[row, last - back]
        return row, last, key * self.vocab_size + targets[row, last]

    def _keys(self, ids: np.ndarray) -> np.ndarray:
        """The n-grams of a text as numbers: int64 [max(0, len(ids) - order + 1)]."""
        keys = np.zeros(max(0, len(ids) - self.order + 1), dtype=np.int64)
        for offset in range(self.order):
            keys = keys * self.vocab_size + ids[offset : offset + len(keys)]
        return keys


def loss_by_band(losses: np.ndarray, counts: np.ndarray) -> dict[str, BandLoss]:
    """Mean losses of the targets in BANDS.

    Args:
        losses: Nats.
        counts: Counts of the same shape. Targets with a count of -1 are left out.
    """
    bands = {}
    for name, (low, high) in BANDS.items():
        inside = losses[(counts >= low) & (counts <= high)]
        loss = float(inside.mean(dtype=np.float64)) if len(inside) else math.nan
        bands[name] = BandLoss(loss, len(inside))
    return bands
