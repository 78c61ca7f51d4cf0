"""HotSpec: which hot index a memory's addresses depend on, as a frozen value."""

# pyright: reportUnnecessaryIsInstance=false
# Callers need not be typed, so arguments are checked at run time too.

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError
from ..system.checks import as_int


@dataclass(frozen=True)
class HotSpec:
    """The identity of a hot index (`addresses.HotIndex`) and its size.

    A hot n-gram has a slot: as many rows as an order has heads, in each layer, behind the rows that
    the hash reaches ("A Collision-Free Hot-Tier Extension for Engram-Style Conditional Memory",
    arXiv 2601.16531).

    Attributes:
        digest: The index's digest, 64 hex digits.
        slots: Hot n-grams of all orders.

    Raises:
        ConfigError: A field is invalid; its name is in the message.
    """

    digest: str
    slots: int

    def __post_init__(self) -> None:
        if not isinstance(self.digest, str) or not re.fullmatch("[0-9a-f]{64}", self.digest):
            raise ConfigError(f"hot.digest: expected 64 hex digits, found {self.digest!r}")
        object.__setattr__(self, "slots", as_int("hot.slots", self.slots, 1, 2**31 - 1))
