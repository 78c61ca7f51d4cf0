"""Engraphy: conditional memory for Transformers.

Hashed n-gram tables (Engram, arXiv 2601.07372) that a model looks up instead of computing.
Addresses, rows and stores need numpy alone; the names that need torch, or transformers (attach,
detach, load), are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .addresses.addresser import Addresser
from .addresses.vocab import VocabMap
from .errors import EngraphyError
from .rows.format import RowFormat
from .spec.config import EngramConfig
from .spec.hash import HashSpec
from .spec.layer import LayerSpec
from .store import RowStore, open_store
from .system import moved
from .table.table import Table

if TYPE_CHECKING:
    from .fusion.layer import EngramLayer
    from .hf import attach, detach, load
    from .memory.memory import EngramMemory, Lookup, Trace
    from .memory.state import SequenceState

__version__ = "0.1.0"
__all__ = [
    "Addresser",
    "EngramConfig",
    "EngramLayer",
    "EngramMemory",
    "EngraphyError",
    "HashSpec",
    "LayerSpec",
    "Lookup",
    "RowFormat",
    "RowStore",
    "SequenceState",
    "Table",
    "Trace",
    "VocabMap",
    "attach",
    "detach",
    "load",
    "open_store",
]
_WITH_TORCH = {
    "EngramLayer": ".fusion",
    "EngramMemory": ".memory",
    "Lookup": ".memory",
    "Trace": ".memory",
    "SequenceState": ".memory",
    "attach": ".hf",
    "detach": ".hf",
    "load": ".hf",
}

moved.install()


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(_WITH_TORCH[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
