"""A transformers model of a few thousand random weights with a tokenizer of its own, in a folder;
text for it, and a memory's config."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from engraphy import EngramConfig, EngramMemory
from engraphy.data.tokens import train_tokenizer

NAMES = [
    "Ada Lovelace",
    "Alan Turing",
    "Grace Hopper",
    "Emmy Noether",
    "Kurt Gödel",
    "Claude Shannon",
]
PLACES = ["London", "Princeton", "Vienna", "New York", "Erlangen", "Cambridge", "Zürich"]
WORK = [
    "wrote about engines",
    "studied machines that compute",
    "found a theorem on symmetry",
    "measured information",
]


def lives(count: int, seed: int = 0) -> list[str]:
    """Short biographies."""
    rng = random.Random(seed)
    return [
        f"{rng.choice(NAMES)} was born in {rng.choice(PLACES)} in {rng.randint(1780, 1920)}, "
        f"{rng.choice(WORK)}, and later {rng.choice(WORK)} in {rng.choice(PLACES)}."
        for _ in range(count)
    ]


def write_model(folder: Path, **sizes: float) -> Path:
    """Three layers of 32 values; its vocabulary has 8 ids more than its tokenizer. sizes: of a
    LlamaConfig."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(lives(200), 300),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 308,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
            **sizes,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_config(model: Any, rows_per_head: int = 101) -> EngramConfig:
    """A memory at two layers of a model, of a few thousand values."""
    return EngramConfig.for_model(
        model.config, layers=(1, 2), heads=2, rows_per_head=rows_per_head, dim=8
    )


def fill(memory: EngramMemory, seed: int = 3) -> EngramMemory:
    """Gives a memory weights and rows that say something, as training would; returns it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    memory.init_rows(1.0, seed)
    return memory
