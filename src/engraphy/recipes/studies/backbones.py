"""Backbones of studies, by name: a mixture of experts, and the memory that replaces some of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ...lm import LMConfig, MemorySizes, demo_config


@dataclass(frozen=True)
class Backbone:
    """What the arms of a study start from.

    Attributes:
        name: Its name.
        moe: The mixture of experts.
        memory: Sizes of the memory of its memory arms.
        length: Tokens of a row in training.
        batch: Rows of a step.
    """

    name: str
    moe: LMConfig
    memory: MemorySizes
    length: int = 128
    batch: int = 16

    def rows(self) -> list[tuple[str, str]]:
        """All sizes, as rows of a table."""
        moe = self.moe
        memory = self.memory
        return [
            ("hidden size, layers, heads", f"{moe.hidden_size}, {moe.layers}, {moe.heads}"),
            ("vocabulary", f"{moe.vocab_size:,}"),
            ("dense feed-forward width", str(moe.ffn)),
            ("layers with experts", ", ".join(map(str, moe.moe_layers))),
            ("experts, of a token, width", f"{moe.experts}, {moe.top_k}, {moe.expert_ffn}"),
            ("shared expert's width", str(moe.shared_ffn)),
            ("memory at layers", ", ".join(map(str, memory.layers))),
            ("orders, heads, row width", f"{list(memory.orders)}, {memory.heads}, {memory.dim}"),
            ("tokens of a step", f"{self.batch} x {self.length}"),
        ]


def _plain(layers: int, experts: int, vocab_size: int = 4096) -> LMConfig:
    """A plain reference model of width 128, with experts in all layers but the first."""
    return LMConfig(
        vocab_size,
        hidden_size=128,
        layers=layers,
        heads=2,
        ffn=384,
        moe_layers=tuple(range(1, layers)),
        experts=experts,
        top_k=2,
        expert_ffn=128,
        shared_ffn=128,
    )


_SMALLEST = LMConfig(
    512,
    hidden_size=32,
    layers=2,
    heads=2,
    ffn=48,
    moe_layers=(0, 1),
    experts=12,
    top_k=2,
    expert_ffn=16,
    shared_ffn=64,
)
BACKBONES: Mapping[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        Backbone("smallest", _SMALLEST, MemorySizes(heads=2, dim=4), length=32, batch=4),
        Backbone("demo", demo_config(), MemorySizes()),
        Backbone("base", _plain(4, 16), MemorySizes()),
        Backbone("wide", _plain(4, 32), MemorySizes()),
        Backbone("deep", _plain(12, 8), MemorySizes(layers=(1, 5))),
    )
}
"""The plain reference models that studies use."""


def backbone(name: str) -> Backbone:
    """The backbone of a name. Raises ConfigError if there is none."""
    if name not in BACKBONES:
        raise ConfigError(f"backbone: expected one of {', '.join(BACKBONES)}, found {name!r}")
    return BACKBONES[name]
