"""How long calls took, counted in fixed buckets.

There are four buckets per doubling, so that counting costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUCKETS = 64 * 4
_LEAST = 4  # ns; shorter durations do not have the three leading bits that choose a bucket


@dataclass(frozen=True)
class Latency:
    """Durations of calls.

    Attributes:
        counts: calls per bucket.
        seconds: their sum.
    """

    counts: tuple[int, ...] = (0,) * BUCKETS
    seconds: float = 0.0

    @property
    def calls(self) -> int:
        """How many calls were counted."""
        return sum(self.counts)

    def quantile(self, q: float) -> float | None:
        """The duration that a share of the calls did not exceed; up to a quarter too high.

        Args:
            q: the share, from 0 to 1.

        Returns:
            The seconds, or None before the first call.
        """
        rank = q * self.calls
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return limit(bucket)
        return None

    def within(self, seconds: float) -> int:
        """How many calls are known to have taken at most `seconds`.

        Exact if `seconds` is the limit of a bucket, such as a power of two in nanoseconds.
        """
        return sum(count for bucket, count in enumerate(self.counts) if limit(bucket) <= seconds)


def bucket_of(nanoseconds: int) -> int:
    """The bucket of a duration: the position of its leading bit and the two bits after it."""
    if nanoseconds < _LEAST:
        nanoseconds = _LEAST
    size = nanoseconds.bit_length()
    return (size << 2) + (nanoseconds >> (size - 3)) - 4


def limit(bucket: int) -> float:
    """Upper limit of a bucket in seconds."""
    return ((bucket & 3) + 5) * 2.0 ** ((bucket >> 2) - 3) * 1e-9


def latency_of(counts: Sequence[int], nanoseconds: int) -> Latency:
    """A frozen copy of counters that keep counting."""
    return Latency(tuple(counts), nanoseconds * 1e-9)
