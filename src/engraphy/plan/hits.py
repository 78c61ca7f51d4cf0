"""How often a row cache hits, by its size: measured tables, and tables of your own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..system.checks import is_number

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class HitRates:
    """Hit rates of a row cache by its size.

    A hit is a row that is not read from the tier: `CacheStore` counts repeats within a batch as
    hits, too.

    Attributes:
        name: How it is called.
        source: Which text and layout it was measured with.
        points: (bytes of the caches of all layers together, hit rate), ascending.

    Raises:
        ConfigError: Sizes do not ascend, or a rate is not between 0 and 1.
    """

    name: str
    source: str
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        rates = [rate for _, rate in self.points]
        rising = sizes == sorted(set(sizes)) and rates == sorted(rates)
        if not sizes or not rising or sizes[0] < 1 or rates[0] < 0 or rates[-1] > 1:
            raise ConfigError(
                f"hit rates {self.name}: expected ascending sizes in bytes, with rates from 0 to 1 "
                f"that do not fall, found {list(self.points)}"
            )

    def size_for(self, hit_rate: float) -> int | None:
        """The smallest measured cache, in bytes, that hits so often; None if none of them does."""
        return next((size for size, rate in self.points if rate >= hit_rate), None)

    def rate_of(self, size: int) -> float:
        """The hit rate of the largest measured cache that is not larger than `size` bytes."""
        return max((rate for bytes_, rate in self.points if bytes_ <= size), default=0.0)


def _own(name: str, text: str, rates: tuple[float, ...]) -> HitRates:
    source = (
        f"{text} under DeepSeek-V4.1's addresses, 200,000 tokens, docs/results/cache-policy.md; "
        "longer texts hit more often"
    )
    sizes = [size * _MEBIBYTE for size in (64, 256, 1024)]
    return HitRates(name, source, tuple(zip(sizes, rates, strict=True)))


HIT_RATES: dict[str, HitRates] = {
    table.name: table
    for table in (
        _own("wiki", "Wikipedia summaries, one stream", (0.182, 0.235, 0.288)),
        _own("code", "Python's library, four streams", (0.606, 0.656, 0.683)),
    )
}
"""Tables that this project measured, by name."""


def hit_rates(what: str | os.PathLike[str], streams: int = 1) -> HitRates:
    """A table of hit rates.

    Args:
        what: A name of `HIT_RATES`, or a JSON file: {"bytes of the cache": hit rate, ...}, or what
            bench/hit_rate.py writes into results/hit-rate.
        streams: Sequences that take turns: of the results of bench/hit_rate.py, one stream is
            taken for 1, and eight for more.

    Returns:
        The table.

    Raises:
        ConfigError: It is neither.
    """
    name = os.fspath(what)
    if name in HIT_RATES:
        return HIT_RATES[name]
    try:
        with open(name) as file:
            content = json.load(file)
        if not isinstance(content, Mapping):
            raise ValueError("no object")
        points = _measured(content, streams) if "runs" in content else _plain(content)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"hit rates: expected one of {', '.join(HIT_RATES)}, or a JSON file such as "
            f'{{"1073741824": 0.62}} with bytes and rates, found {name!r} '
            f"({type(error).__name__}: {error})"
        ) from None
    return HitRates(name, name, tuple(points))


def _plain(content: Mapping[str, Any]) -> list[tuple[int, float]]:
    if not all(map(is_number, content.values())):
        raise ValueError("no object of numbers")
    return sorted((int(size), float(rate)) for size, rate in content.items())


def _measured(content: Mapping[str, Any], streams: int) -> list[tuple[int, float]]:
    """The hit rates of an LRU cache of whole rows, of all orders together."""
    rates = content["runs"]["1 stream" if streams == 1 else "8 streams"]["lru"]["all"]
    sizes = content["sizes_MiB"]
    return [(size * _MEBIBYTE, float(rate)) for size, rate in zip(sizes, rates, strict=True)]
