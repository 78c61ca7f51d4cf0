"""From rows and a hidden state to a hidden state: a small dense layer.

It knows no store and no tokens.
"""

from .layer import EngramLayer

__all__ = ["EngramLayer"]
