"""What a model keeps of the tokens it has seen, so that decoding need not run them again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.state import SequenceState


class BlockCache:
    """What one attention layer keeps: keys and values, or the latents that they are made of.

    Attributes:
        kept: Tensors [B, P, ...] over the P tokens so far; None before the first.
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] | None = None

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Appends tensors [B, T, ...] of new tokens. Returns those of all tokens."""
        if self.kept is not None:
            new = tuple(torch.cat(pair, 1) for pair in zip(self.kept, new, strict=True))
        self.kept = new
        return new


class Cache:
    """The past of `batch` sequences of equal length. The caller keeps it; a forward extends it.

    Attributes:
        batch: Number of sequences.
        tokens: Tokens of each sequence so far.
        blocks: One BlockCache a block.
        memory: The memory's part: the last ids and conv inputs.
    """

    def __init__(self, batch: int, layers: int):
        self.batch = batch
        self.tokens = 0
        self.blocks = [BlockCache() for _ in range(layers)]
        self.memory = SequenceState(batch)

    def values(self) -> int:
        """Numbers kept by all blocks together, the memory's few aside."""
        kept = [tensor for block in self.blocks for tensor in block.kept or ()]
        return sum(tensor.numel() for tensor in kept)
