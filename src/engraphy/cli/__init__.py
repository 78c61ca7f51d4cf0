"""The command line, one module a noun."""

from .app import app

__all__ = ["app"]
