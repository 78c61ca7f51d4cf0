"""What SGLang runs in each of its processes before anything else (entry point sglang.srt.plugins).

The ids before each chunk go through ForwardBatch.engram_history, a field that SGLang declares for
the memories of DeepSeek-V4.1: attributes that it does not declare are lost when it copies a batch.
"""

# SGLang is not installed beside the tools that check types.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from ..config import PREFIX, register_config
from .batches import ids_before

BACKBONES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
"""Class names of the backbones that are served with a memory."""
INIT_NEW = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
"""What makes the ForwardBatch of a forward."""


def register() -> None:
    """Registers the config, the classes of models.py, and the hook that notes earlier ids."""
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    register_config(BACKBONES)
    HookRegistry.register(INIT_NEW, note_history, HookType.AFTER)
    if PREFIX + BACKBONES[0] not in ModelRegistry.models:
        ModelRegistry.register(__package__)


def note_history(forward_batch: Any, _: type, batch: Any, model_runner: Any, **__: Any) -> None:
    """Fills engram_history of a new ForwardBatch, if the model has a memory of ours."""
    served = getattr(model_runner.model, "served_memory", None)
    if served is None or forward_batch.forward_mode.is_idle():
        return
    if forward_batch.forward_mode.is_decode():
        starts = (forward_batch.seq_lens.cpu() - 1).tolist()
    else:
        starts = batch.prefix_lens
    forward_batch.engram_history = ids_before(batch.reqs, starts, served.look_back)
