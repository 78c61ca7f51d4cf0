"""A model as the analyses read it: forwards with and without its memory, and its own head.

The head is the model itself with all of its blocks skipped: whatever comes after the last block
(the merge of streams, the final norm, the LM head, a soft cap) is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..addresses.addresser import Addresser
from ..memory.lookup import Trace
from ..memory.recording import recorded

Head = Callable[[Tensor], Tensor]
"""Hidden states [B, T, ...] after some block -> logits [B, T, V]."""


@dataclass(frozen=True)
class Subject:
    """A model with a memory, in eval mode.

    Attributes:
        blocks: Its blocks in order; each returns the hidden states.
        layers: The layers that have a memory, 0-based.
        addresser: Token ids -> row ids of the memory.
        forward: Takes ids [B, T] and a Trace to fill, or None; returns logits [B, T, V].
        without: `with without():` runs forwards without the memory.
    """

    blocks: Sequence[nn.Module]
    layers: tuple[int, ...]
    addresser: Addresser
    forward: Callable[[Tensor, Trace | None], Tensor]
    without: Callable[[], AbstractContextManager[Any]]

    @torch.no_grad()
    def read(self, ids_BT: Tensor) -> tuple[Tensor, Trace]:
        """Logits of a forward with the memory, and all that a Trace records of it."""
        trace = Trace(states=True)
        with recorded(self.blocks, trace):
            logits_BTV = self.forward(ids_BT, trace)
        return logits_BTV, trace

    @torch.no_grad()
    def read_without(self, ids_BT: Tensor) -> tuple[Tensor, Trace]:
        """The same of a forward without the memory: the Trace has hidden states alone."""
        trace = Trace(states=True)
        with recorded(self.blocks, trace), self.without():
            logits_BTV = self.forward(ids_BT, None)
        return logits_BTV, trace

    def head(self, ids_BT: Tensor) -> Head:
        """The model's final norm and LM head, for hidden states of the shape of these ids."""

        @torch.no_grad()
        def logits_of(hidden: Tensor) -> Tensor:
            with self.without(), _answering(self.blocks, hidden):
                return self.forward(ids_BT, None)

        return logits_of


@contextmanager
def _answering(blocks: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Every block returns `hidden`, and computes nothing."""

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        return hidden

    # A forward of the instance's own may be a hook's of accelerate: it comes back afterwards.
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            object.__setattr__(block, "forward", answer)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            object.__delattr__(block, "forward")
            if forward is not None:
                object.__setattr__(block, "forward", forward)
