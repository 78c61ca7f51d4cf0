"""A tiny Qwen4-Exp model with a loud memory, and what it gives."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from engraphy import RowFormat
from engraphy.store import RamStore

EOS, PAD = 4, 0
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [2],
    "ple_embed_dim": 64,
    "heads_per_ngram": 4,
    "ngram_vocab_size_base": 211,
    "split_ngram_parts": 4,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}


def make(dtype=torch.float32, model_class=Qwen4ExpForCausalLM, **changes):
    """A tiny model whose memory is loud: fresh rows, gates and convolutions would hardly change a
    logit."""
    torch.manual_seed(1)
    model = model_class(Qwen4ExpTextConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ple." in name:
                parameter.normal_(std=0.5)
    return model.to(dtype)


def tables(model) -> dict[int, nn.Embedding]:
    return {
        ple.layer_idx: ple.ple_embedding.ngram_embedding
        for ple in model.modules()
        if type(ple).__name__ == "Qwen4ExpTextPLELayer"
    }


def ram_store(weight: torch.Tensor, fmt: RowFormat) -> RamStore:
    store = RamStore(len(weight), fmt.row_bytes)
    store.scatter(np.arange(len(weight)), fmt.encode(weight.detach().float().numpy()))
    return store


def batch():
    """Text with EOS inside, the first sequence padded on the left."""
    ids = torch.randint(5, 97, (3, 14), generator=torch.Generator().manual_seed(2))
    ids[1, 6] = ids[2, 13] = EOS
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model, **options) -> list[torch.Tensor]:
    """Logits of one forward, and tokens and logits of a generation with the cache."""
    with torch.no_grad():
        once = model(**batch()).logits
    # -1: no token ends a sequence, so every step is compared
    done = model.generate(
        **batch(),
        **{"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, **options},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return [once, done.sequences, *done.logits]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
