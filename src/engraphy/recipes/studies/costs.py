"""What a comparison will cost on this machine, measured before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...addresses.ngrams import Ngrams
from ...addresses.vocab import VocabMap
from ...data.packing import Batches
from ...lm.loop import Run, TrainConfig
from .arm_recipe import ArmRecipe, build
from .backbones import Backbone

STEPS = 3
"""Timed steps of an arm. One more comes before them."""


@dataclass(frozen=True)
class Cost:
    """The cost of what is missing of a comparison.

    Attributes:
        runs: Runs. A search that goes on beyond its first rates adds more.
        tokens: Training tokens of all of them.
        hours: Core hours of training. Measuring held-out losses comes on top.
        speed: Tokens a second of one core, the mean over the arms.
    """

    runs: int
    tokens: int
    hours: float
    speed: float

    def __str__(self) -> str:
        if not self.runs:
            return "no run is missing"
        return (
            f"{self.runs} runs or more, {self.tokens / 1e6:,.1f}M tokens, "
            f"{self.hours:,.2f} core hours of training on this machine, "
            f"{60 * self.hours / self.runs:.1f} core minutes a run "
            f"({self.speed:,.0f} tokens a second and core, measured now)"
        )


def cost_of(
    arms: Mapping[str, ArmRecipe], missing: Mapping[str, int], backbone: Backbone, tokens: int
) -> Cost:
    """Times a few steps of each kind of arm.

    Args:
        arms: The arms, by name.
        missing: Runs that each arm lacks.
        backbone: What the arms change.
        tokens: Training tokens of a run.
    """
    speeds = _speeds({name: arms[name] for name in arms if missing[name]}, backbone)
    seconds = sum(missing[name] * tokens / speed for name, speed in speeds.items())
    runs = sum(missing.values())
    mean = statistics.harmonic_mean(speeds.values()) if speeds else 0.0
    return Cost(runs, runs * tokens, seconds / 3600, mean)


def _speeds(arms: Mapping[str, ArmRecipe], backbone: Backbone) -> dict[str, float]:
    """Tokens a second of each arm. Arms of one kind have the speed of the first of them."""
    by_kind: dict[tuple[str, str, bool], float] = {}
    speeds = {}
    for name, recipe in arms.items():
        kind = recipe.kind, recipe.optimizer, recipe.has_hot
        if kind not in by_kind:
            by_kind[kind] = speed_of(recipe, backbone)
        speeds[name] = by_kind[kind]
    return speeds


def speed_of(recipe: ArmRecipe, backbone: Backbone) -> float:
    """Tokens that an arm trains on in a second of one core's time, with random text."""
    vocab_size = backbone.moe.vocab_size
    tokens = (STEPS + 2) * backbone.batch * backbone.length
    ids = np.random.default_rng(0).integers(1, vocab_size, tokens).astype(np.int32)
    batches = Batches([ids], 0, batch=backbone.batch, tokens=backbone.length, seed=0)
    vocab = VocabMap.identity(vocab_size)
    model, _ = build(recipe, backbone, vocab, 0, 0, lambda slots: _any_ngrams(slots, vocab))
    run = Run(model, batches, TrainConfig(tokens, optimizer=recipe.optimizer, rows=recipe.rows))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run.step()
        begun = time.process_time()  # others on the machine do not matter
        for _ in range(STEPS):
            run.step()
        return STEPS * batches.tokens_per_step / (time.process_time() - begun)
    finally:
        torch.set_num_threads(threads)


def _any_ngrams(slots: Mapping[int, int], vocab: VocabMap) -> Ngrams:
    """The first so many n-grams of each order, in the order of their ids."""
    ids = {
        order: np.stack(np.unravel_index(np.arange(count), (len(vocab),) * order), axis=-1)
        for order, count in slots.items()
    }
    return Ngrams(ids, vocab.digest)
