"""Memories that lack one thing: what a study compares a memory with, to learn what that thing does.

Each is the memory of an arm with one change; everything else is as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..addresses.hot import HotIndex
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
    """Lets half of the memory in, whatever the hidden state. Its key projection has no effect.

    Attributes:
        alpha: Share of the memory that is let in.
    """

    alpha = 0.5

    def gate(self, u_BTS: Tensor) -> Tensor:
        return torch.full_like(u_BTS, self.alpha)


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


class ChangedRows(EngramMemory):
    """In training the rows that were read are changed before they are used, not in the table."""

    def lookup(
        self,
        ids_BT: Tensor,
        state: SequenceState | None = None,
        live: Tensor | None = None,
        starts: Tensor | None = None,
        trace: Trace | None = None,
        **options: Any,
    ) -> Lookup:
        """As `EngramMemory.lookup`."""
        if not self.training:
            return super().lookup(ids_BT, state, live, starts, trace, **options)
        seen = Trace() if trace is None else trace
        lookup = super().lookup(ids_BT, state, live, starts, seen, **options)
        shape = (*ids_BT.shape, self.config.hash.columns, self.config.dim)
        heads = self.config.hash.heads
        hot_BTO = np.stack([seen.routes[order] for order in self.config.hash.orders], axis=-1)
        hot_BTC = torch.from_numpy(hot_BTO.repeat(heads, axis=-1))
        # Draws depend on the ids alone, so a run that is continued draws what it would have drawn.
        places = torch.arange(1, ids_BT.numel() + 1)
        generator = torch.Generator().manual_seed(int((ids_BT.flatten() * places).sum()))
        rows: dict[int, Tensor] = {}
        for layer in self.layers:
            read = lookup.rows[layer]
            rows[layer] = self.changed(read.view(shape), hot_BTC, generator).view_as(read)
        return dataclasses.replace(lookup, rows=rows, trace=trace)

    def changed(self, rows_BTCd: Tensor, hot_BTC: Tensor, generator: torch.Generator) -> Tensor:
        """The rows to use.

        Args:
            rows_BTCd: Rows as read.
            hot_BTC: bool, which of them are those of hot n-grams.
            generator: For what is random.
        """
        raise NotImplementedError


class NoisyRows(ChangedRows):
    """Rows of hot n-grams with normal noise, as a collision would add it.

    Attributes:
        noise: Standard deviation, as a share of the root mean square of the batch's hot rows.
    """

    noise = 0.0

    def changed(self, rows_BTCd: Tensor, hot_BTC: Tensor, generator: torch.Generator) -> Tensor:
        """As `ChangedRows.changed`."""
        hot_Nd = rows_BTCd.detach()[hot_BTC]
        if not hot_Nd.numel():
            return rows_BTCd
        std = self.noise * hot_Nd.square().mean().sqrt()
        noise_BTCd = torch.randn(rows_BTCd.shape, generator=generator)
        return rows_BTCd + noise_BTCd * std * hot_BTC[..., None]


class DroppedRows(ChangedRows):
    """Dropout of whole rows, hot or not.

    Attributes:
        dropout: Share of the rows that are not used; the others are scaled up.
    """

    dropout = 0.1

    def changed(self, rows_BTCd: Tensor, hot_BTC: Tensor, generator: torch.Generator) -> Tensor:
        """As `ChangedRows.changed`."""
        kept_BTC = torch.rand(hot_BTC.shape, generator=generator) >= self.dropout
        return rows_BTCd * (kept_BTC[..., None] / (1 - self.dropout))


def one_row(vocab: VocabMap) -> VocabMap:
    """A map that gives every token the same address: each head reads one row."""
    return VocabMap(np.zeros(vocab.raw_size, dtype=np.int64))


def make_memory(
    config: EngramConfig,
    vocab: VocabMap,
    std: float,
    seed: int,
    control: str = "",
    hot: HotIndex | None = None,
) -> EngramMemory:
    """A memory with rows in RAM, drawn from a seed.

    Args:
        config: Its sizes, for the vocabulary map that `hashed` returns.
        vocab: As `hashed` returns it.
        std: Standard deviation of the rows.
        seed: Seed of the rows.
        control: "" for the memory itself, or one of CONTROLS.
        hot: The index of n-grams that have rows of their own.

    Raises:
        ConfigError: The control is unknown.
    """
    _check(control)
    memory = _MEMORIES.get(control, EngramMemory)(config, vocab, hot=hot)
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


@contextmanager
def fixed_gate(memory: EngramMemory, alpha: float) -> Iterator[None]:
    """Runs a memory with one gate for all tokens, whatever it has learned.

    Args:
        memory: Whose layers have a learned gate.
        alpha: Share of the memory that is let in, 0 to 1.
    """
    own = dict(memory.blocks.items())
    try:
        for name, block in own.items():
            fixed = ConstantGate(memory.config.layer)
            fixed.alpha = alpha
            fixed.load_state_dict(block.state_dict())
            memory.blocks[name] = fixed
        yield
    finally:
        memory.blocks.update(own)


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
_MEMORIES: dict[str, type[EngramMemory]] = {
    "shuffled": ShuffledMemory,
    "noise": NoisyRows,
    "dropout": DroppedRows,
}
CONTROLS = ("one-row", "frozen", "uncompressed", *_MEMORIES, *_LAYERS)


def _check(control: str) -> None:
    if control and control not in CONTROLS:
        raise ConfigError(f"control: expected one of {', '.join(CONTROLS)}, found {control!r}")
