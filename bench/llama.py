"""A Llama of 135 M parameters with random weights, in the shape of SmolLM2-135M."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama_135m(**other: Any) -> tuple[Any, LlamaConfig]:
    """The model, the same in each call, and its config. other: fields that differ."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    config = LlamaConfig(**{**fields, **other})
    return LlamaForCausalLM(config), config
