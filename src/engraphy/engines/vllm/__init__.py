"""Memories inside vLLM: a plugin that makes vLLM serve a model saved with its memory.

    python -m vllm.entrypoints.openai.api_server --model FOLDER

vLLM calls `register` in each of its processes (entry point vllm.general_plugins).
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging

from ..config import PREFIX, register_config

BACKBONES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
"""Class names of the backbones that are served with a memory."""


def register() -> None:
    """Tells vLLM how to read the config of such a folder, and which class runs it."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .checks import MemoryModelConfig

    _log_as_vllm_does()
    register_config(BACKBONES)
    for backbone in BACKBONES:
        name = PREFIX + backbone
        # By name, since a class would import torch and CUDA before vLLM has forked.
        ModelRegistry.register_model(name, f"engraphy.engines.vllm.model:{name}")
        MODELS_CONFIG_MAP[name] = MemoryModelConfig


def _log_as_vllm_does() -> None:
    """Our lines go where vLLM's go, unless the program has arranged something else."""
    ours, theirs = logging.getLogger("engraphy"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
