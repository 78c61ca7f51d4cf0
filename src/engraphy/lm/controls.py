"""Memories that lack one thing: what a study compares a memory with, to learn what that thing does.

Each is the memory of an arm with one change; everything else is as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..addresses.vocab import VocabMap
from ..errors import ConfigError, InputError
from ..fusion.conv import convolve
from ..fusion.layer import EngramLayer
from ..memory.lookup import Lookup
from ..memory.memory import EngramMemory, Trace
from ..memory.state import SequenceState
from ..spec.config import EngramConfig
from .cache import BlockCache
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


class ConvolvedBlock(nn.Module):
    """A block with a conv where a memory would be: x + SiLU(conv(RMSNorm(x))), then the block. The
    conv is that of a memory's layer: depthwise, causal, within a document.

    Args:
        block: The block.
        hidden_size: D.
        kernel: Taps.
        dilation: Positions between two taps.
        eps: Of the norm.
    """

    def __init__(self, block: Block, hidden_size: int, kernel: int, dilation: int, eps: float):
        super().__init__()
        self.block = block
        self.dilation = dilation
        self.conv_norm = RMSNorm(hidden_size, eps)
        self.conv = nn.Parameter(torch.zeros(1, hidden_size, kernel))

    @property
    def ffn(self) -> nn.Module:
        """The block's feed-forward layer, for balancing."""
        return self.block.ffn

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """As the block. Raises InputError with a cache, which has no room for the conv's inputs."""
        if cache is not None:
            raise InputError("conv: expected a forward over the whole text, found a cache")
        inputs = self.conv_norm(x)
        wide = inputs if x.ndim == 4 else inputs[:, :, None]
        conv_SDK = self.conv.expand(wide.shape[2], -1, -1)
        convolved, _ = convolve(conv_SDK, self.dilation, wide, None, _starts(mask))
        return self.block(x + F.silu(convolved.view_as(x)), rotation, mask, cache)


def _starts(mask: Tensor | None) -> Tensor | None:
    """Where a document begins, bool [B, T]: a token that may not look at the one before it."""
    if mask is None:
        return None
    before = mask[:, 0].diagonal(-1, 1, 2)
    return F.pad(before < 0, (1, 0), value=True)


def add_convs(model: LM, layers: Sequence[int], kernel: int, dilation: int) -> None:
    """Puts convs alone where a memory would be. Fresh ones change nothing.

    Args:
        model: Without a memory.
        layers: The memory's.
        kernel: Taps.
        dilation: Positions between two taps; a memory has its largest order.

    Raises:
        ConfigError: The kernel is below 1.
    """
    if kernel < 1:
        raise ConfigError(f"conv: expected a kernel of at least 1, found {kernel}")
    size = model.config.hidden_size
    for layer in layers:
        block: Any = model.blocks[layer]
        model.blocks[layer] = ConvolvedBlock(block, size, kernel, dilation, model.config.eps)


_LAYERS: dict[str, Callable[..., EngramLayer]] = {
    "constant-gate": ConstantGate,
    "plain-gate": PlainGate,
    "one-gate": OneGate,
}
CONTROLS = ("one-row", "frozen", "shuffled", "uncompressed", *_LAYERS)


def _check(control: str) -> None:
    if control and control not in CONTROLS:
        raise ConfigError(f"control: expected one of {', '.join(CONTROLS)}, found {control!r}")
