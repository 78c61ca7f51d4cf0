"""The baseline study: does a mixture of experts earn its place beside a dense model?

Without that no curve over the share of experts can turn up at its right end. Both optimisers of the
dense parameters are tried.
"""

from __future__ import annotations

from collections.abc import Mapping

from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import Comparison


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
).study
"""The baseline study."""
