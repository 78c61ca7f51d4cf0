"""Where the gate of a memory opens: token by token in sentences, and by n-gram frequency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.corpus import Corpus
from ..data.packing import Batches
from ..eval.bands import NgramCounts, loss_by_band
from ..eval.losses import BUCKETS
from ..lm.model import LM
from ..memory.lookup import Trace


def gates_of_sentences(model: LM, corpus: Corpus, sentences: Sequence[str]) -> list[dict[str, Any]]:
    """Gates of the first memory layer, token by token.

    Args:
        model: A model with a memory.
        corpus: The corpus that the model was trained on.
        sentences: Each is taken as the start of a document.

    Returns:
        For each sentence: text, tokens (as text), gates (0 to 1).
    """
    tokenizer = corpus.tokenizer
    results = []
    for text in sentences:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        gates_T = _gates(model, torch.tensor([[corpus.end_id, *ids]]), None)[0, 1:]
        tokens = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
        gates = [round(float(gate), 4) for gate in gates_T]
        results.append({"text": text, "tokens": tokens, "gates": gates})
    return results


def gates_by_bucket(model: LM, batches: Batches, counts: NgramCounts) -> list[dict[str, Any]]:
    """Mean gates of the first memory layer, by n-gram frequency.

    The bucket of a token says how often the training text has the trigram that ends at this token.

    Args:
        model: A model with a memory.
        batches: Held-out text.
        counts: Trigram counts of the training text.

    Returns:
        For each bucket that has tokens: bucket, mean, tokens.
    """
    gates = []
    trained = []
    for ids_BT, targets_BT, starts_BT in batches:
        # Position t counts the trigram that ends at token t + 1. Shift it to that token.
        next_BT = counts.count(ids_BT, targets_BT, starts_BT)
        trained.append(np.where(starts_BT.numpy()[:, 1:], -1, next_BT[:, :-1]).ravel())
        gates.append(_gates(model, ids_BT, starts_BT)[:, 1:].ravel())
    bands = loss_by_band(np.concatenate(gates), np.concatenate(trained))
    return [
        {"bucket": BUCKETS[name], "mean": band.loss, "tokens": band.targets}
        for name, band in bands.items()
        if band.targets
    ]


def _gates(model: LM, ids_BT: torch.Tensor, starts_BT: torch.Tensor | None) -> np.ndarray:
    """Gates of the first memory layer, f32 [B, T]."""
    assert model.memory is not None
    trace = Trace()
    with torch.no_grad():
        model.eval()(ids_BT, starts_BT, trace=trace)
    return trace.gates[model.memory.layers[0]][:, :, 0].numpy()
