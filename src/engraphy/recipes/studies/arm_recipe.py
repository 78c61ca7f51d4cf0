"""One arm of a study: how it differs from the backbone, and the model that this gives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...addresses.hot import HotIndex
from ...addresses.ngrams import Ngrams
from ...addresses.vocab import VocabMap
from ...errors import ConfigError
from ...lm import LM, Arm, MemorySizes, Parameters, count_parameters, dense_arm, memory_arm, moe_arm
from ...lm.controls import add_adapters, add_convs, hashed, make_memory
from .backbones import Backbone

ROW_STD = 0.02
"""Standard deviation of a table's first values."""
Frequent = Callable[[Mapping[int, int]], Ngrams]
"""Takes a number of n-grams for each order, returns the most frequent ones of the training text."""


@dataclass(frozen=True)
class ArmRecipe:
    """How an arm differs from its backbone.

    Attributes:
        label: Its name in tables.
        kind: "dense", "moe", "memory", or one of two mixtures of experts that have something in the
            place of the memory: dense adapters ("adapter"), or its convs alone ("conv").
        rho: Share of the routed experts that a memory or an adapter leaves; None = the backbone's.
        memory: Sizes of the memory; None = the backbone's.
        control: What the memory lacks, one of `lm.controls.CONTROLS`; "" = nothing.
        optimizer: Of the dense parameters: "adamw" or "muon".
        rows: Optimiser of the rows: "adam", "adagrad" or "nesterov".
        row_rate_scale: Rows learn so many times as fast as the dense parameters.
        text: Share of the training tokens that the arm sees.
        needles: Share of the training rows that are needle texts.
        until: Name of another arm: training stops once the held-out loss is as low as its last one.
        fingerprint_bits: Of the index of hot n-grams, if `memory.hot` gives them rows; None: it is
            exact.
        draw: 0 = weights and rows begin as the run's seed gives them, as in the other arms; 1, 2
            and so on = they begin with other values. The text stays the same.

    Raises:
        ConfigError: The kind is unknown.
    """

    label: str
    kind: str = "memory"
    rho: float | None = None
    memory: MemorySizes | None = None
    control: str = ""
    optimizer: str = "adamw"
    rows: str = "adam"
    row_rate_scale: float = 5.0
    text: float = 1.0
    needles: float = 0.0
    until: str = ""
    fingerprint_bits: int | None = None
    draw: int = 0

    def __post_init__(self) -> None:
        kinds = ("dense", "moe", "memory", "adapter", "conv")
        if self.kind not in kinds:
            raise ConfigError(f"kind: expected one of {', '.join(kinds)}, found {self.kind!r}")

    @property
    def has_hot(self) -> bool:
        """Whether n-grams have rows of their own."""
        return self.memory is not None and self.memory.hot > 0

    @property
    def has_share(self) -> bool:
        """Whether something takes the place of experts."""
        return self.kind in ("memory", "adapter")

    def changed(self, label: str, **fields: object) -> ArmRecipe:
        """The same arm under another label, with other fields."""
        return dataclasses.replace(self, label=label, **fields)  # type: ignore[arg-type]

    def key(self, backbone: Backbone) -> str:
        """A name that arms of a backbone share if they train the same model."""
        recipe = dataclasses.replace(
            self,
            label="",
            rho=self._share(backbone) if self.has_share else None,
            memory=(self.memory or backbone.memory) if self.has_share else None,
        )
        fields = dataclasses.asdict(recipe)
        if not self.draw:  # committed results have keys from before there were draws
            del fields["draw"]
        text = json.dumps(fields, sort_keys=True).encode()
        return f"{self.kind}-{hashlib.sha256(text).hexdigest()[:12]}"

    def _share(self, backbone: Backbone) -> float:
        """Share of the experts that are left."""
        return backbone.rho if self.rho is None else self.rho

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
        rho = self._share(backbone)
        return memory_arm(moe, rho, sizes, len(hashed(vocab, self.control)), pad_id)


def build(
    recipe: ArmRecipe,
    backbone: Backbone,
    vocab: VocabMap,
    pad_id: int,
    seed: int,
    frequent: Frequent | None = None,
) -> tuple[LM, Parameters]:
    """A fresh model of an arm, and its parameter counts as built.

    Weights depend on the recipe, the seed, and which n-grams are hot.

    Args:
        recipe: The arm.
        backbone: What it starts from. The vocabulary is that of `vocab`.
        vocab: Of the tokenizer.
        pad_id: Raw id of the filler.
        seed: Seed of weights and rows.
        frequent: The training text's n-grams, for an arm with hot ones.

    Raises:
        ConfigError: The counts cannot be made equal, or the text has too few n-grams.
    """
    arm = recipe.arm(backbone, vocab, pad_id)
    hot = _index(arm, recipe, frequent)
    if recipe.draw:
        seed = int(np.random.SeedSequence([seed, recipe.draw]).generate_state(1)[0])
    torch.manual_seed(seed)
    memory = None
    if recipe.kind == "memory" and arm.memory is not None:
        sizes = dataclasses.replace(arm.memory, hot=None)  # which names no index so far
        memory = make_memory(
            sizes, hashed(vocab, recipe.control), ROW_STD, seed, recipe.control, hot
        )
    model = LM(arm.model, memory)
    if recipe.kind == "adapter" and arm.memory is not None:
        add_adapters(model, arm.memory)
    if recipe.kind == "conv":
        sizes = backbone.memory
        add_convs(model, sizes.layers, sizes.kernel, max(sizes.orders))
    return model, count_parameters(model)


def _index(arm: Arm, recipe: ArmRecipe, frequent: Frequent | None) -> HotIndex | None:
    """The index of an arm's hot n-grams. Raises ConfigError if there are too few."""
    if not arm.hot:
        return None
    if frequent is None:
        raise ConfigError(f"{recipe.label}: expected the n-grams of a text, found none")
    ngrams = frequent(arm.hot)
    for order, slots in arm.hot.items():
        if len(ngrams.ids[order]) != slots:
            raise ConfigError(
                f"{recipe.label}: expected a text of {slots} or more n-grams of order {order}, "
                f"found {len(ngrams.ids[order])}"
            )
    return HotIndex.build(ngrams, recipe.fingerprint_bits)
