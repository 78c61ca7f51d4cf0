"""Engraphy: conditional memory for Transformers."""

__version__ = "0.1.0"
