"""Rotary positions (RoPE, arXiv 2104.09864), and YaRN, which stretches them to longer texts (arXiv
2309.00071).

A pair of values turns by an angle that grows with the position. Fast pairs tell near positions
apart and keep their rates; slow pairs, which never finish a turn within the trained length, turn
`factor` times slower. In between the share of the slower rate grows linearly (section 3.2).
Attention also becomes sharper by a temperature (section 3.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import YarnConfig


def rotary_rates(pairs: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Radians per position of each pair, f32 [pairs].

    Args:
        pairs: Half the width that turns.
        theta: Base: pair i turns by theta ** (-i / pairs).
        yarn: Stretches the rates; None, or a factor of 1, leaves them bit for bit.
    """
    rates = theta ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    if yarn is None:
        return rates
    return rates * (1 - _slowed(pairs, theta, yarn) * (1 - 1 / yarn.factor))


def rotary_table(tokens: int, pairs: int, theta: float, yarn: YarnConfig | None = None) -> Tensor:
    """Cosine and sine of each position and pair, f32 [tokens, pairs, 2]. See `rotary_rates`."""
    rates = rotary_rates(pairs, theta, yarn)
    angle = torch.arange(tokens, dtype=torch.float32)[:, None] * rates
    return torch.stack([angle.cos(), angle.sin()], -1)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x with its pairs of neighbours turned.

    Args:
        x: [..., 2 * pairs].
        rotation: Complex factors that broadcast to [..., pairs].

    Returns:
        As x, in f32, or in f64 if x is f64.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def temperature(yarn: YarnConfig | None) -> float:
    """What the logits of attention are multiplied by: 1 without YaRN.

    It is m ** 2 with m = 0.1 * mscale * ln(factor) + 1. The paper multiplies queries and keys by m
    (mscale 1). DeepSeek-V3 multiplies the logits by m ** 2, which is the same for heads that turn
    as a whole, and applies to the part that does not turn, too.
    """
    if yarn is None or yarn.factor <= 1:
        return 1.0
    return (0.1 * yarn.mscale * math.log(yarn.factor) + 1) ** 2


def _slowed(pairs: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Share of the slower rate for each pair, f32 [pairs], 0 to 1."""
    first = math.floor(_pair_of(yarn.fast_turns, pairs, theta, yarn.trained_tokens))
    last = math.ceil(_pair_of(yarn.slow_turns, pairs, theta, yarn.trained_tokens))
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = max(last - first, 1e-3)  # a step, if both are one pair
    return ((torch.arange(pairs, dtype=torch.float32) - first) / width).clamp(0, 1)


def _pair_of(turns: float, pairs: int, theta: float, tokens: int) -> float:
    """The pair, as a fraction, that turns this often within `tokens` positions."""
    return pairs * math.log(tokens / (turns * 2 * math.pi)) / math.log(theta)
