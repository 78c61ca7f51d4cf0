"""The paper's models by name (arXiv 2601.07372, table of models and appendix), and the same recipes
shrunk to a size that trains on a CPU.

Printed there: 30 blocks, hidden size 2560, 32 heads of latent attention, hyper-connections with
four streams, first block dense, then 2 shared experts and 6 routed ones a token, of 72 (MoE-27B) or
55 (Engram-27B and 40B); the memories; parameters in total and activated. Not printed, and inferred
here, is what INFERRED lists. These widths fit all printed totals at once, and the dense width is
what a token uses of the experts: (6 + 2) * 1536 = 12,288, so that all blocks activate as much.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..spec import published
from ..spec.config import EngramConfig
from .arms import demo_config, solve_rows
from .config import LMConfig, MLAConfig
from .sizes import ROUTED, TABLE, parts

INFERRED = {
    "a head": "inferred: as in DeepSeek-V2 and V3",
    "latents": "inferred: fit the totals",
    "dense width": "inferred: what a token uses of experts, (6 + 2) * 1536",
    "expert width": "inferred: fits the totals",
    "shared width": "inferred: two of the expert width",
}
"""Sizes that the paper does not print, and how they were chosen. The head is not tied to the token
embedding; that is inferred, too."""

RULE = {
    "hidden size": "/ N, to a multiple of 32",
    "blocks": "/ sqrt(N), at least 3; the first is dense",
    "heads": "hidden size / 32",
    "a head": "32 wide; the part that turns is half as wide",
    "latents": "hidden size / 5, to a multiple of 8",
    "streams": "stay",
    "dense width": "(top-k + 2) * expert width",
    "experts": "top-k stays the same share of them",
    "top-k": "/ N^(1/3), at least 2",
    "expert width": "0.6 * hidden size, to a multiple of 8",
    "shared width": "2 * expert width",
    "memory layers": "the same share of the depth, from the second block on",
    "memory heads": "halved until a row has 8 values",
    "row width": "all rows of a token together: hidden size / 2",
    "rows per head": "rho stays: table and idle experts share as published",
}
"""How `scaled` chooses sizes for a scale of N."""

_SHARED = 2


@dataclass(frozen=True)
class Backbone:
    """A model and its memory, by name.

    Attributes:
        name: How it is called; a shrunken one has the scale in it.
        model: Sizes of the model; None = only the memory is known.
        memory: Sizes of the memory; None = it has none.
        source: Where the sizes come from.
    """

    name: str
    model: LMConfig | None
    memory: EngramConfig | None
    source: str


def backbone(
    what: str | os.PathLike[str],
    scale: int = 1,
    *,
    vocab_size: int | None = None,
    hash_vocab: int | None = None,
) -> Backbone:
    """A published model or a shrunken one, the demo's model, or a plain model of a file.

    Args:
        what: One of NAMES, in any case; or the path of a JSON file with the fields of an LMConfig.
        scale: N of RULE; 1 = the sizes as published.
        vocab_size: Token ids of the model; None = as published.
        hash_vocab: Ids that the memory hashes; None = as published, or vocab_size if it is given.

    Returns:
        The backbone.

    Raises:
        ConfigError: The name is unknown, the file is no LMConfig, or it cannot be scaled.
    """
    makers = {name.lower(): make for name, make in _MAKERS.items()}
    make = makers.get(os.fspath(what).lower())
    found = make() if make is not None else _read(Path(what))
    if scale != 1:
        found = scaled(found, scale)
    return _with_vocabulary(found, vocab_size, hash_vocab)


def scaled(published_one: Backbone, scale: int) -> Backbone:
    """The same recipe in small, by RULE.

    For a comparison at equal parameters give its model to `three_arms`: rounding leaves the arms
    of this rule a few per cent apart.

    Args:
        published_one: One of the paper's models.
        scale: N, from 2 to 80; 1 = as published.

    Raises:
        ConfigError: It is not one of the paper's models, or the scale is out of range.
    """
    if scale == 1:
        return published_one
    if published_one.name not in _PAPER:
        raise ConfigError(
            f"scale: expected one of the paper's models ({', '.join(_PAPER)}), "
            f"found {published_one.name}"
        )
    if isinstance(scale, bool) or not isinstance(scale, int) or not 2 <= scale <= 80:
        raise ConfigError(f"scale: expected an integer from 1 to 80, found {scale!r}")
    large, memory = published_one.model, published_one.memory
    assert large is not None
    hidden = max(32, round(large.hidden_size / scale / 32) * 32)
    top_k = max(2, round(6 / scale ** (1 / 3)))
    small = _model(
        vocab_size=large.vocab_size,
        hidden=hidden,
        blocks=max(3, round(large.layers / scale**0.5)),
        heads=hidden // 32,
        mla=MLAConfig(_by_8(hidden / 5), 32, 16, 32, query_rank=_by_8(hidden / 5)),
        experts=round(large.experts * top_k / 6),
        top_k=top_k,
        expert_ffn=_by_8(0.6 * hidden),
    )
    if memory is not None:
        memory = _shrunk(memory, small, large.layers, _table_per_idle(published_one))
    name = f"{published_one.name} / {scale}"
    return Backbone(name, small, memory, f"{published_one.source}; shrunk by {scale}")


def notes(found: Backbone, scale: int) -> dict[str, str]:
    """Where each size of a backbone comes from, by its name; what is printed has no note.

    Args:
        found: The backbone.
        scale: Its scale.
    """
    if scale > 1:
        return RULE
    return INFERRED if found.name in _PAPER else {}


def _table_per_idle(found: Backbone) -> float:
    """Values of the table for each idle parameter of the routed experts."""
    counted = {part.name: part for part in parts(found.model, found.memory)}
    routed = counted[ROUTED]
    return counted[TABLE].total / (routed.total - routed.activated)


def _shrunk(
    memory: EngramConfig, small: LMConfig, blocks: int, table_per_idle: float
) -> EngramConfig:
    """The memory for a smaller model, by RULE. blocks: of the published model."""
    layers: list[int] = []
    for layer in memory.hash.layer_ids:
        layers.append(max(round(layer * small.layers / blocks), 1 + max(layers, default=0)))
    orders = len(memory.hash.orders)
    width = small.hidden_size // 2
    heads = memory.hash.heads
    while heads > 1 and width < 8 * orders * heads:
        heads //= 2
    dim = max(width // (orders * heads), 1)

    def of_rows(rows: int) -> EngramConfig:
        spec = dataclasses.replace(
            memory.hash, layer_ids=tuple(layers), heads=heads, rows_per_head=(rows,) * orders
        )
        layer = dataclasses.replace(
            memory.layer, hidden_size=small.hidden_size, width=spec.columns * dim
        )
        return EngramConfig(spec, layer, dim)

    routed = next(part for part in parts(small) if part.name == ROUTED)
    free = round((routed.total - routed.activated) * table_per_idle)
    return of_rows(solve_rows(of_rows, free))


def _by_8(width: float) -> int:
    """The nearest multiple of 8, at least 8."""
    return max(8, round(width / 8) * 8)


def _with_vocabulary(found: Backbone, vocab_size: int | None, hash_vocab: int | None) -> Backbone:
    model, memory = found.model, found.memory
    if vocab_size is not None and model is not None:
        model = dataclasses.replace(model, vocab_size=vocab_size)
    hashed = vocab_size if hash_vocab is None else hash_vocab
    if hashed is not None and memory is not None:
        spec = dataclasses.replace(memory.hash, vocab_size=hashed)
        memory = dataclasses.replace(memory, hash=spec)
    return dataclasses.replace(found, model=model, memory=memory)


def _model(
    *,
    vocab_size: int,
    hidden: int,
    blocks: int,
    heads: int,
    mla: MLAConfig,
    experts: int,
    top_k: int,
    expert_ffn: int,
) -> LMConfig:
    """A model of the paper's kind; experts 0 = the dense one, of equal width a token."""
    sparse = {}
    if experts:
        sparse = {
            "moe_layers": tuple(range(1, blocks)),
            "experts": experts,
            "top_k": top_k,
            "expert_ffn": expert_ffn,
            "shared_ffn": _SHARED * expert_ffn,
        }
    return LMConfig(
        vocab_size,
        hidden,
        blocks,
        heads,
        ffn=(top_k + _SHARED) * expert_ffn,
        max_tokens=4096,
        mla=mla,
        streams=4,
        **sparse,
    )


def _paper_model(name: str, experts: int, memory: EngramConfig | None = None) -> Backbone:
    model = _model(
        vocab_size=129_280,
        hidden=2560,
        blocks=30,
        heads=32,
        mla=MLAConfig(512, 128, 64, 128, query_rank=512),
        experts=experts,
        top_k=6,
        expert_ffn=1536,
    )
    return Backbone(name, model, memory, "arXiv 2601.07372")


def _demo() -> Backbone:
    return Backbone("demo", demo_config(), None, "the mixture of experts of engraphy demo")


def _v41() -> Backbone:
    source = "the DeepSeek-V4.1-Flash release: its memory alone"
    return Backbone("DeepSeek-V4.1", None, published.deepseek_v41(), source)


def _read(path: Path) -> Backbone:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: expected one of {', '.join(NAMES)}, or a JSON file with the fields of an "
            f"LMConfig, found {str(path)!r} ({error})"
        ) from None
    return Backbone(path.stem, LMConfig.from_json(fields), None, str(path))


_PAPER: dict[str, Callable[[], Backbone]] = {
    "Dense-4B": lambda: _paper_model("Dense-4B", 0),
    "MoE-27B": lambda: _paper_model("MoE-27B", 72),
    "Engram-27B": lambda: _paper_model("Engram-27B", 55, published.engram_27b()),
    "Engram-40B": lambda: _paper_model("Engram-40B", 55, published.engram_40b()),
}
_MAKERS = {**_PAPER, "DeepSeek-V4.1": _v41, "demo": _demo}
NAMES = tuple(_MAKERS)
"""Names that `backbone` knows."""
