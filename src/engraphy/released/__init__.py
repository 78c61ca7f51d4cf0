"""The tables of published models, in the files they were released in."""

from .checkpoint import Checkpoint
from .rows import open_rows

__all__ = ["Checkpoint", "open_rows"]
