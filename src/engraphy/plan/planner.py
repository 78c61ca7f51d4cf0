"""The formula: which part of the reads of a memory a model has to wait for.

The rows of all memory layers are requested before the first block, and read in the order of the
layers. A batch has n = batch * tokens tokens, each of which reads C rows a layer, and the caches
answer a share h of them. For the memory layers k = 1, 2, ... of a model:

    reads_k   = n * C * (1 - h)                           rows that the tier is asked for
    r_k       = seconds of a batch of reads_k on the tier   (`Tier.seconds`)
    ready_k   = r_1 + ... + r_k                           the rows of layer k are there
    due_k     = time of the blocks before layer k         the window of layer k is due_k - due_(k-1)
    wait_k    = max(0, ready_k - due_k - wait_1 - ... - wait_(k-1))
    exposed   = wait_1 + wait_2 + ... = max(0, ready_1 - due_1, ready_2 - due_2, ...)

Read in the blocks instead, every layer waits for its own: r_1 + r_2 + ...

What the formula leaves out: hashing the ids and handing rows over (about 0.3 ms a forward), the CPU
time of the reads where model and reads share cores, and what others ask of the same tier.
docs/results/planner.md has measurements beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..store.sets import WAYS, set_bytes
from ..system.checks import as_int, is_number
from .layouts import Layout
from .tiers import Tier

_HALVINGS = 40


@dataclass(frozen=True)
class LayerPlan:
    """What one memory layer reads and waits for in one forward.

    Attributes:
        layer: The model's layer, 0-based.
        rows: Rows that its tokens need.
        reads: Rows that the tier is asked for, on average.
        read_seconds: How long these take.
        window: Seconds of the blocks since the memory layer before it, or since the start.
        exposed: Seconds that the block waits for its rows, if they are read ahead.
    """

    layer: int
    rows: int
    reads: float
    read_seconds: float
    window: float
    exposed: float

    @property
    def hides(self) -> bool:
        """Whether the block finds its rows when it begins."""
        return self.exposed == 0.0


@dataclass(frozen=True)
class Plan:
    """What a tier costs a model.

    Attributes:
        layout: The model and its memory.
        tier: Where the rows lie.
        batch: Sequences of a forward.
        tokens: Tokens of each sequence in a forward: 1 in decoding, a chunk in prefill.
        block_seconds: How long a block takes.
        hit_rate: Share of the rows that caches answer.
        layers: What each memory layer waits for.
    """

    layout: Layout
    tier: Tier
    batch: int
    tokens: int
    block_seconds: float
    hit_rate: float
    layers: tuple[LayerPlan, ...]

    @property
    def forward_seconds(self) -> float:
        """How long the blocks of a forward take, without any wait for rows."""
        return self.layout.blocks * self.block_seconds

    @property
    def exposed(self) -> float:
        """Seconds of a forward that wait for rows, if they are read ahead."""
        return sum(layer.exposed for layer in self.layers)

    @property
    def synchronous(self) -> float:
        """Seconds of a forward that wait for rows, if each block reads its own."""
        return sum(layer.read_seconds for layer in self.layers)

    @property
    def loss(self) -> float:
        """Share of the tokens a second that is lost, if rows are read ahead."""
        return self.exposed / (self.forward_seconds + self.exposed)

    @property
    def synchronous_loss(self) -> float:
        """Share of the tokens a second that is lost, if each block reads its own rows."""
        return self.synchronous / (self.forward_seconds + self.synchronous)

    @property
    def token_bytes(self) -> int:
        """Bytes of the rows of one token, in all layers."""
        return self.layout.rows_per_token * self.layout.row_bytes

    @property
    def token_bytes_least(self) -> int:
        """Bytes that the tier reads for one token, if each row lies in as few units as it can."""
        if not self.tier.unit:
            return self.token_bytes
        units = -(-self.layout.row_bytes // self.tier.unit)
        return self.layout.rows_per_token * units * self.tier.unit

    @property
    def token_bytes_mean(self) -> float:
        """Bytes that the tier reads for one token on average: some rows lie across two units."""
        if not self.tier.unit:
            return float(self.token_bytes)
        units = self.tier.units(self.layout.row_bytes)
        return self.layout.rows_per_token * units * self.tier.unit

    @property
    def hit_rate_to_hide(self) -> float:
        """The least hit rate with which no block waits, to 0.1 %; 1.0 if only a full cache does."""
        if _exposed(self, 0.0) == 0.0:
            return 0.0
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _exposed(self, middle) == 0.0:
                high = middle
            else:
                low = middle
        return min(1.0, math.ceil(high * 1000) / 1000)

    def cached_rows(self, size: int) -> int:
        """How many rows caches of `size` bytes in all hold, their bookkeeping counted."""
        return size // set_bytes(self.layout.row_bytes) * WAYS


def plan(
    layout: Layout,
    tier: Tier,
    *,
    batch: int = 1,
    tokens: int = 1,
    tokens_per_second: float | None = None,
    block_seconds: float | None = None,
    hit_rate: float = 0.0,
) -> Plan:
    """Says whether reads hide. The module's docstring has the formula.

    Args:
        layout: The model and its memory.
        tier: Where the rows lie.
        batch: Sequences of a forward.
        tokens: Tokens of each sequence in a forward: 1 in decoding, a chunk in prefill.
        tokens_per_second: Of the model without its memory, all sequences together; a block then
            takes its share of a forward, as if all blocks were equal and nothing else took time.
        block_seconds: How long a block takes, instead of tokens_per_second.
        hit_rate: Share of the rows that caches answer, from 0 (none, or cold) to 1.

    Returns:
        The plan.

    Raises:
        ConfigError: A number is out of range, or not exactly one of tokens_per_second and
            block_seconds is given.
    """
    as_int("batch", batch, 1)
    as_int("tokens", tokens, 1)
    if (tokens_per_second is None) == (block_seconds is None):
        raise ConfigError(
            "plan: expected either tokens_per_second or block_seconds, "
            f"found {tokens_per_second!r} and {block_seconds!r}"
        )
    if block_seconds is None:
        speed = _positive("tokens_per_second", tokens_per_second)
        block_seconds = batch * tokens / speed / layout.blocks
    block_seconds = _positive("block_seconds", block_seconds)
    if not is_number(hit_rate) or not 0 <= hit_rate <= 1:
        raise ConfigError(f"hit_rate: expected a share from 0 to 1, found {hit_rate!r}")
    empty = Plan(layout, tier, batch, tokens, block_seconds, float(hit_rate), ())
    return replace(empty, layers=_layers(empty, empty.hit_rate))


def _layers(plan: Plan, hit_rate: float) -> tuple[LayerPlan, ...]:
    rows = plan.batch * plan.tokens * plan.layout.config.hash.columns
    reads = rows * (1 - hit_rate)
    read_seconds = plan.tier.seconds(reads, plan.layout.row_bytes)
    layers: list[LayerPlan] = []
    ready = due = waited = 0.0
    before = 0
    for layer in plan.layout.layers:
        window = (layer - before) * plan.block_seconds
        ready += read_seconds
        due += window
        exposed = max(0.0, ready - due - waited)
        waited += exposed
        before = layer
        layers.append(LayerPlan(layer, rows, reads, read_seconds, window, exposed))
    return tuple(layers)


def _exposed(plan: Plan, hit_rate: float) -> float:
    return sum(layer.exposed for layer in _layers(plan, hit_rate))


def _positive(name: str, value: Any) -> float:
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a positive number, found {value!r}")
    return float(value)
