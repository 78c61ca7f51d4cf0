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
    """The gate of the first memory layer at each token of each sentence, which stands at the start
    of a document."""
    told = []
    for text in sentences:
        ids = corpus.tokenizer.encode(text, add_special_tokens=False).ids
        gates = _gates(model, torch.tensor([[corpus.end_id, *ids]]), None)[0, 1:]
        pieces = [corpus.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        told.append(
            {"text": text, "tokens": pieces, "gates": [round(float(gate), 4) for gate in gates]}
        )
    return told


def gates_by_bucket(model: LM, batches: Batches, counts: NgramCounts) -> list[dict[str, Any]]:
    """Mean gate by how often the trigram that ends at the token itself was trained."""
    gates, found = [], []
    for ids_BT, targets_BT, starts_BT in batches:
        count_BT = counts.count(
            ids_BT, targets_BT, starts_BT
        )  # of the trigram that ends at the next token
        gates.append(_gates(model, ids_BT, starts_BT)[:, 1:].ravel())
        found.append(np.where(starts_BT.numpy()[:, 1:], -1, count_BT[:, :-1]).ravel())
    bands = loss_by_band(np.concatenate(gates), np.concatenate(found))
    return [
        {"bucket": BUCKETS[band], "mean": told.loss, "tokens": told.targets}
        for band, told in bands.items()
        if told.targets
    ]


def _gates(model: LM, ids_BT: torch.Tensor, starts_BT: torch.Tensor | None) -> np.ndarray:
    assert model.memory is not None
    trace = Trace()
    with torch.no_grad():
        model.eval()(ids_BT, starts_BT, trace=trace)
    return trace.gates[model.memory.layers[0]][:, :, 0].numpy()
