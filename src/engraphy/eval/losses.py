"""What is measured on trained arms: losses with their standard errors, by n-gram frequency; gates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..data.packing import Batches
from ..lm import LM
from ..lm.loop import autocast
from .bands import BANDS, NgramCounts

BUCKETS = dict(zip(BANDS, ("unseen", "rare", "frequent", "very frequent"), strict=True))
START = "context start"  # bucket of the targets that end no trigram: the first of a document, or of a row of a batch
_BOUNDS = {**{BUCKETS[band]: bounds for band, bounds in BANDS.items()}, START: (-1, -1)}


class Losses:
    """Nats of every held-out target: f64 [M], and the document [M] and training count of its
    trigram [M]."""

    def __init__(self, model: LM, batches: Batches, counts: NgramCounts, dtype: str):
        losses, documents, found = [], [], []
        seen = 0
        with torch.no_grad():
            for ids_BT, targets_BT, starts_BT in batches:
                with autocast(dtype):
                    loss_BT = model.eval().token_losses(ids_BT, targets_BT, starts_BT)
                kept = (targets_BT >= 0).numpy()
                document = seen + (ids_BT.numpy() == batches.end_id).ravel().cumsum().reshape(
                    ids_BT.shape
                )
                seen = int(document.max())
                losses.append(loss_BT.double().numpy()[kept])
                documents.append(document[kept])
                found.append(counts.count(ids_BT, targets_BT, starts_BT)[kept])
        self.losses, self.documents, self.counts = (
            np.concatenate(part) for part in (losses, documents, found)
        )

    def mean(self) -> dict[str, float]:
        """validation_loss, and validation_stderr where two or more documents give one."""
        return named_mean(self.losses, self.documents, "validation_loss", "validation_stderr")

    def by_bucket(self) -> dict[str, float]:
        """Mean nats a token by how often the trigram that ends at the target was trained. Every
        target has a bucket."""
        return {name: float(self.losses[inside].mean()) for name, inside in _buckets(self.counts)}


def _buckets(counts: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Buckets that hold something, and which targets: bool as counts."""
    for name, (low, high) in _BOUNDS.items():
        inside = (counts >= low) & (counts <= high)
        if inside.any():
            yield name, inside


def mean_with_error(values: np.ndarray, documents: np.ndarray) -> tuple[float, float | None]:
    """Mean over tokens and its standard error, documents taken as the independent units (ratio
    estimator).

    The error is None with fewer than two documents: nothing says then how far another one would be
    off.
    """
    sizes = np.bincount(documents)
    sums = np.bincount(documents, weights=values)[sizes > 0]
    sizes = sizes[sizes > 0]
    mean, count = float(values.mean()), len(sizes)
    if count < 2:
        return mean, None
    spread = float(((sums - mean * sizes) ** 2).sum()) * count / (count - 1)
    return mean, math.sqrt(spread) / len(values)


def named_mean(
    values: np.ndarray, documents: np.ndarray, name: str, error_name: str
) -> dict[str, float]:
    """`mean_with_error` under these names; without an error, its name is left out."""
    mean, error = mean_with_error(values, documents)
    return {name: mean} if error is None else {name: mean, error_name: error}


def difference(one: Losses, other: Losses) -> dict[str, float]:
    """one - other, paired token by token, as a whole with its standard error and by bucket."""
    gap = one.losses - other.losses
    told = named_mean(gap, one.documents, "all", "all_stderr")
    for name, inside in _buckets(one.counts):
        told |= named_mean(gap[inside], one.documents[inside], name, f"{name}_stderr")
    return told


def frequency_table(losses: Losses) -> list[dict[str, Any]]:
    """Buckets, their bounds and how many held-out targets fall into each. high None: no bound; low
    None: no trigram.

    Shares are of all held-out targets, so those times the differences add up to the difference over
    all.
    """
    told = []
    for name, inside in _buckets(losses.counts):
        low, high = _BOUNDS[name]
        told.append(
            {
                "bucket": name,
                "low": None if low < 0 else low,
                "high": high if 0 <= high < 2**62 else None,
                "tokens": int(inside.sum()),
                "share": float(inside.mean()),
            }
        )
    return told
