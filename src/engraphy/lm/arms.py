"""Arms of a comparison with equal parameters, counted by code: dense, mixture of experts, and
experts with a memory.

A token uses as many parameters in each arm; the last two have as many in total, the memory's table
taking the place of a share of the routed experts (paper, section 3: rho is the share that the
experts keep).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigError
from ..spec.config import EngramConfig
from ..spec.hash import HashSpec
from ..spec.layer import LayerSpec
from .model import LM, LMConfig
from .moe import MoE

TOLERANCE = 0.01


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model and its memory.

    total: everything, the table included. activated: what one token uses: routed experts count
    top_k of them, the table the C*d values of each memory layer, the head counts whole, and the
    token embedding, one row of which is copied, not at all unless it is the head. table: values in
    the table. embedding: of the token embedding.
    """

    total: int
    activated: int
    table: int
    embedding: int


class Arm(NamedTuple):
    """One model of a comparison."""

    name: str
    model: LMConfig
    memory: EngramConfig | None
    parameters: Parameters


class Arms(NamedTuple):
    """The three arms."""

    dense: Arm
    moe: Arm
    memory: Arm


def count_parameters(model: LM) -> Parameters:
    """Counts of a model as built, its memory included."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    unused = sum(module.unused_parameters for module in model.modules() if isinstance(module, MoE))
    return _parameters(
        model.config, dense, unused, None if model.memory is None else model.memory.config
    )


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
    """The three arms for a mixture of experts `moe`.

    hash_vocab: number of ids that are hashed, len(vocab). pad_id: raw id of the filler. rho: share
    of the routed experts that the memory arm keeps; the others pay for the table, shared experts
    for the memory's dense part. layers, orders, heads, dim: of the memory. seed: of its hash.
    Raises ConfigError where the counts cannot be made equal within 1 %.
    """
    if not 0 < rho < 1:
        raise ConfigError(f"rho: expected a share between 0 and 1, found {rho}")
    if not moe.moe_layers:
        raise ConfigError("expected a mixture of experts, found a model without moe_layers")
    goal = _count_config(moe, None)
    dense = dataclasses.replace(moe, moe_layers=(), experts=0, top_k=0, expert_ffn=0, shared_ffn=0)
    dense = _solve_width(dense, None, "ffn", moe.layers, goal.activated)

    def memory_config(rows_per_head: int) -> EngramConfig:
        spec = HashSpec.demo(
            tuple(layers), tuple(orders), heads, rows_per_head, hash_vocab, pad_id, seed
        )
        return EngramConfig(
            spec, LayerSpec(moe.hidden_size, spec.columns * dim, order=spec.order), dim
        )

    experts = round(rho * moe.experts)
    if experts < moe.top_k:
        raise ConfigError(
            f"rho: expected to keep at least the {moe.top_k} experts of a token, "
            f"{rho} of {moe.experts} keeps {experts}"
        )
    least = memory_config(1)
    fewer = dataclasses.replace(moe, experts=experts)
    fewer = _solve_width(fewer, least, "shared_ffn", len(moe.moe_layers), goal.activated)
    free = goal.total - _count_config(fewer, least).total + least.table_parameters()
    memory = memory_config(_solve_rows(memory_config, free))
    arms = Arms(
        Arm("dense", dense, None, _count_config(dense, None)),
        Arm("moe", moe, None, goal),
        Arm("memory", fewer, memory, _count_config(fewer, memory)),
    )
    _check(arms, rho)
    return arms


def _solve_width(
    config: LMConfig, memory: EngramConfig | None, field: str, blocks: int, activated: int
) -> LMConfig:
    """The config whose SwiGLU width `field`, found in so many blocks, comes closest to `activated`."""
    missing = activated - _count_config(config, memory).activated
    width = getattr(config, field) + round(missing / (3 * config.hidden_size * blocks))
    if width < 1:
        raise ConfigError(
            f"{field}: no width is left at {activated} activated parameters; the memory's dense part is "
            "too large for this model"
        )
    return dataclasses.replace(config, **{field: width})


def _solve_rows(memory_config: Callable[[int], EngramConfig], free: int) -> int:
    """rows_per_head whose table comes closest to `free` parameters."""
    least = memory_config(1)
    rows = free // (least.hash.columns * least.dim * len(least.hash.layer_ids))
    if rows < 1:
        raise ConfigError(f"rho: expected parameters to spare for a table, found {free}")
    # Heads have distinct prime sizes from rows_per_head on, so the table comes out larger: take the
    # excess off.
    for _ in range(4):
        excess = memory_config(rows).table_parameters() - free
        rows = max(
            1, rows - round(excess / (least.hash.columns * least.dim * len(least.hash.layer_ids)))
        )
    return rows


def _check(arms: Arms, rho: float) -> None:
    goal = arms.moe.parameters
    for arm in (arms.dense, arms.memory):
        if abs(arm.parameters.activated - goal.activated) > TOLERANCE * goal.activated:
            raise ConfigError(
                f"{arm.name} arm: expected {goal.activated} activated parameters within {TOLERANCE:.0%}, "
                f"found {arm.parameters.activated}"
            )
    if abs(arms.memory.parameters.total - goal.total) > TOLERANCE * goal.total:
        raise ConfigError(
            f"memory arm at rho {rho}: expected {goal.total} parameters within {TOLERANCE:.0%}, "
            f"found {arms.memory.parameters.total}"
        )


def _count_config(config: LMConfig, memory: EngramConfig | None) -> Parameters:
    """Counts of the model that `config` and `memory` would give, by formula: nothing is built."""
    hidden, embedding = config.hidden_size, config.vocab_size * config.hidden_size
    experts = len(config.moe_layers)
    sparse = (
        config.experts * (hidden + 3 * hidden * config.expert_ffn) + 3 * hidden * config.shared_ffn
    )
    blocks = config.layers * (4 * hidden**2 + 2 * hidden) + experts * sparse
    blocks += (config.layers - experts) * 3 * hidden * config.ffn + hidden
    unused = experts * (config.experts - config.top_k) * 3 * hidden * config.expert_ffn
    dense = embedding * (1 if config.tie_embeddings else 2) + blocks
    return _parameters(
        config, dense + (0 if memory is None else memory.dense_parameters()), unused, memory
    )


def _parameters(
    config: LMConfig, dense: int, unused: int, memory: EngramConfig | None
) -> Parameters:
    embedding = config.vocab_size * config.hidden_size
    copied = 0 if config.tie_embeddings else embedding
    table = 0 if memory is None else memory.table_parameters()
    read = 0 if memory is None else memory.layer.width * len(memory.hash.layer_ids)
    return Parameters(dense + table, dense - unused - copied + read, table, embedding)
