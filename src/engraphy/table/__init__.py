"""A table on disk: its files, its identity, and what can be done with it as a whole."""

from .table import Table

__all__ = ["Table"]
