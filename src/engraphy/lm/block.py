"""A block of the reference model: attention, then a feed-forward layer, each with its norm and its
residual connection."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import BlockCache
from .config import LMConfig
from .hyper import HyperConnection
from .mla import LatentAttention
from .moe import MoE, SwiGLU
from .norm import RMSNorm
from .yarn import temperature


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the ffn is an MoE in config.moe_layers. With
    several streams, hyper-connections stand where the two additions are."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        hidden = config.hidden_size
        self.attention_link = HyperConnection(hidden, config.streams, config.eps)
        self.attention_norm = RMSNorm(hidden, config.eps)
        self.attention: Attention | LatentAttention
        if config.mla is None:
            self.attention = Attention(config)
        else:
            self.attention = LatentAttention(
                hidden, config.heads, config.mla, config.eps, temperature(config.yarn)
            )
        self.ffn_link = HyperConnection(hidden, config.streams, config.eps)
        self.ffn_norm = RMSNorm(hidden, config.eps)
        self.ffn: MoE | SwiGLU
        if layer in config.moe_layers:
            self.ffn = MoE(
                hidden, config.experts, config.top_k, config.expert_ffn, config.shared_ffn
            )
        else:
            self.ffn = SwiGLU(hidden, config.ffn)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """x: [B, T, D]; with several streams [B, T, S, D]."""

        def attention(x_BTD: Tensor) -> Tensor:
            return self.attention(self.attention_norm(x_BTD), rotation, mask, cache)

        x = self.attention_link(x, attention)
        return self.ffn_link(x, lambda x_BTD: self.ffn(self.ffn_norm(x_BTD)))


class Attention(nn.Module):
    """Causal multi-head attention; query, key and value stand side by side in one weight."""

    matrices: ClassVar = {"qkv": 3}

    def __init__(self, config: LMConfig):
        super().__init__()
        self.heads = config.heads
        width = config.hidden_size // config.heads
        # None is torch's own: a seed then gives the weights that it always gave.
        self.scale = None if config.yarn is None else temperature(config.yarn) * width**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """mask: f32 [B or 1, 1, T, P + T], 0 or -inf; None = one document a row. Needed with a
        cache, which holds P tokens and is extended."""
        batch, tokens, hidden = x_BTD.shape
        # One multiplication over the contiguous projection, in which the values are multiplied by
        # one, is several times faster than slicing queries and keys out.
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        pairs = torch.view_as_complex(
            self.qkv(x_BTD).to(wide).view(batch, tokens, 3, self.heads, -1, 2)
        )
        heads = torch.view_as_real(pairs * rotation).flatten(-2)
        query, key, value = heads.unbind(2)
        if cache is not None:
            key, value = cache.extend(key, value)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if mask is not None:
            mask = mask.to(wide)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return self.out(out.transpose(1, 2).reshape(batch, tokens, hidden))
