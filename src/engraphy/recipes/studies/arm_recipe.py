"""One arm of a study: how it differs from the backbone, and the model that this gives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ...addresses.vocab import VocabMap
from ...errors import ConfigError
from ...lm import LM, Arm, MemorySizes, Parameters, count_parameters, dense_arm, memory_arm, moe_arm
from ...lm.controls import add_adapters, add_convs, hashed, make_memory
from .backbones import Backbone

ROW_STD = 0.02
"""Standard deviation of a table's first values."""


@dataclass(frozen=True)
class ArmRecipe:
    """How an arm differs from its backbone.

    Attributes:
        label: Its name in tables.
        kind: "dense", "moe", "memory", or one of two mixtures of experts that have something in the
            place of the memory: dense adapters ("adapter"), or its convs alone ("conv").
        rho: Share of the routed experts that a memory or an adapter leaves.
        memory: Sizes of the memory; None = the backbone's.
        control: What the memory lacks, one of `lm.controls.CONTROLS`; "" = nothing.
        optimizer: Of the dense parameters: "adamw" or "muon".
        rows: Optimiser of the rows: "adam", "adagrad" or "nesterov".
        row_rate_scale: Rows learn so many times as fast as the dense parameters.
        text: Share of the training tokens that the arm sees.
        needles: Share of the training rows that are needle texts.
        until: Name of another arm: training stops once the held-out loss is as low as its last one.

    Raises:
        ConfigError: The kind is unknown.
    """

    label: str
    kind: str = "memory"
    rho: float = 0.75
    memory: MemorySizes | None = None
    control: str = ""
    optimizer: str = "adamw"
    rows: str = "adam"
    row_rate_scale: float = 5.0
    text: float = 1.0
    needles: float = 0.0
    until: str = ""

    def __post_init__(self) -> None:
        kinds = ("dense", "moe", "memory", "adapter", "conv")
        if self.kind not in kinds:
            raise ConfigError(f"kind: expected one of {', '.join(kinds)}, found {self.kind!r}")

    def changed(self, label: str, **fields: object) -> ArmRecipe:
        """The same arm under another label, with other fields."""
        return dataclasses.replace(self, label=label, **fields)  # type: ignore[arg-type]

    def arm(self, backbone: Backbone, vocab: VocabMap, pad_id: int) -> Arm:
        """Sizes of the arm. vocab: of the tokenizer.

        Raises ConfigError if the counts cannot be made equal.
        """
        moe = backbone.moe
        if moe.vocab_size != vocab.raw_size:
            moe = dataclasses.replace(moe, vocab_size=vocab.raw_size)
        if self.kind == "dense":
            return dense_arm(moe)
        if self.kind in ("moe", "conv"):
            return moe_arm(moe)
        sizes = self.memory or backbone.memory
        return memory_arm(moe, self.rho, sizes, len(hashed(vocab, self.control)), pad_id)


def build(
    recipe: ArmRecipe, backbone: Backbone, vocab: VocabMap, pad_id: int, seed: int
) -> tuple[LM, Parameters]:
    """A fresh model of an arm, and its parameter counts as built.

    Weights depend on the recipe and the seed alone.

    Args:
        recipe: The arm.
        backbone: What it starts from. The vocabulary is that of `vocab`.
        vocab: Of the tokenizer.
        pad_id: Raw id of the filler.
        seed: Seed of weights and rows.

    Raises:
        ConfigError: The counts cannot be made equal.
    """
    arm = recipe.arm(backbone, vocab, pad_id)
    torch.manual_seed(seed)
    memory = None
    if recipe.kind == "memory" and arm.memory is not None:
        memory = make_memory(
            arm.memory, hashed(vocab, recipe.control), ROW_STD, seed, recipe.control
        )
    model = LM(arm.model, memory)
    if recipe.kind == "adapter" and arm.memory is not None:
        add_adapters(model, arm.memory)
    if recipe.kind == "conv":
        sizes = backbone.memory
        add_convs(model, sizes.layers, sizes.kernel, max(sizes.orders))
    return model, count_parameters(model)
