"""Memories for transformers models: attach, detach and load; released tables served inside their models.

Needs the `hf` extra (transformers).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .attach import Cost, attach, cost, detach, load
from .card import card, write_card
from .composite import EngraphyConfig, push_to_hub, save_pretrained

if TYPE_CHECKING:
    from .trainer import MemoryAdamW, MemoryCallback, trainer_kwargs

__all__ = ["Cost", "EngraphyConfig", "MemoryAdamW", "MemoryCallback", "attach", "card", "cost", "detach", "load",
           "push_to_hub", "save_pretrained", "trainer_kwargs", "write_card"]
_TRAINER = ("MemoryAdamW", "MemoryCallback", "trainer_kwargs")  # transformers' trainer imports peft and accelerate


def __getattr__(name: str) -> Any:
    if name in _TRAINER:
        return getattr(importlib.import_module(".trainer", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
