"""What is measured on trained arms: losses with their standard errors, by n-gram frequency; gates; speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..lm import BANDS, LM, Batches, NgramCounts, loss_by_band
from ..lm.loop import autocast
from ..memory import Trace
from .corpus import Corpus

BUCKETS = dict(zip(BANDS, ("unseen", "rare", "frequent", "very frequent"), strict=True))


class Losses:
    """Nats of every held-out target: f64 [M], and the document [M] and training count of its trigram [M]."""

    def __init__(self, model: LM, batches: Batches, counts: NgramCounts, dtype: str):
        losses, documents, found = [], [], []
        seen = 0
        with torch.no_grad():
            for ids_BT, targets_BT, starts_BT in batches:
                with autocast(dtype):
                    loss_BT = model.eval().token_losses(ids_BT, targets_BT, starts_BT)
                kept = (targets_BT >= 0).numpy()
                document = seen + (ids_BT.numpy() == batches.end_id).ravel().cumsum().reshape(ids_BT.shape)
                seen = int(document.max())
                losses.append(loss_BT.double().numpy()[kept])
                documents.append(document[kept])
                found.append(counts.count(ids_BT, targets_BT, starts_BT)[kept])
        self.losses, self.documents, self.counts = (np.concatenate(part) for part in (losses, documents, found))

    def by_bucket(self) -> dict[str, float]:
        """Mean nats a token by how often the trigram that ends at the target was trained."""
        bands = loss_by_band(self.losses, self.counts)
        return {BUCKETS[band]: told.loss for band, told in bands.items() if told.targets}


def mean_with_error(values: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Mean over tokens and its standard error, documents taken as the independent units (ratio estimator)."""
    sizes = np.bincount(documents)
    sums = np.bincount(documents, weights=values)[sizes > 0]
    sizes = sizes[sizes > 0]
    mean, count = float(values.mean()), len(sizes)
    spread = float(((sums - mean * sizes) ** 2).sum()) * count / max(count - 1, 1)
    return mean, math.sqrt(spread) / len(values)


def difference(one: Losses, other: Losses) -> dict[str, float]:
    """one - other, paired token by token, as a whole with its standard error and by bucket."""
    gap = one.losses - other.losses
    mean, error = mean_with_error(gap, one.documents)
    told = {"all": mean, "all_stderr": error}
    for band, (low, high) in BANDS.items():
        inside = (one.counts >= low) & (one.counts <= high)
        if inside.any():
            name = BUCKETS[band]
            told[name], told[f"{name}_stderr"] = mean_with_error(gap[inside], one.documents[inside])
    return told


def frequency_table(losses: Losses) -> list[dict[str, Any]]:
    """Buckets, their bounds and how many held-out targets fall into each."""
    bands = loss_by_band(losses.losses, losses.counts)
    total = sum(told.targets for told in bands.values())
    return [{"bucket": BUCKETS[band], "low": low, "high": high if high < 2**62 else None, "tokens": bands[band].targets,
             "share": bands[band].targets / total} for band, (low, high) in BANDS.items() if bands[band].targets]


def gates_of_sentences(model: LM, corpus: Corpus, sentences: Sequence[str]) -> list[dict[str, Any]]:
    """The gate of the first memory layer at each token of each sentence, which stands at the start of a document."""
    told = []
    for text in sentences:
        ids = corpus.tokenizer.encode(text, add_special_tokens=False).ids
        gates = _gates(model, torch.tensor([[corpus.end_id, *ids]]), None)[0, 1:]
        pieces = [corpus.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        told.append({"text": text, "tokens": pieces, "gates": [round(float(gate), 4) for gate in gates]})
    return told


def gates_by_bucket(model: LM, batches: Batches, counts: NgramCounts) -> list[dict[str, Any]]:
    """Mean gate by how often the trigram that ends at the token itself was trained."""
    gates, found = [], []
    for ids_BT, targets_BT, starts_BT in batches:
        count_BT = counts.count(ids_BT, targets_BT, starts_BT)  # of the trigram that ends at the next token
        gates.append(_gates(model, ids_BT, starts_BT)[:, 1:].ravel())
        found.append(np.where(starts_BT.numpy()[:, 1:], -1, count_BT[:, :-1]).ravel())
    bands = loss_by_band(np.concatenate(gates), np.concatenate(found))
    return [{"bucket": BUCKETS[band], "mean": told.loss, "tokens": told.targets} for band, told in bands.items()
            if told.targets]


def tokens_per_second(models: Mapping[str, LM], batches: Batches, dtype: str, rounds: int = 5) -> dict[str, float]:
    """Forward and backward of one batch, arms alternating, medians: for ratios between the arms on a quiet machine."""
    ids_BT, targets_BT, starts_BT = batches[0]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model.train()
            with autocast(dtype):
                model.loss(ids_BT, targets_BT, starts_BT).backward()
            if turn:
                times[name].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=False)
            if model.memory is not None:
                model.memory.drain_row_grads()
            model.eval()
    return {name: ids_BT.numel() / statistics.median(values) for name, values in times.items()}


def _gates(model: LM, ids_BT: torch.Tensor, starts_BT: torch.Tensor | None) -> np.ndarray:
    assert model.memory is not None
    trace = Trace()
    with torch.no_grad():
        model.eval()(ids_BT, starts_BT, trace=trace)
    return trace.gates[model.memory.layers[0]][:, :, 0].numpy()
