"""Memories that lack one thing: what a study compares a memory with, to learn what that thing does.

Each is the memory of an arm with one change; everything else is as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..addresses.vocab import VocabMap
from ..errors import ConfigError, InputError
from ..fusion.layer import EngramLayer
from ..memory.lookup import Lookup
from ..memory.memory import EngramMemory, Trace
from ..memory.state import SequenceState
from ..spec.config import EngramConfig
from .model import LM, Block
from .moe import SwiGLU
from .norm import RMSNorm


class ConstantGate(EngramLayer):
    """Lets half of the memory in, whatever the hidden state. Its key projection has no effect."""

    def gate(self, u_BTS: Tensor) -> Tensor:
        return torch.full_like(u_BTS, 0.5)


class PlainGate(EngramLayer):
    """The gate as the paper prints it: sigmoid(u), without the signed square root."""

    def gate(self, u_BTS: Tensor) -> Tensor:
        return torch.sigmoid(u_BTS)


class OneGate(EngramLayer):
    """One gate for all residual streams, from the mean of their matches."""

    def gate(self, u_BTS: Tensor) -> Tensor:
        return super().gate(u_BTS.mean(-1, keepdim=True)).expand_as(u_BTS)


class ShuffledMemory(EngramMemory):
    """Each sequence reads the rows of the one before it in the batch; the first those of the last.

    So addresses have the same n-grams as often, and say nothing about the text that reads them.
    """

    def lookup(
        self,
        ids_BT: Tensor,
        state: SequenceState | None = None,
        live: Tensor | None = None,
        starts: Tensor | None = None,
        trace: Trace | None = None,
        **options: Any,
    ) -> Lookup:
        """As `EngramMemory.lookup`. Raises InputError for a batch of one sequence."""
        if len(ids_BT) < 2:
            raise InputError("shuffled addresses: expected two sequences or more, found one")
        others = None if starts is None else starts.roll(1, 0)
        lookup = super().lookup(ids_BT.roll(1, 0), state, live, others, trace, **options)
        return dataclasses.replace(lookup, starts=starts)


def one_row(vocab: VocabMap) -> VocabMap:
    """A map that gives every token the same address: each head reads one row."""
    return VocabMap(np.zeros(vocab.raw_size, dtype=np.int64))


def make_memory(
    config: EngramConfig,
    vocab: VocabMap,
    std: float,
    seed: int,
    control: str = "",
) -> EngramMemory:
    """A memory with rows in RAM, drawn from a seed.

    Args:
        config: Its sizes, for the vocabulary map that `hashed` returns.
        vocab: As `hashed` returns it.
        std: Standard deviation of the rows.
        seed: Seed of the rows.
        control: "" for the memory itself, or one of CONTROLS.

    Raises:
        ConfigError: The control is unknown.
    """
    _check(control)
    kind = ShuffledMemory if control == "shuffled" else EngramMemory
    memory = kind(config, vocab)
    layer = _LAYERS.get(control)
    if layer is not None:
        for name, block in list(memory.blocks.items()):
            with torch.random.fork_rng(devices=[]):  # the model's weights are drawn as before
                other = layer(config.layer)
            other.load_state_dict(block.state_dict())
            memory.blocks[name] = other
    if control == "frozen":
        memory.rows_require_grad = False
    memory.init_rows(std, seed)
    return memory


def hashed(vocab: VocabMap, control: str = "") -> VocabMap:
    """The map whose ids a memory hashes, under a control. Raises ConfigError if it is unknown."""
    _check(control)
    if control == "one-row":
        return one_row(vocab)
    if control == "uncompressed":
        return VocabMap.identity(vocab.raw_size)
    return vocab


class AdaptedBlock(nn.Module):
    """A block with a dense adapter where a memory would be: x + SwiGLU(RMSNorm(x)), then the block.

    Args:
        block: The block.
        hidden_size: D.
        width: Of the SwiGLU.
        eps: Of the norm.
    """

    def __init__(self, block: Block, hidden_size: int, width: int, eps: float):
        super().__init__()
        self.block = block
        self.adapter_norm = RMSNorm(hidden_size, eps)
        self.adapter = SwiGLU(hidden_size, width)

    @property
    def ffn(self) -> nn.Module:
        """The block's feed-forward layer, for balancing."""
        return self.block.ffn

    def forward(self, x: Tensor, *args) -> Tensor:
        return self.block(x + self.adapter(self.adapter_norm(x)), *args)


def add_adapters(model: LM, memory: EngramConfig) -> None:
    """Puts dense adapters where a memory would be, with the parameters that this memory would
    activate: those of its layers and the values that a token reads.

    Raises ConfigError if the memory is smaller than an adapter of width 1.
    """
    hidden = model.config.hidden_size
    eps = model.config.eps
    layers = memory.hash.layer_ids
    activated = memory.dense_parameters() + memory.layer.width * len(layers)
    width = round((activated / len(layers) - hidden) / (3 * hidden))
    if width < 1:
        raise ConfigError(
            f"adapter: expected a memory of at least {4 * hidden * len(layers)} activated "
            f"parameters, found {activated}"
        )
    for layer in layers:
        block = AdaptedBlock(model.blocks[layer], hidden, width, eps)  # pyright: ignore
        nn.init.normal_(block.adapter.gate_up.weight, std=hidden**-0.5)
        nn.init.normal_(block.adapter.down.weight, std=(2 * model.config.layers * width) ** -0.5)
        model.blocks[layer] = block


_LAYERS: dict[str, Callable[..., EngramLayer]] = {
    "constant-gate": ConstantGate,
    "plain-gate": PlainGate,
    "one-gate": OneGate,
}
CONTROLS = ("one-row", "frozen", "shuffled", "uncompressed", *_LAYERS)


def _check(control: str) -> None:
    if control and control not in CONTROLS:
        raise ConfigError(f"control: expected one of {', '.join(CONTROLS)}, found {control!r}")
