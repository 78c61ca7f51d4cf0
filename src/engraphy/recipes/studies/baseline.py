"""The baseline study: does a mixture of experts earn its place beside a dense model?

Without that no curve over the share of experts can turn up at its right end. Both optimisers of the
dense parameters search their rates; seeds say how sure a difference is under AdamW, which the other
studies use.
"""

from __future__ import annotations

from collections.abc import Mapping

from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import Comparison, ComparisonConfig
from .queue import ResultsByJob


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    plain = {
        "dense": ArmRecipe("Dense", "dense"),
        "moe": ArmRecipe("MoE", "moe"),
        "memory": ArmRecipe("MoE + memory"),
    }
    muon = {
        f"{name}-muon": arm.changed(f"{arm.label}, Muon", optimizer="muon")
        for name, arm in plain.items()
    }
    return plain | muon


def _asked(config: ComparisonConfig, results: ResultsByJob) -> Mapping[str, int]:
    """All seeds under AdamW, one under Muon."""
    arms = _arms(config.base)
    return {
        name: len(config.seeds) if arm.optimizer == "adamw" else 1 for name, arm in arms.items()
    }


BASELINE = Comparison(
    "baseline",
    _arms,
    (
        ("moe", "dense"),
        ("memory", "moe"),
        ("moe-muon", "dense-muon"),
        ("memory-muon", "moe-muon"),
        ("moe-muon", "moe"),
    ),
    asked=_asked,
).study
"""The baseline study."""
