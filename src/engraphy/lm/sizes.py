"""Parameters of a model and its memory, part by part, counted on modules without storage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..fusion.layer import EngramLayer
from ..spec.config import EngramConfig
from .config import LMConfig
from .model import LM

EMBEDDING = "token embedding"
HEAD = "head"
ROUTED = "routed experts"
TABLE = "memory, table"
_MEMORY = "memory, dense part"
_ORDER = (
    EMBEDDING,
    "attention",
    "dense feed-forward",
    ROUTED,
    "shared experts",
    "router",
    "hyper-connections",
    "norms",
    _MEMORY,
    TABLE,
    HEAD,
)


class Part(NamedTuple):
    """Parameters of one part.

    Attributes:
        name: Its name.
        total: All of them.
        activated: What one token uses: top_k of the routed experts, the C*d values that each memory
            layer reads from the table, and all of every other part. The token embedding counts only
            if it is the head, too, because a token copies one row of it.
    """

    name: str
    total: int
    activated: int


def on_meta(model: LMConfig | None, memory: EngramConfig | None) -> tuple[LM | None, nn.ModuleDict]:
    """The modules of a model and of its memory's layers on the meta device: they have shapes and
    no storage, whatever their size.

    Args:
        model: Sizes of the model; None = there is none.
        memory: Sizes of its memory; None = it has none.

    Returns:
        The model, and the fusion layers by the number of their block.
    """
    layers = () if memory is None else memory.hash.layer_ids
    with torch.device("meta"):
        built = None if model is None else LM(model)
        blocks = {} if memory is None else {str(k): EngramLayer(memory.layer) for k in layers}
    return built, nn.ModuleDict(blocks)


def parts(model: LMConfig | None, memory: EngramConfig | None = None) -> list[Part]:
    """Parameters by part, without the parts that have none.

    Args:
        model: Sizes of the model; None = there is none.
        memory: Sizes of its memory; None = it has none.
    """
    built, blocks = on_meta(model, memory)
    totals: dict[str, int] = dict.fromkeys(_ORDER, 0)
    if built is not None:
        for name, parameter in built.named_parameters():
            totals[_part_of(name)] += parameter.numel()
    totals[_MEMORY] = sum(parameter.numel() for parameter in blocks.parameters())
    activated = dict(totals)
    if model is not None:
        activated[ROUTED] = totals[ROUTED] * model.top_k // max(model.experts, 1)
        activated[EMBEDDING] = totals[EMBEDDING] if model.tie_embeddings else 0
    if memory is not None:
        totals[TABLE] = memory.table_parameters()
        activated[TABLE] = memory.layer.width * len(memory.hash.layer_ids)
    return [Part(name, totals[name], activated[name]) for name in _ORDER if totals[name]]


def total(counted: list[Part], name: str) -> int:
    """Parameters of the part of this name; 0 if there is none."""
    return sum(part.total for part in counted if part.name == name)


def expert_share(counted: list[Part]) -> float:
    """rho: the share of the parameters that a token leaves out, embeddings aside, that routed
    experts have (paper, section 3). The table has the rest. 1 if there are none."""
    sparse = {
        part.name: part.total - part.activated for part in counted if part.name in (ROUTED, TABLE)
    }
    everything = sum(sparse.values())
    return sparse.get(ROUTED, 0) / everything if everything else 1.0


def _part_of(name: str) -> str:
    """The part that a parameter of an LM belongs to, by its name there."""
    words = name.split(".")
    if words[0] != "blocks":
        return {"embed": EMBEDDING, "head": HEAD, "norm": "norms"}[words[0]]
    field = words[2]
    if field in ("attention_link", "ffn_link"):
        return "hyper-connections"
    if field in ("attention_norm", "ffn_norm"):
        return "norms"
    if field == "attention":
        return "attention"
    if words[3:] in (["gate_up"], ["down"]):  # one tensor of all experts
        return ROUTED
    return {"shared": "shared experts", "router": "router"}.get(words[3], "dense feed-forward")
