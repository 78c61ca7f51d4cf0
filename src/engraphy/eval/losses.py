"""Held-out losses: the one loop that measures them, their standard errors, and their split by
n-gram frequency.

A model is measured through its token losses alone. So the reference model, a transformers model
and a test double go through the same loop, and this module imports none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..data.packing import Batch, Batches
from ..train.dtype import autocast
from .bands import BANDS, NgramCounts

BUCKETS = dict(zip(BANDS, ("unseen", "rare", "frequent", "very frequent"), strict=True))
"""Names of the frequency bands in results."""
START = "context start"
"""Bucket of the targets that end no trigram: the first of a document, or of a row of a batch."""
_BOUNDS = {**{BUCKETS[band]: bounds for band, bounds in BANDS.items()}, START: (-1, -1)}

TokenLosses = Callable[[Batch], Tensor]
"""Takes a batch, returns the nats of each target, float [B, T].

Its values at targets that are IGNORED are not used.
"""


@runtime_checkable
class LanguageModel(Protocol):
    """What `Losses` needs of a model: the reference model has it."""

    def eval(self) -> Any: ...

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor) -> Tensor: ...


class HeldoutPart(NamedTuple):
    """The targets of one batch.

    Attributes:
        losses_M: Nats, f64.
        documents_M: The document of each, int64, numbered over all batches.
        batch: What was measured.
        kept_BT: bool, the positions that have a target.
    """

    losses_M: Tensor
    documents_M: Tensor
    batch: Batch
    kept_BT: Tensor


def heldout_parts(
    token_losses: TokenLosses, batches: Batches, *, ends: bool = True
) -> Iterator[HeldoutPart]:
    """Measures all of `batches`, one after the other, without gradients.

    Args:
        token_losses: Token losses of the model; see TokenLosses.
        batches: held-out text, on the CPU.
        ends: False = leave out the targets that are the end token. They are marks of the packing,
            not text.

    Yields:
        The targets of each batch, on the CPU.
    """
    seen = 0
    for batch in batches:
        part = batch if ends else batch.without_target(batches.end_id)
        with torch.no_grad():
            losses_BT = token_losses(part)
        begins_BT = part.ids_BT == batches.end_id
        document_BT = seen + begins_BT.flatten().cumsum(0).view_as(part.ids_BT)
        seen = int(document_BT.max())
        kept_BT = part.targets_BT >= 0
        losses_M = losses_BT.cpu()[kept_BT].double()
        yield HeldoutPart(losses_M, document_BT[kept_BT], part, kept_BT)


def heldout_losses(
    token_losses: TokenLosses, batches: Batches, *, ends: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every target of `batches`, f64 [M], and its document, int64 [M].

    Args:
        token_losses: As in `heldout_parts`.
        batches: As in `heldout_parts`.
        ends: As in `heldout_parts`.
    """
    parts = list(heldout_parts(token_losses, batches, ends=ends))
    losses_M = torch.cat([part.losses_M for part in parts])
    documents_M = torch.cat([part.documents_M for part in parts])
    return losses_M.numpy(), documents_M.numpy()


def losses_of(model: LanguageModel, dtype: str = "float32") -> TokenLosses:
    """Returns the function that gives a model's token losses, in eval mode.

    Args:
        model: The model.
        dtype: "float32", or "bfloat16" (autocast).
    """
    return partial(_model_losses, model, dtype)


def _model_losses(model: LanguageModel, dtype: str, batch: Batch) -> Tensor:
    model.eval()
    with autocast(dtype):
        return model.token_losses(*batch)


class Losses:
    """Nats of every held-out target, with its document and the training count of its trigram.

    Args:
        model: the reference model, or a function that gives token losses.
        batches: held-out text.
        counts: n-gram counts of the training text.
        dtype: what the model computes in: "float32", or "bfloat16" (autocast). A function that
            gives token losses chooses its own.

    Attributes:
        losses: f64 [M].
        documents: int64 [M].
        counts: int64 [M]; -1 for a target that ends no trigram.
    """

    def __init__(
        self,
        model: LanguageModel | TokenLosses,
        batches: Batches,
        counts: NgramCounts,
        dtype: str = "float32",
    ):
        token_losses = losses_of(model, dtype) if isinstance(model, LanguageModel) else model
        parts = list(heldout_parts(token_losses, batches))
        trained = [counts.count(*part.batch)[part.kept_BT.numpy()] for part in parts]
        self.losses = torch.cat([part.losses_M for part in parts]).numpy()
        self.documents = torch.cat([part.documents_M for part in parts]).numpy()
        self.counts = np.concatenate(trained)

    def mean(self) -> dict[str, float]:
        """validation_loss, and validation_stderr if two or more documents give one."""
        return named_mean(self.losses, self.documents, "validation_loss", "validation_stderr")

    def by_bucket(self) -> dict[str, float]:
        """Mean nats a token, by how often the training text has the trigram that ends at the
        target. Every target has a bucket."""
        return {name: float(self.losses[inside].mean()) for name, inside in _buckets(self.counts)}


def mean_with_error(values: np.ndarray, documents: np.ndarray) -> tuple[float, float | None]:
    """Mean over tokens and its standard error, with documents as the independent units (ratio
    estimator).

    Args:
        values: f64 [M], one a token.
        documents: int64 [M], the document of each.

    Returns:
        The mean and its error. The error is None with fewer than two documents, because one
        document does not show how much documents differ.
    """
    sizes = np.bincount(documents)
    sums = np.bincount(documents, weights=values)[sizes > 0]
    sizes = sizes[sizes > 0]
    mean = float(values.mean())
    count = len(sizes)
    if count < 2:
        return mean, None
    spread = float(((sums - mean * sizes) ** 2).sum()) * count / (count - 1)
    return mean, math.sqrt(spread) / len(values)


def named_mean(
    values: np.ndarray, documents: np.ndarray, name: str, error_name: str
) -> dict[str, float]:
    """`mean_with_error` as a dict with these names. If the error is None, it is left out."""
    mean, error = mean_with_error(values, documents)
    return {name: mean} if error is None else {name: mean, error_name: error}


def difference(one: Losses, other: Losses) -> dict[str, float]:
    """one - other, paired token by token: over all ("all", "all_stderr") and by bucket."""
    gap = one.losses - other.losses
    means = named_mean(gap, one.documents, "all", "all_stderr")
    for name, inside in _buckets(one.counts):
        means |= named_mean(gap[inside], one.documents[inside], name, f"{name}_stderr")
    return means


def frequency_table(losses: Losses) -> list[dict[str, Any]]:
    """Buckets with their bounds, and how many held-out targets fall into each.

    Returns:
        For each bucket that has targets: bucket, low (None: no trigram), high (None: no bound),
        tokens, and share of all held-out targets. So shares times differences add up to the
        difference over all.
    """
    rows = []
    for name, inside in _buckets(losses.counts):
        low, high = _BOUNDS[name]
        rows.append(
            {
                "bucket": name,
                "low": None if low < 0 else low,
                "high": high if 0 <= high < 2**62 else None,
                "tokens": int(inside.sum()),
                "share": float(inside.mean()),
            }
        )
    return rows


def _buckets(counts: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Each bucket that has targets, and the mask of its targets: bool, shaped as counts."""
    for name, (low, high) in _BOUNDS.items():
        inside = (counts >= low) & (counts <= high)
        if inside.any():
            yield name, inside
