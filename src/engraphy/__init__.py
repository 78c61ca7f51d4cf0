"""Engraphy: conditional memory for Transformers.

Hashed n-gram tables (Engram, arXiv 2601.07372) that a model looks up instead of computing.
`dir(engraphy)` names everything public. Addresses, rows, tables and stores need numpy alone; the
names that need torch, or transformers (attach, detach, load), are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._native import set_threads
from .addresses.addresser import Addresser
from .addresses.vocab import VocabMap
from .errors import EngraphyError
from .released.checkpoint import Checkpoint
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
    from .memory.lookup import Lookup, Trace
    from .memory.memory import EngramMemory
    from .memory.prefetch import Prefetcher
    from .memory.state import SequenceState
    from .released.convert import convert
    from .table.quantize import quantize

__version__ = "0.1.0"
__all__ = [
    "Addresser",
    "Checkpoint",
    "EngramConfig",
    "EngramLayer",
    "EngramMemory",
    "EngraphyError",
    "HashSpec",
    "LayerSpec",
    "Lookup",
    "Prefetcher",
    "RowFormat",
    "RowStore",
    "SequenceState",
    "Table",
    "Trace",
    "VocabMap",
    "attach",
    "convert",
    "detach",
    "load",
    "open_store",
    "quantize",
    "set_threads",
]
_AT_FIRST_USE = {
    "EngramLayer": ".fusion",
    "EngramMemory": ".memory",
    "Lookup": ".memory",
    "Prefetcher": ".memory",
    "SequenceState": ".memory",
    "Trace": ".memory",
    "attach": ".hf",
    "convert": ".released.convert",
    "detach": ".hf",
    "load": ".hf",
    "quantize": ".table.quantize",
}

moved.install()


def __getattr__(name: str) -> Any:
    if name in _AT_FIRST_USE:
        return getattr(importlib.import_module(_AT_FIRST_USE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
