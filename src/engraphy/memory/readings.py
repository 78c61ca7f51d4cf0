"""The reads under way for the last tokens of a SequenceState, which `crop` cancels."""

from __future__ import annotations

import weakref
from typing import NamedTuple, Protocol


class Cancellable(Protocol):
    """A read that can be cancelled, such as a prefetcher's ticket."""

    def cancel(self) -> None: ...


class Readings:
    """Reads by their first token. Keeps none of them alive."""

    def __init__(self) -> None:
        self._readings: list[_Reading] = []

    def add(self, reading: Cancellable, first: int) -> None:
        """Adds a read for the tokens from `first` on."""
        self._readings = [known for known in self._readings if known.reference() is not None]
        self._readings.append(_Reading(first, weakref.ref(reading)))

    def cancel_from(self, length: int) -> None:
        """Cancels the reads for tokens from `length` on alone, and forgets them."""
        for first, reference in self._readings:
            reading = reference()
            if first >= length and reading is not None:
                reading.cancel()
        self._readings = [known for known in self._readings if known.first < length]


class _Reading(NamedTuple):
    """A read for the tokens from `first` on."""

    first: int
    reference: weakref.ref[Cancellable]
