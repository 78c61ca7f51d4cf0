"""The reference language model: a small decoder that takes a memory. It is written to be read, and
to train on a CPU core.

Pre-norm blocks of causal attention with rotary positions and SwiGLU or MoE. Attention is plain or
latent (mla.py), and there is one residual stream, or several joined by hyper-connections
(hyper.py): the paper's models are sizes of this one (configs.py). Documents packed into one row
never see each other. The memory of a block comes before its attention (paper, section 2.3) and
acts on each stream through a gate of its own. The model knows nothing of data, optimisers or
stores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.packing import IGNORED
from ..errors import ConfigError, InputError
from .block import Block
from .cache import Cache
from .config import LMConfig
from .cross_entropy import mean_cross_entropy, token_cross_entropy
from .moe import MoE, compute_dtype
from .norm import RMSNorm
from .yarn import rotary_table

if TYPE_CHECKING:
    from ..memory.memory import EngramMemory, Trace


class LM(nn.Module):
    """A decoder over token ids.

    Args:
        config: Its sizes.
        memory: For layers of this model, with as many streams; None = no memory.

    Raises:
        ConfigError: The memory has another width or map, other streams, or layers that are not in
            the model.
    """

    matrices: ClassVar = {"head": 0}
    memory: EngramMemory | None
    rotation: Tensor

    def __init__(self, config: LMConfig, memory: EngramMemory | None = None):
        super().__init__()
        if memory is not None:
            _check_memory(config, memory)
        self.config = config
        self.memory = memory
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("rotation", _rotation(config), persistent=False)
        self._init_weights()

    def forward(
        self,
        ids_BT: Tensor,
        starts_BT: Tensor | None = None,
        *,
        cache: Cache | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Logits of a batch.

        Args:
            ids_BT: int64 token ids.
            starts_BT: bool, True where a document begins. Attention, hash and conv do not look back
                across it; rotary positions run on, since only their differences matter. None = one
                document a row.
            cache: The tokens before these, from `new_cache`; it is extended by them. None = there
                are none. One document a row, so no starts.
            trace: Is filled with what the memory does.

        Returns:
            [B, T, V].

        Raises:
            InputError: Ids are out of range, rows are longer than max_tokens, or a shape or dtype
                is wrong.
        """
        x_BTD = self._hidden(ids_BT, starts_BT, trace, cache)
        return F.linear(x_BTD, self._head_weight)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, T, V] if a block were the last one (LogitLens).

        Args:
            x: What the block returned: [B, T, D], with several streams [B, T, S, D].
        """
        return F.linear(self._merged(x), self._head_weight)

    def new_cache(self, batch: int = 1) -> Cache:
        """An empty cache for `batch` sequences, to decode them token by token or in chunks."""
        return Cache(batch, self.config.layers)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        """Mean cross entropy in nats over the targets, int64 [B, T], that are not IGNORED (-100).
        Raises InputError as `forward` does, and for invalid targets."""
        return mean_cross_entropy(*self._head_inputs(ids_BT, targets_BT, starts_BT))

    def token_losses(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        starts_BT: Tensor | None = None,
        *,
        trace: Trace | None = None,
    ) -> Tensor:
        """Cross entropy of each target in nats, f32 [B, T], without a gradient; 0 where the target
        is IGNORED (-100). trace: as in `forward`. Raises InputError as `loss` does."""
        with torch.no_grad():
            losses_N = token_cross_entropy(*self._head_inputs(ids_BT, targets_BT, starts_BT, trace))
        return losses_N.view_as(targets_BT)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop_id: int | None = None,
    ) -> list[int]:
        """Ids that continue a prompt.

        Each step runs the new ids alone, over a cache, up to max_tokens ids; beyond them it runs
        the last max_tokens ids again.

        Args:
            prompt_ids: At least one id.
            max_new_tokens: Most ids to return.
            temperature: 0 = take the likeliest id each time.
            top_k: Sample from the likeliest top_k ids; None = from all.
            seed: Seed of the samples.
            stop_id: Generation stops before it.

        Raises:
            InputError: The prompt is empty, temperature is below 0, or top_k is below 1.
        """
        if not prompt_ids:
            raise InputError("prompt_ids: expected at least one id, found none")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise InputError(
                "expected a temperature from 0 and a top_k from 1 on, "
                f"found {temperature} and {top_k}"
            )
        ids = list(prompt_ids)
        device = self.embed.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        cache = self.new_cache()
        for _ in range(max_new_tokens):
            fits = len(ids) <= self.config.max_tokens
            row = ids[cache.tokens :] if fits else ids[-self.config.max_tokens :]
            row_1T = torch.tensor([row], device=device)
            logits_V = self(row_1T, cache=cache if fits else None)[0, -1].float()
            if temperature > 0:
                next_id = _sample(logits_V, temperature, top_k, generator)
            else:
                next_id = int(logits_V.argmax())
            if next_id == stop_id:
                break
            ids.append(next_id)
        return ids[len(prompt_ids) :]

    def rebalance(self) -> None:
        """Moves the balancing bias of every mixture of experts. Call it once an optimiser step."""
        for block in self.blocks:
            if isinstance(block.ffn, MoE):
                block.ffn.rebalance()

    def max_load(self) -> float | None:
        """Load of the busiest expert over the mean load, in the last training step; None without
        experts, or before the first step."""
        highest: float | None = None
        for module in self.modules():
            if isinstance(module, MoE) and module.load is not None:
                load = float(module.load.max() / module.load.float().mean())
                highest = load if highest is None else max(highest, load)
        return highest

    @property
    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _hidden(
        self,
        ids_BT: Tensor,
        starts_BT: Tensor | None,
        trace: Trace | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Input of the head, [B, T, D]."""
        past = 0 if cache is None else cache.tokens
        self._check(ids_BT, starts_BT, trace, cache)
        tokens = ids_BT.shape[1]
        mask = None if starts_BT is None else _document_mask(starts_BT)
        if cache is not None:
            mask = _later_mask(past, tokens, ids_BT.device)
        lookup = None
        if self.memory is not None:
            state = None if cache is None else cache.memory
            lookup = self.memory.lookup(ids_BT, state, starts=starts_BT, trace=trace)
        rotation = torch.view_as_complex(self.rotation[past : past + tokens].float())
        x = self.embed(ids_BT)  # [B, T, D]; with several streams [B, T, S, D]
        if self.config.streams > 1:
            x = x[:, :, None].expand(-1, -1, self.config.streams, -1)
        for layer, block in enumerate(self.blocks):
            if self.memory is not None and lookup is not None and layer in self.memory.layers:
                x = self.memory.fuse(layer, x, lookup)
            x = block(x, rotation, mask, None if cache is None else cache.blocks[layer])
        if cache is not None:
            cache.tokens += tokens
        return self._merged(x)

    def _merged(self, x: Tensor) -> Tensor:
        """Input of the head, [B, T, D], from the residual streams."""
        return self.norm(x if self.config.streams == 1 else x.mean(2))

    def _head_inputs(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        starts_BT: Tensor | None,
        trace: Trace | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D], head [V, D] in the dtype to compute in, targets [N]."""
        if targets_BT.dtype != torch.int64 or targets_BT.shape != ids_BT.shape:
            raise InputError(
                f"targets: expected int64 {list(ids_BT.shape)}, "
                f"found {targets_BT.dtype} {list(targets_BT.shape)}"
            )
        size = self.config.vocab_size
        negative = (targets_BT < 0) & (targets_BT != IGNORED)
        invalid = targets_BT[negative | (targets_BT >= size)]
        if len(invalid):
            raise InputError(
                f"targets: expected 0 to {size - 1} or {IGNORED}, found {int(invalid[0])}"
            )
        x_BTD = self._hidden(ids_BT, starts_BT, trace)
        dtype = compute_dtype(x_BTD)
        return x_BTD.flatten(0, 1).to(dtype), self._head_weight.to(dtype), targets_BT.flatten()

    def _check(
        self,
        ids_BT: Tensor,
        starts_BT: Tensor | None,
        trace: Trace | None,
        cache: Cache | None,
    ) -> None:
        """Raises InputError for arguments of `forward` that are invalid."""
        longest = self.config.max_tokens
        rows = ids_BT.dtype == torch.int64 and ids_BT.ndim == 2
        if not rows or not 1 <= ids_BT.shape[1] <= longest:
            raise InputError(
                f"ids: expected int64 [B, T] of 1 to {longest} tokens, "
                f"found {ids_BT.dtype} {list(ids_BT.shape)}"
            )
        low, high = (int(value) for value in ids_BT.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"ids: expected 0 to {self.config.vocab_size - 1}, found {low} to {high}"
            )
        if starts_BT is not None and (
            starts_BT.dtype != torch.bool or starts_BT.shape != ids_BT.shape
        ):
            raise InputError(
                f"starts: expected bool {list(ids_BT.shape)}, "
                f"found {starts_BT.dtype} {list(starts_BT.shape)}"
            )
        if trace is not None and self.memory is None:
            raise InputError("trace: expected a model with a memory")
        if cache is None:
            return
        if starts_BT is not None:
            raise InputError("starts: expected None with a cache, which holds one document a row")
        room = self.config.max_tokens - cache.tokens
        if len(ids_BT) != cache.batch or ids_BT.shape[1] > room:
            raise InputError(
                f"ids: expected {cache.batch} sequences, as in the cache, and at most {room} more "
                f"tokens, found {list(ids_BT.shape)}"
            )

    def _init_weights(self) -> None:
        """Matrices keep the scale of their input; those that write to the residual stream start
        smaller with depth.

        An embedding that is not the head has unit variance: at D ** -0.5 the demo's loss was 0.27
        nats higher after 200 steps; at 0.5 and at 2 it was the same.
        """
        depth = (2 * self.config.layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim < 2 or name.startswith("memory."):
                continue
            scale = depth if name.endswith((".out.weight", ".down.weight", ".down")) else 1.0
            # Axis 1 is what a weight reads, in all of them.
            nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)
        if self.head is not None:
            nn.init.normal_(self.embed.weight)


def _rotation(config: LMConfig) -> Tensor:
    """Rotary factors, f32 [max_tokens, pairs, 2]; for plain attention [max_tokens, 3, 1, pairs, 2]:
    of query and key, and 1 for the value."""
    turned = rotary_table(config.max_tokens, config.rotary_pairs, config.rope_theta, config.yarn)
    if config.mla is not None:
        return turned
    fixed = torch.zeros_like(turned)
    fixed[..., 0] = 1
    return torch.stack([turned, turned, fixed], 1)[:, :, None]


def _sample(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """An id drawn from the likeliest top_k. Changes the logits."""
    if top_k is not None and top_k < len(logits_V):
        logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -math.inf
    p_V = (logits_V / temperature).softmax(-1)
    return int(torch.multinomial(p_V, 1, generator=generator))


def _document_mask(starts_BT: Tensor) -> Tensor:
    """f32 [B, 1, T, T]: 0 for positions that may be looked at (same document, not later), else
    -inf."""
    document_BT = starts_BT.cumsum(1)
    same = document_BT[:, :, None] == document_BT[:, None, :]
    allowed = same & torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
    return torch.zeros(same.shape, device=same.device).masked_fill_(~allowed, -math.inf)[:, None]


def _later_mask(past: int, tokens: int, device: torch.device) -> Tensor:
    """f32 [1, 1, T, past + T]: 0 up to each token itself, -inf for later ones."""
    mask = torch.full((tokens, past + tokens), -math.inf, device=device)
    return mask.triu_(past + 1)[None, None]


def _check_memory(config: LMConfig, memory: EngramMemory) -> None:
    layer = memory.config.layer
    if (layer.hidden_size, layer.streams) != (config.hidden_size, config.streams):
        raise ConfigError(
            f"memory: expected hidden_size {config.hidden_size} and streams {config.streams}, "
            f"found {layer.hidden_size} and {layer.streams}"
        )
    if memory.vocab.raw_size != config.vocab_size:
        raise ConfigError(
            f"memory: expected a map of the model's {config.vocab_size} ids, "
            f"found one of {memory.vocab.raw_size}"
        )
    if not set(memory.layers) <= set(range(config.layers)):
        raise ConfigError(
            f"memory: expected layers of 0 to {config.layers - 1}, found {list(memory.layers)}"
        )
