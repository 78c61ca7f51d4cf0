"""Memories for transformers models: attach, load, train, save and share them.

Needs the `hf` extra (transformers).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .attach import attach, detach, load
from .card import card, write_card
from .composite import EngraphyConfig, push_to_hub, save_pretrained
from .costs import Cost, cost

if TYPE_CHECKING:
    from .gates import GateCallback
    from .optimizer import MemoryAdamW
    from .trainer import MemoryCallback, trainer_kwargs, trainer_optimizers

__all__ = [
    "Cost",
    "EngraphyConfig",
    "GateCallback",
    "MemoryAdamW",
    "MemoryCallback",
    "attach",
    "card",
    "cost",
    "detach",
    "load",
    "push_to_hub",
    "save_pretrained",
    "trainer_kwargs",
    "trainer_optimizers",
    "write_card",
]
# Imported when they are first used: transformers' trainer imports peft and accelerate.
_TRAINER = {
    "GateCallback": ".gates",
    "MemoryAdamW": ".optimizer",
    "MemoryCallback": ".trainer",
    "trainer_kwargs": ".trainer",
    "trainer_optimizers": ".trainer",
}


def __getattr__(name: str) -> Any:
    if name in _TRAINER:
        return getattr(importlib.import_module(_TRAINER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
