"""Arms of a comparison with equal parameters, counted by code: dense, mixture of experts, and
experts with a memory.

A token uses the same number of parameters in each arm. The last two arms also have the same total:
the memory's table takes the place of a share of the routed experts (paper, section 3: rho is the
share that the experts keep).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigError
from ..spec.config import EngramConfig
from ..spec.hash import HashSpec
from ..spec.hot import HotSpec
from ..spec.layer import LayerSpec
from .config import LMConfig
from .model import LM
from .moe import MoE
from .sizes import EMBEDDING, TABLE, parts, total

TOLERANCE = 0.01
UNNAMED = "0" * 64
"""In the place of an index's digest, while only its size is known."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model and its memory.

    Attributes:
        total: Everything, the table included.
        activated: What one token uses: top_k of the routed experts, the C*d values that each memory
            layer reads from the table, and the whole head. The token embedding counts only if it is
            the head, because a token copies one row of it.
        table: Values in the table.
        embedding: Values in the token embedding.
    """

    total: int
    activated: int
    table: int
    embedding: int


class Arm(NamedTuple):
    """One model of a comparison.

    Attributes:
        name: Name of the arm.
        model: Sizes of the model.
        memory: Sizes of the memory; None = the arm has no memory. With hot n-grams, its index is
            UNNAMED: which n-grams are hot is known from a text.
        parameters: Parameter counts of the arm.
        hot: Hot n-grams of each order.
    """

    name: str
    model: LMConfig
    memory: EngramConfig | None
    parameters: Parameters
    hot: Mapping[int, int] = {}


class Arms(NamedTuple):
    """The three arms."""

    dense: Arm
    moe: Arm
    memory: Arm


def count_parameters(model: LM) -> Parameters:
    """Counts of a model as built, its memory included."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    unused = sum(module.unused_parameters for module in model.modules() if isinstance(module, MoE))
    memory = None if model.memory is None else model.memory.config
    copied = 0 if model.config.tie_embeddings else model.embed.weight.numel()
    table = 0 if memory is None else memory.table_parameters()
    read = 0 if memory is None else memory.layer.width * len(memory.hash.layer_ids)
    activated = dense - unused - copied + read
    return Parameters(dense + table, activated, table, model.embed.weight.numel())


def demo_config(vocab_size: int = 2048) -> LMConfig:
    """The mixture of experts that the demo starts from: 2,573,184 parameters, 836,480 of them
    activated."""
    return LMConfig(
        vocab_size,
        hidden_size=128,
        layers=3,
        heads=2,
        ffn=320,
        moe_layers=(1, 2),
        experts=32,
        top_k=2,
        expert_ffn=64,
        shared_ffn=192,
    )


@dataclass(frozen=True)
class MemorySizes:
    """Sizes of an arm's memory, in the demo's dialect.

    Attributes:
        layers: Its layers.
        orders: Its orders.
        heads: Heads of an order.
        dim: Width of a row.
        kernel: Taps of the conv; 0 = no conv.
        rows_per_head: Rows of a head; None = as many as the experts that it replaces pay for.
        seed: Of the hash.
        hot: Share of a head's rows that go to hot n-grams, in each order; 0 = there are none.
        cold: Rows of a head that are hashed, as a share of all; None = those that `hot` leaves, so
            that the table is as large as without hot n-grams.
    """

    layers: tuple[int, ...] = (1,)
    orders: tuple[int, ...] = (2, 3)
    heads: int = 4
    dim: int = 16
    kernel: int = 4
    rows_per_head: int | None = None
    seed: int = 0
    hot: float = 0.0
    cold: float | None = None

    @property
    def width(self) -> int:
        """Values that a layer reads for a token."""
        return len(self.orders) * self.heads * self.dim

    def config(
        self, model: LMConfig, hash_vocab: int, pad_id: int, rows_per_head: int
    ) -> EngramConfig:
        """The memory of a model, with so many rows of a head."""
        spec = HashSpec.demo(
            self.layers, self.orders, self.heads, rows_per_head, hash_vocab, pad_id, self.seed
        )
        width = spec.columns * self.dim
        layer = LayerSpec(model.hidden_size, width, model.streams, spec.order, self.kernel)
        return EngramConfig(spec, layer, self.dim)

    def divided(
        self, model: LMConfig, whole: EngramConfig, pad_id: int, rows_per_head: int
    ) -> tuple[EngramConfig, dict[int, int]]:
        """The memory whose rows are divided between hot n-grams and the hash.

        Args:
            model: The model.
            whole: Its memory if all rows are hashed.
            pad_id: Raw id of the filler.
            rows_per_head: Rows of a head of `whole`.

        Returns:
            The config, and the hot n-grams of each order. Unless `cold` is given, the table has
            exactly as many rows as that of `whole`, order by order.

        Raises:
            ConfigError: Tables of this many heads cannot be equal.
        """
        vocab_size = whole.hash.vocab_size
        moved = max(1, round(self.hot * rows_per_head)) if self.hot else 0
        rest = self.config(model, vocab_size, pad_id, rows_per_head - moved)
        slots: dict[int, int] = {}
        if moved:
            slots = _slots(whole.hash, rest.hash)
        cold = rest
        if self.cold is not None:
            cold = self.config(model, vocab_size, pad_id, round(self.cold * rows_per_head))
        if not slots:
            return cold, slots
        config = dataclasses.replace(cold, hot=HotSpec(UNNAMED, sum(slots.values())))
        if self.cold is None and config.table_parameters() != whole.table_parameters():
            raise ConfigError(
                f"hot: expected a table of {whole.table_parameters()} parameters, as without hot "
                f"n-grams, found {config.table_parameters()}"
            )
        return config, slots


def three_arms(
    moe: LMConfig,
    hash_vocab: int,
    pad_id: int,
    *,
    rho: float = 0.75,
    layers: Sequence[int] = (1,),
    orders: Sequence[int] = (2, 3),
    heads: int = 4,
    dim: int = 16,
    seed: int = 0,
) -> Arms:
    """The three arms for a mixture of experts.

    Args:
        moe: The mixture of experts.
        hash_vocab: Number of ids that are hashed, len(vocab).
        pad_id: Raw id of the filler.
        rho: Share of the routed experts that the memory arm keeps. The others pay for the table,
            the shared experts for the memory's dense part.
        layers: Layers of the memory.
        orders: Orders of the memory.
        heads: Heads of the memory.
        dim: Width of a row.
        seed: Seed of the memory's hash.

    Raises:
        ConfigError: The counts cannot be made equal within 1 %.
    """
    sizes = MemorySizes(tuple(layers), tuple(orders), heads, dim, seed=seed)
    memory = memory_arm(moe, rho, sizes, hash_vocab, pad_id)
    return Arms(dense_arm(moe), moe_arm(moe), memory)


def moe_arm(moe: LMConfig) -> Arm:
    """The mixture of experts itself. Raises ConfigError if it has no experts."""
    if not moe.moe_layers:
        raise ConfigError("expected a mixture of experts, found a model without moe_layers")
    return Arm("moe", moe, None, _count_config(moe, None))


def dense_arm(moe: LMConfig) -> Arm:
    """A dense model with the activated parameters of a mixture of experts.

    Raises ConfigError if the counts cannot be made equal within 1 %.
    """
    goal = moe_arm(moe).parameters
    dense = dataclasses.replace(moe, moe_layers=(), experts=0, top_k=0, expert_ffn=0, shared_ffn=0)
    dense = _solve_width(dense, None, "ffn", moe.layers, goal.activated)
    arm = Arm("dense", dense, None, _count_config(dense, None))
    _check_activated(arm, goal)
    return arm


def memory_arm(moe: LMConfig, rho: float, sizes: MemorySizes, hash_vocab: int, pad_id: int) -> Arm:
    """A mixture of experts that keeps a share rho of them, and a memory in place of the others.

    Args:
        moe: The mixture of experts.
        rho: As in `three_arms`.
        sizes: Of the memory. With rows_per_head given, the totals are not made equal.
        hash_vocab: As in `three_arms`.
        pad_id: As in `three_arms`.

    Raises:
        ConfigError: The counts cannot be made equal within 1 %.
    """
    if not 0 < rho < 1:
        raise ConfigError(f"rho: expected a share between 0 and 1, found {rho}")
    goal = moe_arm(moe).parameters
    experts = round(rho * moe.experts)
    if experts < moe.top_k:
        raise ConfigError(
            f"rho: expected to keep at least the {moe.top_k} experts of a token, "
            f"{rho} of {moe.experts} keeps {experts}"
        )

    def memory_config(rows_per_head: int) -> EngramConfig:
        return sizes.config(moe, hash_vocab, pad_id, rows_per_head)

    least = memory_config(1)
    fewer = dataclasses.replace(moe, experts=experts)
    fewer = _solve_width(fewer, least, "shared_ffn", len(moe.moe_layers), goal.activated)
    rows = sizes.rows_per_head
    if rows is None:
        free = goal.total - _count_config(fewer, least).total + least.table_parameters()
        rows = solve_rows(memory_config, free)
    memory, hot = sizes.divided(moe, memory_config(rows), pad_id, rows)
    arm = Arm("memory", fewer, memory, _count_config(fewer, memory), hot)
    _check_activated(arm, goal)
    if sizes.rows_per_head is None and sizes.cold is None:
        _check_total(arm, goal, rho)
    return arm


def _slots(whole: HashSpec, rest: HashSpec) -> dict[int, int]:
    """Hot n-grams of each order: their rows are those that `whole` has and `rest` has not.

    Raises ConfigError if these rows are not a whole number for each n-gram, in all layers alike.
    """
    slots: dict[int, int] = {}
    heads = whole.heads
    for number, order in enumerate(whole.orders):
        own = slice(number * heads, (number + 1) * heads)
        rows = sum(
            sum(whole.primes(layer)[own]) - sum(rest.primes(layer)[own])
            for layer in whole.layer_ids
        )
        count, over = divmod(rows, heads * len(whole.layer_ids))
        if over or count < 1:
            raise ConfigError(
                f"hot: expected rows for whole n-grams of order {order}, {heads} each in "
                f"{len(whole.layer_ids)} layers, found {rows} rows; 2 heads in one layer always fit"
            )
        slots[order] = count
    return slots


def _solve_width(
    config: LMConfig, memory: EngramConfig | None, field: str, blocks: int, activated: int
) -> LMConfig:
    """The config that comes closest to `activated` parameters a token.

    Args:
        config: Whose width is changed.
        memory: The arm's memory, or None.
        field: The SwiGLU width to change.
        blocks: How many blocks have it.
        activated: Parameters to come close to.
    """
    missing = activated - _count_config(config, memory).activated
    width = getattr(config, field) + round(missing / (3 * config.hidden_size * blocks))
    if width < 1:
        raise ConfigError(
            f"{field}: no width is left at {activated} activated parameters; "
            "the memory's dense part is too large for this model"
        )
    return dataclasses.replace(config, **{field: width})


def solve_rows(memory_config: Callable[[int], EngramConfig], free: int) -> int:
    """rows_per_head whose table comes closest to `free` parameters.

    Args:
        memory_config: The memory for a rows_per_head.
        free: Parameters to come close to.

    Raises:
        ConfigError: They do not suffice for one row.
    """
    least = memory_config(1)
    row_of_all_heads = least.hash.columns * least.dim * len(least.hash.layer_ids)
    rows = free // row_of_all_heads
    if rows < 1:
        raise ConfigError(f"rho: expected parameters to spare for a table, found {free}")
    # Heads have distinct prime sizes from rows_per_head on, so the table comes out larger: take the
    # excess off.
    for _ in range(4):
        excess = memory_config(rows).table_parameters() - free
        rows = max(1, rows - round(excess / row_of_all_heads))
    return rows


def _check_activated(arm: Arm, goal: Parameters) -> None:
    """Raises ConfigError unless the arm activates as many parameters as the goal."""
    if abs(arm.parameters.activated - goal.activated) > TOLERANCE * goal.activated:
        raise ConfigError(
            f"{arm.name} arm: expected {goal.activated} activated parameters within "
            f"{TOLERANCE:.0%}, found {arm.parameters.activated}"
        )


def _check_total(arm: Arm, goal: Parameters, rho: float) -> None:
    """Raises ConfigError unless the arm has as many parameters as the goal."""
    if abs(arm.parameters.total - goal.total) > TOLERANCE * goal.total:
        raise ConfigError(
            f"{arm.name} arm at rho {rho}: expected {goal.total} parameters within "
            f"{TOLERANCE:.0%}, found {arm.parameters.total}"
        )


def _count_config(config: LMConfig, memory: EngramConfig | None) -> Parameters:
    """Counts of the model that `config` and `memory` would give; it gets no storage."""
    counted = parts(config, memory)
    return Parameters(
        sum(part.total for part in counted),
        sum(part.activated for part in counted),
        total(counted, TABLE),
        total(counted, EMBEDDING),
    )
