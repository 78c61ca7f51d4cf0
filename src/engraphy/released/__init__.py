"""The tables of published models, in the files they were released in."""

from .checkpoint import Checkpoint

__all__ = ["Checkpoint"]
