"""The classes that SGLang runs: its own Llama and Qwen3, with a memory in front of some blocks.

SGLANG_EXTERNAL_MODEL_PACKAGE=engraphy.engines.sglang finds them by `EntryClass`; the plugin
registers them otherwise.

SGLang keeps the sum of the blocks' outputs apart from what the last block added, and checks that a
block is given the very tensor that the one before it returned. So the update is added in place to
that tensor.
"""

# SGLang is not installed beside the tools that check types.
# pyright: reportMissingImports=false

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt import runtime_context
from sglang.srt.layers.layer_boundary.residual.batch import stream_of
from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from torch import Tensor, nn

from ...errors import InputError
from ...system.environment import METRICS
from ..folder import open_memory, read_folder
from ..metrics import serve_metrics
from ..served import ServedMemory, Step
from ..slots import slot_width
from .batches import chunks_of
from .refusals import SETTINGS, check_settings

# A mixin's methods call those of the classes that it is mixed into.
_Base = LlamaForCausalLM if TYPE_CHECKING else object


class _WithMemory(_Base):
    """What both classes have in common."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        """Raises ConfigError if SGLang's settings do not go with a memory; DigestMismatch if the
        parts of the directory do not belong together."""
        _check_settings()
        super().__init__(config, quant_config=quant_config, prefix=prefix)
        weight = self.model.embed_tokens.weight
        with torch.device("cpu"):
            memory = open_memory(read_folder(runtime_context.get_server_args().model_path))
        # Not a module of this one: SGLang loads, quantises and reloads the weights of those.
        self.served_memory = ServedMemory(memory, weight.device, weight.dtype)
        self._has_slots = False
        address = METRICS.given()
        if address is not None:
            serve_metrics(address, self.served_memory)
        for layer in self.served_memory.layers:
            self.model.layers[layer].register_forward_pre_hook(partial(_add_memory, layer))

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: Any,
        input_embeds: Tensor | None = None,
        get_embedding: bool = False,
        pp_proxy_tensors: Any = None,
    ) -> Any:
        """As that of the backbone; rows of all layers are requested first."""
        forward_batch.engraphy_step = self._begin(forward_batch)
        return super().forward(
            input_ids, positions, forward_batch, input_embeds, get_embedding, pp_proxy_tensors
        )

    def _begin(self, forward_batch: Any) -> Step | None:
        served = self.served_memory
        if not self._has_slots:
            _bind_slots(served)
            self._has_slots = True
        chunks = chunks_of(forward_batch, get_req_to_token_pool().req_to_token, served.past)
        if chunks is None:
            return None
        history_RP = forward_batch.engram_history
        if history_RP is None:
            raise InputError(
                "engram_history: expected the ids before each chunk from the plugin engraphy, "
                "found None; is it left out of SGLANG_PLUGINS?"
            )
        return served.begin(chunks, history_RP.numpy(force=True))


class EngraphyLlamaForCausalLM(_WithMemory, LlamaForCausalLM):
    """Llama with a memory."""


class EngraphyQwen3ForCausalLM(_WithMemory, Qwen3ForCausalLM):
    """Qwen3 with a memory."""


EntryClass = [EngraphyLlamaForCausalLM, EngraphyQwen3ForCausalLM]


def _add_memory(layer: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    """Adds the update of a layer to the hidden states that its block is about to be given."""
    _, hidden_ND, forward_batch = args[:3]
    step: Step | None = forward_batch.engraphy_step
    if step is None:
        return
    x_ND = stream_of(forward_batch).snapshot(hidden_ND)
    hidden_ND.add_(step.fuse(layer, x_ND).sub_(x_ND))


def _bind_slots(served: ServedMemory) -> None:
    """Makes room for every slot of the KV cache, which has one page more than it gives out."""
    pool = get_token_to_kv_pool()
    shape = (pool.size + pool.page_size, 1, slot_width(served.memory.config))
    served.bind(torch.empty(shape, dtype=torch.float32, device=pool.device))


def _check_settings() -> None:
    found = {}
    for setting in SETTINGS:
        function, *parts = setting.bag.split(".")
        bag = getattr(runtime_context, f"get_{function}")()
        found[setting.name] = attrgetter(".".join([*parts, setting.name]))(bag)
    check_settings(found, graphs=not cuda_graph_fully_disabled())
