"""The controls: which part of a memory does the work? Each lacks one thing.

Those whose rows learn nothing of the text, or that have none, search their own learning rates; the
others run at the memory's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .arm_recipe import ArmRecipe
from .backbones import Backbone
from .comparison import Comparison


def _arms(backbone: Backbone) -> Mapping[str, ArmRecipe]:
    memory = ArmRecipe("MoE + memory")
    sizes = backbone.memory
    columns = len(sizes.orders) * sizes.heads
    unigram = replace(sizes, orders=(1,), heads=columns)
    return {
        "moe": ArmRecipe("MoE", "moe"),
        "memory": memory,
        "one-row": memory.changed("one row of each head", control="one-row"),
        "frozen": memory.changed("frozen random table", control="frozen"),
        "shuffled": memory.changed("shuffled addresses", control="shuffled"),
        "unigram": memory.changed("unigram table, conv of order 1", memory=unigram),
        "constant-gate": memory.changed("constant gate", control="constant-gate"),
        "no-conv": memory.changed("no conv", memory=replace(sizes, kernel=0)),
        "adapter": memory.changed("dense adapter", kind="adapter"),
    }


_CONTROLS = ("one-row", "frozen", "shuffled", "unigram", "constant-gate", "no-conv", "adapter")
_LIKE_MEMORY = ("shuffled", "unigram", "constant-gate", "no-conv")


def _like(backbone: Backbone) -> Mapping[str, str]:
    return dict.fromkeys(_LIKE_MEMORY, "memory")


CONTROLS = Comparison(
    "controls",
    _arms,
    (
        ("memory", "moe"),
        *((name, "moe") for name in _CONTROLS),
        *(("memory", name) for name in _CONTROLS),
    ),
    like=_like,
).study
"""The controls of a memory."""
