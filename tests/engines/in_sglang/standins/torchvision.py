"""A stand-in: see standin.py."""

from standin import stand_in

__path__: list[str] = []
__version__ = "0"
stand_in(__name__)
