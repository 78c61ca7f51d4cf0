"""An inspection made by hand, for the tests of its page: numbers that tell where they come from."""

from __future__ import annotations

from typing import Any

TEXTS = ["Diana", ",", " Prin", "cess", " <of>", " W\u00e4les", "\n"]
DEPTH = 4


def inspection(texts: list[str] | None = None, streams: int = 2) -> dict[str, Any]:
    """Memories in layers 1 and 2 of four, with as many residual streams."""
    texts = texts or TEXTS
    tokens = [_token(texts, t, streams) for t in range(len(texts))]
    return {
        "format": "engraphy-inspection-1",
        "model": "a & b",
        "memory": "mine",
        "text": "".join(texts),
        "corpus": "corpus.txt",
        "layers": [1, 2],
        "before_memory": [True, False, False, False],
        "tokens": tokens,
    }


def _token(texts: list[str], t: int, streams: int) -> dict[str, Any]:
    last = t + 1 == len(texts)
    following = "end" if last else texts[t + 1]
    candidates = [{"text": following, "probability": 0.5}, {"text": "other", "probability": 0.25}]
    return {
        "id": 1000 + t,
        "text": texts[t],
        "ngrams": [
            {"order": order, "text": "".join(texts[max(0, t - order + 1) : t + 1]), "count": 7 * t}
            for order in (2, 3)
        ],
        "memory": [_view(layer, t, streams) for layer in (1, 2)],
        "on": {"candidates": candidates, "loss": None if last else 1.0 + 0.25 * t},
        "off": {"candidates": candidates[::-1], "loss": None if last else 2.0 - 0.25 * t},
        "lens_on": [_cell(layer, t, "on") for layer in range(DEPTH)],
        "lens_off": [_cell(layer, t, "off") for layer in range(DEPTH)],
    }


def _cell(layer: int, t: int, kind: str) -> dict[str, Any]:
    kl = (DEPTH - 1 - layer) * (1.0 + 0.1 * t)
    return {"kl": kl if kind == "on" else 1.5 * kl, "top": f"{kind}{layer}.{t}"}


def _view(layer: int, t: int, streams: int) -> dict[str, Any]:
    rows = []
    for order in (2, 3):
        for head in range(2):
            few = [{"text": "an other", "count": 12}] if head else []
            row = 100 * layer + 10 * t + head
            rows.append(
                {
                    "order": order,
                    "head": head,
                    "row": row,
                    "others": 3 * head,
                    "reads": 20 * head,
                    "frequent": few,
                }
            )
    return {
        "layer": layer,
        "gates": [0.1 + 0.1 * t + 0.02 * stream for stream in range(streams)],
        "sizes": [0.05 * (t + 1)] * streams,
        "towards": ["up", "<b>"],
        "away": ["down"],
        "rows": rows,
    }
