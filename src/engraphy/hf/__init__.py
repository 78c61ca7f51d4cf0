"""Memories for transformers models: attach, detach and load; released tables served inside their models.

Needs the `hf` extra (transformers).
"""

from __future__ import annotations

from .attach import Cost, attach, cost, detach, load

__all__ = ["Cost", "attach", "cost", "detach", "load"]
