"""A table on disk: its files, its identity, and what can be done with it as a whole."""

from ..system.moved import moved_names
from .table import Table

__all__ = ["Table"]

__getattr__ = moved_names(__name__, {"LOCK_NAME": "table.lock", "Verified": "table.sealing"})
