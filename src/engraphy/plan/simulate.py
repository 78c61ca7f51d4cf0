"""A rack on a virtual clock: many servers that read one pool, or the same row servers.

The planner's formula knows one server that has its tier for itself. Here each server runs forwards
one after the other, reads the rows of each memory layer in order, and shares parts with all others:
the cards of a pool, or row servers. With one server and parts without a limit, the clock shows what
the formula says.

What a server does in a forward that begins at t, for its memory layers k = 1, 2, ...:

    m_k      = rows that its cache lacks: binomial(rows, 1 - h)
    start_k  = ready_(k-1), or t for the first layer
    host_k   = request + seconds of a batch of m_k on the tier      latency, reads in flight, link
    part p   serves the batches that come to it one after the other, `rate` units a second
    ready_k  = max(start_k + host_k, the last part is done + request + latency)
    wait_k   = max(0, ready_k - the time at which block k is due)

Rows fall on parts at random. When parts fail, their rows are read from the next part that lives and
has a copy, or from a tier that stands by. A server notices at its first read, which then takes
`hedge` seconds longer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..system.checks import as_int, is_number
from .layouts import Layout
from .tiers import Tier

_WARM = 2  # forwards of each server that are not counted: all servers begin at once


@dataclass(frozen=True)
class Shared:
    """What the servers have in common.

    Attributes:
        parts: Cards of a pool, or row servers. Rows are spread over them evenly.
        rate: Units of the tier (cache lines, pages, rows) that one part serves in a second, all
            servers together; math.inf = no limit.
        request: Seconds of software for each batch.
        copies: Parts that hold each row.
        standby: Where the rows of a failed part are read if no part has a copy; None = nowhere.
        hedge: Seconds until a server that asks a failed part asks elsewhere.

    Raises:
        ConfigError: A number is out of range.
    """

    parts: int = 1
    rate: float = math.inf
    request: float = 0.0
    copies: int = 1
    standby: Tier | None = None
    hedge: float = 0.0

    def __post_init__(self) -> None:
        as_int("parts", self.parts, 1)
        as_int("copies", self.copies, 1, self.parts)
        if not self.rate > 0:
            raise ConfigError(f"rate of a part: expected a positive number, found {self.rate!r}")
        for name in ("request", "hedge"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name}: expected seconds, found {value!r}")


@dataclass(frozen=True)
class Load:
    """What each server computes, beside its memory.

    Attributes:
        servers: How many.
        batch: Sequences of a forward.
        tokens: Tokens of each sequence in a forward.
        block_seconds: How long a block takes.
        hit_rate: Share of the rows that a server's own cache has.

    Raises:
        ConfigError: A number is out of range.
    """

    servers: int
    batch: int
    tokens: int
    block_seconds: float
    hit_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("servers", "batch", "tokens"):
            as_int(name, getattr(self, name), 1)
        if not is_number(self.block_seconds) or not 0 < self.block_seconds < math.inf:
            raise ConfigError(f"block_seconds: expected seconds, found {self.block_seconds!r}")
        if not is_number(self.hit_rate) or not 0 <= self.hit_rate <= 1:
            raise ConfigError(f"hit_rate: expected a share from 0 to 1, found {self.hit_rate!r}")


@dataclass(frozen=True)
class LayerTimes:
    """What a memory layer did, over all counted forwards.

    Attributes:
        layer: The model's layer, 0-based.
        reads: Rows that the tier was asked for, on average.
        read_seconds: How long these took, on average.
        due_seconds: When its block is due after the forward began, if no block waits.
        exposed: Seconds that its block waited, on average.
        exposed_p99: What 99 % of the waits did not exceed.
    """

    layer: int
    reads: float
    read_seconds: float
    due_seconds: float
    exposed: float
    exposed_p99: float


@dataclass(frozen=True)
class Simulation:
    """What the clock showed.

    Attributes:
        layers: The memory layers.
        forward_seconds: Of a forward without any wait.
        exposed: Seconds that a forward waited, on average.
        median: Seconds that half of the forwards did not wait longer than.
        busy: Share of its time that the busiest part was at work.
        longest: The longest forward.
    """

    layers: tuple[LayerTimes, ...]
    forward_seconds: float
    exposed: float
    median: float
    busy: float
    longest: float

    @property
    def loss(self) -> float:
        """Share of the tokens a second that is lost."""
        return self.exposed / (self.forward_seconds + self.exposed)

    @property
    def tightest(self) -> tuple[str, float]:
        """What gives way first, and how far it is used; 1 = used up.

        A layer's window is used by all reads up to its own, a forward by all reads of a server, and
        a part by all servers.
        """
        done = 0.0
        used: dict[str, float] = {}
        for layer in self.layers:
            done += layer.read_seconds
            window = f"the window of block {layer.layer}"
            used[window] = done / layer.due_seconds if layer.due_seconds else math.inf
        used["the busiest part"] = self.busy
        name = max(used, key=lambda key: used[key])
        return name, used[name]


def simulate(
    layout: Layout,
    tier: Tier,
    load: Load,
    shared: Shared | None = None,
    *,
    layers: Sequence[int] | None = None,
    failed: int = 0,
    forwards: int = 20,
    seed: int = 0,
) -> Simulation:
    """Runs a rack. The module's docstring has the model.

    Args:
        layout: The model and its memory.
        tier: Where the rows lie, as one server sees it.
        load: What the servers compute.
        shared: What they share; None = nothing.
        layers: Blocks that have the memory, instead of the layout's.
        failed: Parts that are gone in the forwards that are counted.
        forwards: Forwards of each server that are counted.
        seed: Of caches, parts, and the order of the servers.

    Returns:
        What happened in the forwards that are counted.

    Raises:
        ConfigError: A number is out of range, or rows of failed parts are nowhere.
    """
    placed = tuple(layout.layers if layers is None else sorted(layers))
    if not placed or placed[0] < 0 or placed[-1] >= layout.blocks:
        raise ConfigError(
            f"layers: expected blocks from 0 to {layout.blocks - 1}, found {list(placed)}"
        )
    as_int("forwards", forwards, 1)
    shared = shared or Shared()
    as_int("failed", failed, 0, shared.parts - 1)
    return _Clock(layout, tier, load, shared, placed, failed, seed).run(forwards)


@dataclass
class _Server:
    """One server: the forward under way, and what was noted of those before."""

    begun: float = 0.0
    forward: int = 0
    ready: list[float] = field(default_factory=list[float])
    reads: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    knows: bool = False  # that parts have failed


class _Clock:
    """The event loop. An event is the start of the reads of one layer of one server."""

    def __init__(
        self,
        layout: Layout,
        tier: Tier,
        load: Load,
        shared: Shared,
        layers: tuple[int, ...],
        failed: int,
        seed: int,
    ) -> None:
        self._tier = tier
        self._load = load
        self._shared = shared
        self._layers = layers
        self._blocks = layout.blocks
        self._row_bytes = layout.row_bytes
        self._units = tier.units(layout.row_bytes)
        self._rows = load.batch * load.tokens * layout.config.hash.columns
        self._rng = np.random.default_rng(seed)
        self._failed = failed
        self._owners_PC, self._lost = _owners(shared, failed)
        self._free_P = np.zeros(shared.parts)  # when each part has served what has come to it
        self._worked_P = np.zeros(shared.parts)
        self._counted_from = math.inf
        self._reads: list[list[tuple[float, float, float]]] = [[] for _ in layers]
        self._waited: list[float] = []

    def run(self, forwards: int) -> Simulation:
        load = self._load
        base = self._blocks * load.block_seconds
        servers = [_Server() for _ in range(load.servers)]
        begins = self._rng.uniform(0.0, base, load.servers)
        events: list[tuple[float, int]] = []
        for number, (server, begun) in enumerate(zip(servers, begins.tolist(), strict=True)):
            server.begun = begun
            heapq.heappush(events, (begun, number))
        last = 0.0
        while events:
            now, number = heapq.heappop(events)
            server = servers[number]
            if server.forward >= _WARM and self._counted_from == math.inf:
                self._counted_from = now
                self._worked_P[:] = 0.0
            server.ready.append(self._read(now, server))
            if len(server.ready) < len(self._layers):
                heapq.heappush(events, (server.ready[-1], number))
                continue
            last = self._end(server, base)
            if server.forward < _WARM + forwards:
                heapq.heappush(events, (server.begun, number))
        return self._summary(base, last)

    def _read(self, now: float, server: _Server) -> float:
        """Reads the rows of the server's next layer. Returns when the last one is there."""
        tier, shared = self._tier, self._shared
        misses = int(self._rng.binomial(self._rows, 1 - self._load.hit_rate))
        ready = now
        if misses:
            fails = self._failed > 0 and server.forward >= _WARM
            rows_P = self._rows_by_part(misses, fails)
            lost = misses - int(rows_P.sum())
            ready = now + shared.request + tier.seconds(misses - lost, self._row_bytes)
            if lost and shared.standby is not None:
                ready = max(ready, now + shared.standby.seconds(lost, self._row_bytes))
            ready = max(ready, self._serve(now, rows_P))
            if fails and not server.knows:
                server.knows = True
                ready += shared.hedge
        server.reads.append((misses, ready - now))
        return ready

    def _rows_by_part(self, misses: int, fails: bool) -> np.ndarray:
        """int64 [parts], how many rows each part is asked for; lost rows are none of them."""
        parts = self._shared.parts
        if parts == 1:
            return np.array([misses])
        rows_P = self._rng.multinomial(misses, np.full(parts, 1 / parts))
        if not fails:
            return rows_P
        kept_P = np.zeros(parts, np.int64)
        np.add.at(kept_P, self._owners_PC[~self._lost], rows_P[~self._lost])
        return kept_P

    def _serve(self, now: float, rows_P: np.ndarray) -> float:
        """Gives a batch to the parts. Returns when the last of its rows is there."""
        if self._shared.rate == math.inf:
            return now
        work_P = rows_P * (self._units / self._shared.rate)
        asked_P = rows_P > 0
        done_P = np.maximum(self._free_P, now) + work_P
        self._free_P[asked_P] = done_P[asked_P]
        self._worked_P += work_P
        if not asked_P.any():
            return now
        return float(done_P[asked_P].max()) + self._shared.request + self._tier.latency

    def _end(self, server: _Server, base: float) -> float:
        """Ends a forward, and begins the next one. Returns when it ended."""
        waited = 0.0
        counted = server.forward >= _WARM
        for place, layer in enumerate(self._layers):
            due = server.begun + layer * self._load.block_seconds + waited
            wait = max(0.0, server.ready[place] - due)
            waited += wait
            if counted:
                misses, taken = server.reads[place]
                self._reads[place].append((misses, taken, wait))
        if counted:
            self._waited.append(waited)
        server.begun += base + waited
        server.forward += 1
        server.ready = []
        server.reads = []
        return server.begun

    def _summary(self, base: float, last: float) -> Simulation:
        times: list[LayerTimes] = []
        for layer, reads in zip(self._layers, self._reads, strict=True):
            reads_N3 = np.array(reads)
            misses, taken, wait = reads_N3.mean(axis=0).tolist()
            p99 = float(np.quantile(reads_N3[:, 2], 0.99))
            due = layer * self._load.block_seconds
            times.append(LayerTimes(layer, misses, taken, due, wait, p99))
        waited = np.array(self._waited)
        busy = float(self._worked_P.max()) / (last - self._counted_from)
        return Simulation(
            tuple(times),
            base,
            float(waited.mean()),
            float(np.median(waited)),
            busy,
            base + float(waited.max()),
        )


def _owners(shared: Shared, failed: int) -> tuple[np.ndarray, np.ndarray]:
    """Who answers for each part when the first `failed` of them are gone.

    Returns:
        int64 [parts], the part that is asked; and bool [parts], whether no part has its rows.
    """
    owners: list[int] = []
    lost: list[bool] = []
    for part in range(shared.parts):
        holders = [(part + copy) % shared.parts for copy in range(shared.copies)]
        alive = [holder for holder in holders if holder >= failed]
        owners.append(alive[0] if alive else part)
        lost.append(not alive)
    if any(lost) and shared.standby is None:
        raise ConfigError(
            f"failed: expected copies of the rows of {failed} failed parts, or a tier that stands "
            f"by, found {shared.copies} copies and none"
        )
    return np.array(owners), np.array(lost)


def block_seconds(layout: Layout, batch: int, tokens: int, tokens_per_second: Any) -> float:
    """How long a block takes in a model of that speed, if all blocks are equal."""
    if not is_number(tokens_per_second) or not 0 < tokens_per_second < math.inf:
        raise ConfigError(
            f"tokens_per_second: expected a positive number, found {tokens_per_second!r}"
        )
    return batch * tokens / tokens_per_second / layout.blocks
