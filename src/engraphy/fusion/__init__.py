"""From rows and a hidden state to a hidden state: a small dense layer, with no store and no tokens."""

from .layer import EngramLayer

__all__ = ["EngramLayer"]
