"""What a memory does at each token of a text: gates, rows, pushes, LogitLens, predictions.

Numbers come from one forward with the memory and one without it (subject.py), and from the text
that the rows are compared with (collisions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..memory.lookup import Trace
from .collisions import Collisions, SharedRow, collisions, look_back
from .logitlens import LogitLens, logit_lens
from .subject import Head, Subject

FORMAT = "engraphy-inspection-1"
Texts = Callable[[Sequence[int]], str]
"""Token ids -> their text."""


@dataclass(frozen=True)
class Candidate:
    """A next token, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What follows a token, by the model.

    Attributes:
        candidates: The likeliest tokens, likeliest first.
        loss: Nats of the token that does follow; None at the last token.
    """

    candidates: tuple[Candidate, ...]
    loss: float | None


@dataclass(frozen=True)
class LensCell:
    """A layer at a token: KL(layer || final) in nats, and the token that it finds likeliest."""

    kl: float
    top: str


@dataclass(frozen=True)
class Ngram:
    """An n-gram that ends at a token.

    Attributes:
        order: Its number of tokens. Where look-back stops, fillers take the place of the first.
        text: Its text, without fillers.
        count: How often the text compared with has it; None without such a text.
    """

    order: int
    text: str
    count: int | None


@dataclass(frozen=True)
class Sharing:
    """An n-gram that shares a row, and how often the text compared with has it."""

    text: str
    count: int


@dataclass(frozen=True)
class Row:
    """A row that a token reads.

    Attributes:
        order: Order of the n-gram that it is read for.
        head: Number of the head, from 0.
        row: Row id within the layer.
        others: Number of other n-grams of the text that read it; None without a text.
        reads: How often these occur.
        frequent: The most frequent of them.
    """

    order: int
    head: int
    row: int
    others: int | None
    reads: int
    frequent: tuple[Sharing, ...]


@dataclass(frozen=True)
class LayerView:
    """What the memory of a layer does at a token.

    Attributes:
        layer: The layer, 0-based.
        gates: One value for each residual stream, 0 to 1.
        sizes: For each stream, length of the update over that of the hidden state.
        towards: The tokens whose logits the update, read through the head, raises most.
        away: The tokens whose logits it lowers most.
        rows: The rows that it reads, in the order of the columns.
    """

    layer: int
    gates: tuple[float, ...]
    sizes: tuple[float, ...]
    towards: tuple[str, ...]
    away: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class TokenView:
    """A token, and what happens at it.

    Attributes:
        id: Its id.
        text: What it adds to the text.
        ngrams: The n-grams that end here.
        memory: One view for each layer with a memory.
        on: The prediction with the memory.
        off: The prediction without it.
        lens_on: For each layer, LogitLens with the memory.
        lens_off: For each layer, LogitLens without it, beside the final layer without it.
    """

    id: int
    text: str
    ngrams: tuple[Ngram, ...]
    memory: tuple[LayerView, ...]
    on: Prediction
    off: Prediction
    lens_on: tuple[LensCell, ...]
    lens_off: tuple[LensCell, ...]


@dataclass(frozen=True)
class Inspection:
    """What a memory does in a text.

    Attributes:
        model: Name of the model.
        memory: Name of its memory; may be empty.
        text: The text.
        corpus: Name of the text that the rows are compared with, or None.
        layers: Layers with a memory, 0-based.
        before_memory: For each block of the model, whether it runs before the first memory.
        tokens: The tokens of the text.
    """

    model: str
    memory: str
    text: str
    corpus: str | None
    layers: tuple[int, ...]
    before_memory: tuple[bool, ...]
    tokens: tuple[TokenView, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values, in format "engraphy-inspection-1"."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class Source:
    """What is inspected, in words.

    Attributes:
        model: Name of the model.
        memory: Name of its memory; may be empty.
        text: The text.
        pieces: What each token adds to the text.
        corpus: Name of the text to compare rows with; None = there is none.
        documents: Token ids of its documents.
    """

    model: str
    memory: str
    text: str
    pieces: Sequence[str]
    corpus: str | None = None
    documents: Sequence[np.ndarray] = ()


def inspect(
    subject: Subject, ids: Sequence[int], source: Source, texts: Texts, most: int = 5
) -> Inspection:
    """Reads what the memory does at each token.

    Args:
        subject: The model.
        ids: Token ids of the text, one document.
        source: What they are.
        texts: Names the tokens and n-grams.
        most: How many tokens and sharers to name.

    Raises:
        InputError: There are no tokens.
    """
    if not ids:
        raise InputError(f"text: expected at least one token, found none in {source.text!r}")
    device = next(iter(subject.blocks[0].parameters())).device
    ids_BT = torch.tensor([list(ids)], dtype=torch.long, device=device)
    on_BTV, trace = subject.read(ids_BT)
    off_BTV, without = subject.read_without(ids_BT)
    head = subject.head(ids_BT)
    found = None
    if source.corpus is not None:
        found = collisions(subject.addresser, np.array(ids), source.documents, most=most)
    lens_on = logit_lens(_states(trace), head, subject.layers)
    lens_off = logit_lens(_states(without), head, subject.layers)
    views = _layer_views(subject, trace, head, found, texts, most)
    on = _predictions(on_BTV[0], ids, texts, most)
    off = _predictions(off_BTV[0], ids, texts, most)
    cells_on, cells_off = _cells(lens_on, texts), _cells(lens_off, texts)
    tokens = tuple(
        TokenView(
            token_id,
            source.pieces[t],
            _ngrams(subject, ids, t, found, texts),
            views[t],
            on[t],
            off[t],
            cells_on[t],
            cells_off[t],
        )
        for t, token_id in enumerate(ids)
    )
    marks = lens_on.before_memory
    return Inspection(
        source.model, source.memory, source.text, source.corpus, subject.layers, marks, tokens
    )


def _states(trace: Trace) -> list[Tensor]:
    return [trace.hidden[layer] for layer in sorted(trace.hidden)]


def _predictions(
    logits_TV: Tensor, ids: Sequence[int], texts: Texts, most: int
) -> list[Prediction]:
    log_TV = logits_TV.double().log_softmax(-1)
    best = log_TV.topk(min(most, log_TV.shape[1]))
    predictions = []
    for t in range(len(ids)):
        pairs = zip(best.indices[t].tolist(), best.values[t].exp().tolist(), strict=True)
        candidates = tuple(Candidate(texts([token]), share) for token, share in pairs)
        loss = None
        if t + 1 < len(ids):
            loss = -float(log_TV[t, ids[t + 1]])
        predictions.append(Prediction(candidates, loss))
    return predictions


def _cells(lens: LogitLens, texts: Texts) -> list[tuple[LensCell, ...]]:
    """By token, then by layer."""
    kl_TL = lens.kl_LBT[:, 0].T.tolist()
    top_TL = lens.top_LBT[:, 0].T.tolist()
    return [
        tuple(LensCell(kl, texts([top])) for kl, top in zip(kl_L, top_L, strict=True))
        for kl_L, top_L in zip(kl_TL, top_TL, strict=True)
    ]


def _ngrams(
    subject: Subject, ids: Sequence[int], t: int, found: Collisions | None, texts: Texts
) -> tuple[Ngram, ...]:
    ngrams = []
    for order in subject.addresser.spec.orders:
        begin = look_back(subject.addresser, ids, t, order)
        count = None if found is None else int(found.counts[order][t])
        ngrams.append(Ngram(order, texts(ids[begin : t + 1]), count))
    return tuple(ngrams)


def _layer_views(
    subject: Subject,
    trace: Trace,
    head: Head,
    found: Collisions | None,
    texts: Texts,
    most: int,
) -> list[tuple[LayerView, ...]]:
    """By token, one view a layer with a memory."""
    by_layer = []
    for layer in subject.layers:
        update_TSD = trace.updates[layer][0]
        input_TSD = trace.inputs[layer][0]
        size_TS = update_TSD.norm(dim=-1) / input_TSD.norm(dim=-1).clamp_min(1e-30)
        push_TV = pushes(trace.updates[layer], trace.hidden[layer], head)[0]
        towards = push_TV.topk(most).indices.tolist()
        away = (-push_TV).topk(most).indices.tolist()
        shared = None if found is None else found.shared[layer]
        views = []
        for t in range(len(update_TSD)):
            rows = trace.row_ids[layer][0, t]
            silent = not update_TSD[t].any()
            views.append(
                LayerView(
                    layer,
                    tuple(trace.gates[layer][0, t].tolist()),
                    tuple(size_TS[t].tolist()),
                    () if silent else tuple(texts([token]) for token in towards[t]),
                    () if silent else tuple(texts([token]) for token in away[t]),
                    _rows(subject, rows, None if shared is None else shared[t], texts),
                )
            )
        by_layer.append(views)
    return list(zip(*by_layer, strict=True))


def pushes(update_BTSD: Tensor, like: Tensor, head: Head) -> Tensor:
    """What an update says through the head by itself: its logits, without those of nothing.

    After an RMS norm they are the projections of the update on the LM head, up to one factor a
    token.

    Args:
        update_BTSD: What the memory adds.
        like: Hidden states as the head takes them: of this shape, dtype and device.
        head: Hidden states -> logits.

    Returns:
        f64 [B, T, V].
    """
    update = update_BTSD.reshape(like.shape).to(like)
    return head(update).double() - head(torch.zeros_like(like)).double()


def _rows(
    subject: Subject, rows_C: np.ndarray, shared: Sequence[SharedRow] | None, texts: Texts
) -> tuple[Row, ...]:
    spec = subject.addresser.spec
    rows = []
    for column, row in enumerate(rows_C.tolist()):
        number, head = divmod(column, spec.heads)
        if shared is None:
            rows.append(Row(spec.orders[number], head, row, None, 0, ()))
            continue
        one = shared[column]
        frequent = tuple(Sharing(texts(sharer.ids), sharer.count) for sharer in one.frequent)
        rows.append(Row(spec.orders[number], head, row, one.others, one.reads, frequent))
    return tuple(rows)
