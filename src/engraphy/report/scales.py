"""Axes, smoothing and places of labels for the charts: numbers only, no markup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .markup import fixed

_POINTS = 240  # of a curve: more would not be seen
_AVERAGED = 0.03  # share of a curve's points that one average covers; fewer at both ends


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels.

    Attributes:
        low: Value at `start`.
        high: Value at `end`; differs from `low`.
        start: First pixel.
        end: Last pixel; may lie before `start`.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About `count` round values (1, 2 or 5 times a power of ten) with their labels."""
        raw = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        values = [place * step for place in range(first, last + 1)]
        return [(value, fixed(value + 0.0, digits)) for value in values]


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Returns low..high, widened at both ends by `share` of its length, or by 0.1 if that is 0."""
    pad = (high - low) * share or 0.1
    return low - pad, high + pad


def smooth(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Moving average, centred so that it does not lag, and thinned.

    Args:
        curve: Pairs of (tokens, loss).

    Returns:
        Pairs of (tokens, mean loss). The last point of `curve` is the last one here.
    """
    half = int(_AVERAGED * len(curve) / 2)
    sums = [0.0, *accumulate(loss for _, loss in curve)]
    points = []
    for place, (tokens, _) in enumerate(curve):
        first, last = max(0, place - half), min(len(curve), place + half + 1)
        points.append((tokens, (sums[last] - sums[first]) / (last - first)))
    every = max(1, len(points) // _POINTS)
    return points[::-1][::every][::-1]  # from the back, so that the last point stays


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves places until they are `gap` apart and inside low..high. Their order stays.

    Args:
        places: Heights of labels, in any order.
        gap: Least distance of two of them.
        low: Least height.
        high: Greatest height.

    Returns:
        The new heights, in the order of `places`, after one pass down and one pass up.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    edge = low - gap
    for index in order:
        moved[index] = edge = max(moved[index], edge + gap)
    edge = high + gap
    for index in reversed(order):
        moved[index] = edge = min(moved[index], edge - gap)
    return moved
