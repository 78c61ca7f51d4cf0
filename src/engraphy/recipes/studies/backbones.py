"""Backbones of studies, by name: a mixture of experts, and the memory that replaces some of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import ConfigError
from ...lm import LMConfig, MemorySizes, configs, demo_config
from ...lm.tables import model_sizes

_VOCABULARY = 4096


@dataclass(frozen=True)
class Backbone:
    """What the arms of a study start from.

    Attributes:
        name: Its name.
        moe: The mixture of experts.
        memory: Sizes of the memory of its memory arms.
        length: Tokens of a row in training.
        batch: Rows of a step.
        rho: Share of the experts that a memory leaves, unless an arm says otherwise.
    """

    name: str
    moe: LMConfig
    memory: MemorySizes
    length: int = 128
    batch: int = 16
    rho: float = 0.75

    def rows(self) -> list[tuple[str, str]]:
        """All sizes, as rows of a table."""
        memory = self.memory
        return [
            *model_sizes(configs.Backbone(self.name, self.moe, None, "")).items(),
            ("memory layers", ", ".join(map(str, memory.layers))),
            ("n-gram orders", ", ".join(map(str, memory.orders))),
            ("memory heads", f"{memory.heads} an order"),
            ("row width", str(memory.dim)),
            ("tokens of a step", f"{self.batch} x {self.length}"),
        ]


def _plain(layers: int, experts: int) -> LMConfig:
    """A plain reference model of width 128, with experts in all layers but the first."""
    return LMConfig(
        _VOCABULARY,
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
    """The backbone of a name: one of BACKBONES, or "Engram-27B/N", the paper's recipe in small.

    Raises ConfigError if there is none.
    """
    published, slash, scale = name.partition("/")
    if slash and scale.isdecimal():
        return _paper(name, published, int(scale))
    if name not in BACKBONES:
        raise ConfigError(
            f"backbone: expected one of {', '.join(BACKBONES)}, or Engram-27B/N for a scale N of "
            f"2 to 80, found {name!r}"
        )
    return BACKBONES[name]


def _paper(name: str, published: str, scale: int) -> Backbone:
    """The mixture of experts of the paper in small, and the sizes of a published memory."""
    memory = configs.backbone(published, scale, vocab_size=_VOCABULARY).memory
    moe = configs.backbone("MoE-27B", scale, vocab_size=_VOCABULARY).model
    if memory is None or moe is None:
        raise ConfigError(f"backbone: expected a model with a memory, found {published}")
    spec = memory.hash
    sizes = MemorySizes(spec.layer_ids, spec.orders, spec.heads, memory.dim, memory.layer.kernel)
    return Backbone(name, moe, sizes)
