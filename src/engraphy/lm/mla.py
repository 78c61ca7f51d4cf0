"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, arXiv
2412.19437).

Keys and values of all heads are made from one latent a token, `kv_rank` wide. Positions cannot pass
through it, so a small part of each query and one key shared by all heads turn with the position. A
decoder keeps the latent and that key alone: 576 values a token and block in DeepSeek-V3, where keys
and values of its heads would be 32,768.

    c_q = norm(W_DQ x)             q = W_UQ c_q           for each head: plain part | turned part
    c | k_turned = W_DKV x         k | v = W_UKV norm(c)  for each head

Batches expand keys and values. A decoder does not: W_UK moves over to the query and W_UV to the
output, so that attention runs over the latents (section 2.1.2 of the first paper, "absorbed").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import BlockCache
from .config import MLAConfig
from .norm import RMSNorm
from .yarn import rotated


class LatentAttention(nn.Module):
    """Causal attention over latents.

    Args:
        hidden_size: D.
        heads: H.
        sizes: Ranks and widths.
        eps: Epsilon of the latents' norms.
        temperature: What the logits are multiplied by (yarn.temperature).
    """

    def __init__(
        self, hidden_size: int, heads: int, sizes: MLAConfig, eps: float, temperature: float = 1.0
    ):
        super().__init__()
        self.heads = heads
        self.sizes = sizes
        self.matrices = {"latent": (sizes.kv_rank, sizes.turned)}  # for Muon
        self.scale = temperature * (sizes.plain + sizes.turned) ** -0.5
        query_width = heads * (sizes.plain + sizes.turned)
        self.query_down = None
        self.query_norm = None
        if sizes.query_rank is not None:
            self.query_down = nn.Linear(hidden_size, sizes.query_rank, bias=False)
            self.query_norm = RMSNorm(sizes.query_rank, eps)
        self.query = nn.Linear(sizes.query_rank or hidden_size, query_width, bias=False)
        self.latent = nn.Linear(hidden_size, sizes.kv_rank + sizes.turned, bias=False)
        self.latent_norm = RMSNorm(sizes.kv_rank, eps)
        self.key_value = nn.Linear(sizes.kv_rank, heads * (sizes.plain + sizes.value), bias=False)
        self.out = nn.Linear(heads * sizes.value, hidden_size, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """Attention of T tokens to those before them.

        Args:
            x_BTD: Input.
            rotation: Complex [T, pairs], of these positions.
            mask: f32 [B or 1, 1, T, P + T], 0 or -inf; None = one document a row. Needed with a
                cache, which holds P tokens.
            cache: Is extended by the tokens; None = there are no earlier ones.

        Returns:
            [B, T, D].
        """
        sizes = self.sizes
        query_BTHQ = self._query(x_BTD).unflatten(-1, (self.heads, -1))
        plain_BTHQ, turned_BTHP = query_BTHQ.split([sizes.plain, sizes.turned], -1)
        turned_BTHP = rotated(turned_BTHP, rotation[:, None])
        latent_BTR, key_BTP = self.latent(x_BTD).split([sizes.kv_rank, sizes.turned], -1)
        key_BTP = rotated(key_BTP, rotation)
        latent_BTR = self.latent_norm(latent_BTR).to(key_BTP.dtype)
        plain_BTHQ = plain_BTHQ.to(key_BTP.dtype)
        if cache is None:
            out_BTHV = self._expanded(plain_BTHQ, turned_BTHP, latent_BTR, key_BTP, mask)
        else:
            latent_BSR, key_BSP = cache.extend(latent_BTR, key_BTP)
            out_BTHV = self._absorbed(plain_BTHQ, turned_BTHP, latent_BSR, key_BSP, mask)
        return self.out(out_BTHV.flatten(2))

    def _query(self, x_BTD: Tensor) -> Tensor:
        if self.query_down is None or self.query_norm is None:
            return self.query(x_BTD)
        return self.query(self.query_norm(self.query_down(x_BTD)))

    def _expanded(
        self,
        plain_BTHQ: Tensor,
        turned_BTHP: Tensor,
        latent_BTR: Tensor,
        key_BTP: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Keys and values of every head are made, then it is plain attention."""
        sizes = self.sizes
        both_BTHW = self.key_value(latent_BTR).unflatten(-1, (self.heads, -1)).to(key_BTP.dtype)
        own_BTHQ, value_BTHV = both_BTHW.split([sizes.plain, sizes.value], -1)
        shared_BTHP = key_BTP[:, :, None].expand_as(turned_BTHP)
        query = torch.cat([plain_BTHQ, turned_BTHP], -1)
        key = torch.cat([own_BTHQ, shared_BTHP], -1)
        heads_first = [part.transpose(1, 2) for part in (query, key, value_BTHV)]
        if mask is not None:
            mask = mask.to(query.dtype)
        out_BHTV = F.scaled_dot_product_attention(
            *heads_first, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return out_BHTV.transpose(1, 2)

    def _absorbed(
        self,
        plain_BTHQ: Tensor,
        turned_BTHP: Tensor,
        latent_BSR: Tensor,
        key_BSP: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The same attention over the latents of S tokens: no key or value of a head is made."""
        sizes = self.sizes
        weight_HWR = self.key_value.weight.unflatten(0, (self.heads, -1)).to(latent_BSR.dtype)
        key_HQR, value_HVR = weight_HWR.split([sizes.plain, sizes.value], 1)
        query_BTHR = torch.einsum("bthq,hqr->bthr", plain_BTHQ, key_HQR)
        logits_BHTS = torch.einsum("bthr,bsr->bhts", query_BTHR, latent_BSR)
        logits_BHTS = logits_BHTS + torch.einsum("bthp,bsp->bhts", turned_BTHP, key_BSP)
        logits_BHTS = logits_BHTS * self.scale
        if mask is not None:
            logits_BHTS = logits_BHTS + mask
        mixed_BTHR = torch.einsum("bhts,bsr->bthr", logits_BHTS.softmax(-1), latent_BSR)
        return torch.einsum("bthr,hvr->bthv", mixed_BTHR, value_HVR)
