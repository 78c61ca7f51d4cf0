"""Where rows may lie, and how long a batch of reads takes there.

A tier is either published figures or what `engraphy machine probe` measured. Published figures are
of one read and of many: a batch of n reads takes the latency of one, plus n over the reads that
the tier answers in a second.

None of the published figures was measured by this project. CXL and RDMA are figures of hardware;
software above them, such as a key-value store, takes more.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..system.checks import as_int, is_number

PAGE = 4096
LINE = 64


@dataclass(frozen=True)
class Batch:
    """How long batches of one size took.

    Attributes:
        reads: Random reads of a batch.
        seconds: The median.
        p99: What 99 % of the batches did not exceed.
    """

    reads: int
    seconds: float
    p99: float


@dataclass(frozen=True)
class Tier:
    """Where rows lie.

    Attributes:
        name: How it is called.
        source: Where the figures come from.
        unit: Reads are of whole units of so many bytes: pages, cache lines. 0 = one read brings one
            row, whatever its bytes.
        latency: Seconds of one read, without others beside it.
        rate: Units a second with many under way; math.inf = no limit.
        batches: What was measured, by size. Then latency is that of the smallest batch, and rate
            the best of all.

    Raises:
        ConfigError: A figure is not positive, or the batches do not ascend.
    """

    name: str
    source: str
    unit: int
    latency: float
    rate: float
    batches: tuple[Batch, ...] = ()

    def __post_init__(self) -> None:
        as_int(f"tier {self.name}, unit", self.unit, 0)
        if not self.rate > 0:
            raise ConfigError(
                f"tier {self.name}, rate: expected a positive number, found {self.rate!r}"
            )
        if not 0 <= self.latency < math.inf:
            raise ConfigError(
                f"tier {self.name}, latency: expected seconds, found {self.latency!r}"
            )
        sizes = [batch.reads for batch in self.batches]
        if sizes != sorted(set(sizes)) or any(batch.seconds <= 0 for batch in self.batches):
            raise ConfigError(
                f"tier {self.name}, batches: expected ascending sizes and positive seconds, "
                f"found {[(batch.reads, batch.seconds) for batch in self.batches]}"
            )

    def units(self, row_bytes: int) -> float:
        """Units that a row touches on average, if rows lie one after the other from a multiple on.

        A row of b bytes begins at any multiple of g = gcd(b, unit), each equally often. So it
        touches 1 + (b - g) / unit of them.
        """
        if not self.unit:
            return 1.0
        return 1 + (row_bytes - math.gcd(row_bytes, self.unit)) / self.unit

    def seconds(self, rows: float, row_bytes: int) -> float:
        """How long a batch of rows takes, from the request to the last row.

        Args:
            rows: Rows of the batch; a fraction is an average of batches.
            row_bytes: Bytes of a row.

        Returns:
            Seconds; 0 for no rows. Between measured sizes on a straight line in logarithms, beyond
            the largest in proportion.
        """
        reads = rows * self.units(row_bytes)
        if reads <= 0:
            return 0.0
        if not self.batches:
            return min(reads, 1.0) * self.latency + reads / self.rate
        first = self.batches[0]
        last = self.batches[-1]
        if reads <= first.reads:
            return first.seconds * min(reads, 1.0)
        if reads >= last.reads:
            return last.seconds * reads / last.reads
        above = next(i for i, batch in enumerate(self.batches) if batch.reads >= reads)
        low = self.batches[above - 1]
        high = self.batches[above]
        share = math.log(reads / low.reads) / math.log(high.reads / low.reads)
        return low.seconds * (high.seconds / low.seconds) ** share

    def limited(self, in_flight: int) -> Tier:
        """The tier for a server that has at most so many reads under way.

        Raises ConfigError if the tier was measured: its batches have their own reads under way.
        """
        as_int(f"tier {self.name}, in_flight", in_flight, 1)
        if self.batches:
            raise ConfigError(
                f"tier {self.name}: expected published figures with in_flight, found a probe"
            )
        return replace(self, rate=min(self.rate, in_flight / self.latency))

    @classmethod
    def measured(cls, name: str, source: str, batches: tuple[Batch, ...], unit: int = PAGE) -> Tier:
        """A tier of measured batches."""
        if not batches:
            raise ConfigError(f"tier {name}: expected measured batches, found none")
        rate = max(batch.reads / batch.seconds for batch in batches)
        return cls(name, source, unit, batches[0].seconds / batches[0].reads, rate, batches)


_PUBLISHED = (
    Tier(
        "cxl",
        "a CXL 2.0 pool behind a switch: 750 ns a cache line, 46 GB/s a host. Such pools: Beluga "
        "(arXiv 2511.20172); with Engram tables: arXiv 2603.10087",
        LINE,
        750e-9,
        46e9 / LINE,
    ),
    Tier(
        "rdma",
        "HERD (Kalia et al., SIGCOMM 2014): 26 million requests a second at 5 us on average, "
        "similar to native RDMA reads",
        0,
        5e-6,
        26e6,
    ),
    Tier(
        "nvme",
        "a consumer drive under Qwen3.8's table, 130,000 reads a second at 64 threads: "
        "halo-box/llama.cpp #3; 80 us for one read: FlashML-org/FreeToken #444",
        PAGE,
        80e-6,
        130e3,
    ),
    Tier(
        "nvme-datacentre",
        "what data sheets promise with many reads under way: 1 million reads a second, as "
        "Samsung's of the 980 PRO; 80 us for one read: FlashML-org/FreeToken #444",
        PAGE,
        80e-6,
        1e6,
    ),
)
TIERS: dict[str, Tier] = {tier.name: tier for tier in _PUBLISHED}
"""Published figures by name."""


def tier(what: str | os.PathLike[str]) -> Tier:
    """A tier by name, or what a probe wrote.

    Args:
        what: A name of `TIERS`, or a file of `engraphy machine probe --json`.

    Returns:
        The tier.

    Raises:
        ConfigError: It is neither.
    """
    name = os.fspath(what)
    if name in TIERS:
        return TIERS[name]
    try:
        with open(name) as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tier: expected one of {', '.join(TIERS)}, or a file of engraphy machine probe "
            f"--json, found {name!r} ({error})"
        ) from None
    return tier_of_json(content, name)


def tier_of_json(content: Any, name: str) -> Tier:
    """The tier in what a probe wrote. Raises ConfigError, naming the file, for anything else."""
    batches: list[Batch] = []
    try:
        for item in content["batches"]:
            values = [item["reads"], item["seconds"], item["p99"]]
            if not all(map(is_number, values)):
                raise ValueError(f"batch {item}")
            batches.append(Batch(int(values[0]), float(values[1]), float(values[2])))
        source = f"{content['path']}: {content['how']}"
        unit = content["unit"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"tier: expected what engraphy machine probe --json writes, found {name!r} without a "
            f"readable {error}"
        ) from None
    return Tier.measured(name, source, tuple(batches), unit)
