"""The slots of a memory as a layer of vLLM's KV cache.

To vLLM it is an attention layer that caches a line of values for each token and attends to nothing,
as vLLM's own CacheOnlyAttentionLayer. So vLLM allocates the slots within its budget for the KV
cache, and gives, frees, shares and preempts them with the keys and values of the same tokens.
For each forward it says where the chunks of the requests begin, and which blocks the requests have.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from ..chunks import Chunks, past_slots
from ..served import ServedMemory
from ..slots import slot_width


@dataclass(frozen=True)
class SlotsMetadata(AttentionMetadata):
    """Where the tokens of a forward belong.

    Attributes:
        bounds: int64 [R + 1], where each request's tokens begin, and their number.
        lengths: int64 [R], tokens of each request before its chunk.
        blocks_RM: int [R, M], the KV blocks of each request.
        slots_N: int64 [N], the slot of each token.
        block_size: Slots of a block.
    """

    bounds: np.ndarray
    lengths: np.ndarray
    blocks_RM: np.ndarray
    slots_N: np.ndarray
    block_size: int


class SlotsBuilder(AttentionMetadataBuilder[SlotsMetadata]):
    """Makes the metadata of a forward."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> SlotsMetadata:
        """From what vLLM says about all requests; those without a token are padding."""
        common = common_attn_metadata
        bounds = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        chunks = np.diff(bounds)
        real = np.flatnonzero(chunks)
        ends = common.seq_lens[: common.num_reqs].numpy(force=True).astype(np.int64)
        return SlotsMetadata(
            bounds=np.concatenate([bounds[:1], bounds[1:][real]]),
            lengths=(ends - chunks)[real],
            blocks_RM=common.block_table_tensor[: common.num_reqs].numpy(force=True)[real],
            slots_N=common.slot_mapping[: bounds[-1]].numpy(force=True).astype(np.int64),
            block_size=self.kv_cache_spec.block_size,
        )


class SlotsBackend(AttentionBackend):
    """Caches and attends to nothing."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "MEMORY_SLOTS"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError  # what vLLM expects of a backend that computes nothing

    @staticmethod
    def get_builder_cls() -> type[SlotsBuilder]:
        return SlotsBuilder


class SlotsLayer(nn.Module, AttentionLayerBase):
    """The layer. It has no parameters."""

    def __init__(self, served: ServedMemory, name: str, vllm_config: Any) -> None:
        """Args:
        served: The memory whose slots these are.
        name: Of the layer, with one number that no other layer has.
        vllm_config: vLLM's settings, in which it is registered.
        """
        super().__init__()
        self.name = name
        self.kv_cache = torch.tensor([])
        self._served = served
        vllm_config.compilation_config.static_forward_context[name] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Takes the tensor [blocks, 1, lines of a block, values]."""
        super().bind_kv_cache(kv_cache)
        self._served.bind(kv_cache[:, 0])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SlotsBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> MLAAttentionSpec:
        """One value vector a token, as for latent attention."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=slot_width(self._served.memory.config),
            dtype=torch.float32,
        )

    def chunks(self, ids_N: Tensor) -> Chunks | None:
        """The chunks of the running forward; None in a forward without requests (profiling).

        Args:
            ids_N: Token ids, maybe with padding behind the last request.
        """
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:
            return None
        found: SlotsMetadata = metadata[self.name]
        past_RP = past_slots(found.blocks_RM, found.block_size, found.lengths, self._served.past)
        return Chunks(ids_N[: found.bounds[-1]], found.bounds, found.slots_N, past_RP)
