"""The classes that vLLM runs: its own models with a memory in front of some of their layers."""

# pyright: reportMissingImports=false
from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ...errors import InputError
from ..folder import open_memory, read_folder
from ..served import ServedMemory, Step
from .slots import SlotsLayer


class _WithMemory(nn.Module):
    """Goes before a model's class. Between two forwards it holds nothing of a request."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = vllm_config.model_config
        memory = open_memory(read_folder(settings.model))
        self._served = ServedMemory(memory, vllm_config.device_config.device, settings.dtype)
        layers: Any = self.model.layers  # pyright: ignore[reportAttributeAccessIssue]
        self._slots = SlotsLayer(self._served, f"engraphy_slots.{len(layers)}", vllm_config)
        self._step: Step | None = None
        for layer in self._served.layers:
            layers[layer].register_forward_pre_hook(partial(self._fuse, layer))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """As the model's own. Requests the rows of all memory layers first."""
        if input_ids is None:
            raise InputError("a model with a memory: expected token ids, found embeddings alone")
        chunks = self._slots.chunks(input_ids)
        self._step = None if chunks is None else self._served.begin(chunks)
        try:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        finally:
            self._step = None

    def _fuse(self, layer: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of a layer, whose input is the sum of `hidden` and `residual`.

        The layer gets the sum as it would get the first hidden states. So the residual stream is
        added up in the order in which transformers does it.
        """
        if self._step is None:
            return None
        positions, hidden_ND, residual_ND = args
        x_ND = hidden_ND if residual_ND is None else hidden_ND + residual_ND
        return positions, self._step.fuse(layer, x_ND), None


class EngraphyLlamaForCausalLM(_WithMemory, LlamaForCausalLM):
    """Llama with a memory."""


class EngraphyQwen3ForCausalLM(_WithMemory, Qwen3ForCausalLM):
    """Qwen3 with a memory."""
