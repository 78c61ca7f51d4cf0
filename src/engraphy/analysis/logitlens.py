"""LogitLens: what each layer would predict if it were the last one (paper, section 5.1).

The hidden states after a layer go through the model's own final norm and LM head. How far the
layer is from the end is KL(layer || final) in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class LogitLens:
    """What the layers of a model predict.

    Attributes:
        kl_LBT: f64, KL(layer || final) in nats at each layer and token. 0 at the last layer.
        top_LBT: int64, the likeliest next token at each layer and token.
        before_memory: For each layer, whether its block runs before the first memory is added, so
            that the memory cannot have changed it.
    """

    kl_LBT: Tensor
    top_LBT: Tensor
    before_memory: tuple[bool, ...]

    def by_layer(self) -> list[float]:
        """Returns the mean over all tokens, for each layer."""
        return self.kl_LBT.flatten(1).mean(1).tolist()


def logit_lens(
    hidden: Sequence[Tensor],
    head: Callable[[Tensor], Tensor],
    memory_layers: Sequence[int] = (),
) -> LogitLens:
    """Reads every layer through the head.

    Args:
        hidden: The hidden states after each block, [B, T, ...] each.
        head: Final norm and LM head: hidden states -> logits [B, T, V].
        memory_layers: Layers with a memory, 0-based: it is added before the layer's block.

    Returns:
        KL and likeliest tokens, in float64.

    Raises:
        InputError: There are no layers.
    """
    if not hidden:
        raise InputError("hidden: expected the states of at least one layer, found none")
    final_BTV = _log_probabilities(hidden[-1], head)
    divergences, tops = [], []
    for state in hidden:
        log_BTV = _log_probabilities(state, head)
        divergences.append((log_BTV.exp() * (log_BTV - final_BTV)).sum(-1))
        tops.append(log_BTV.argmax(-1))
    marks = before_memory(len(hidden), memory_layers)
    return LogitLens(torch.stack(divergences), torch.stack(tops), marks)


def before_memory(depth: int, memory_layers: Sequence[int]) -> tuple[bool, ...]:
    """Marks the layers that no memory has touched.

    Args:
        depth: Number of layers.
        memory_layers: Layers with a memory, 0-based.

    Returns:
        One flag a layer; all False without a memory.
    """
    first = min(memory_layers, default=0)
    return tuple(layer < first for layer in range(depth))


def _log_probabilities(state: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    return head(state).double().log_softmax(-1)
