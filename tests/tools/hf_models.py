"""Tiny models with random weights, one of each family that the decoding matrix runs, bare and with
a memory awake."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers as tf
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v4 import modeling_deepseek_v4

import engraphy
from engraphy import EngramMemory
from tests.tools.tiny_model import small_config

VOCAB, PAD = 97, 0
# What models call their cache.
CACHE = "cache" if Version(tf.__version__) >= Version("5.24") else "past_key_values"
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    max_position_embeddings=64,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,  # no end: every text gets its full length
    initializer_range=0.2,  # attention far from uniform
)
_SIZES: dict[str, Any] = _COMMON | dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_MOE: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=24)
# DeepSeek's attention.
_LATENT: dict[str, Any] = dict(q_lora_rank=16, qk_rope_head_dim=8, n_routed_experts=4)

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_SIZES),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, head_dim=8),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_SIZES, **_MOE, head_dim=8, num_experts=4),
    "mistral": lambda: tf.MistralConfig(**_SIZES, sliding_window=8),
    "mixtral": lambda: tf.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_SIZES,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": lambda: tf.GPT2Config(**_COMMON, n_embd=32, n_layer=3, n_head=4),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"}
    ),
    "olmoe": lambda: tf.OlmoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2),
    "phi3": lambda: tf.Phi3Config(**_SIZES),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_SIZES,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **(_SIZES | _MOE | _LATENT | dict(num_key_value_heads=4)),
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
    ),
    "smollm3": lambda: tf.SmolLM3Config(**_SIZES),
    "granite": lambda: tf.GraniteConfig(**_SIZES),
    "deepseek_v4": lambda: tf.DeepseekV4Config(
        **(_SIZES | _MOE | _LATENT | dict(num_key_value_heads=1)),
        hc_mult=4,
        hc_sinkhorn_iters=2,
        head_dim=16,
        o_lora_rank=16,
        o_groups=2,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=8,
        sliding_window=8,
        layer_types=[
            "heavily_compressed_attention",
            "sliding_attention",
            "compressed_sparse_attention",
        ],
        compress_rates={"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        mlp_layer_types=["hash_moe", "moe", "moe"],
    ),
}


if CACHE == "cache":  # before 5.24 its blocks get no keywords
    FAMILIES["gptj"] = lambda: tf.GPTJConfig(
        **_COMMON, n_embd=32, n_layer=3, n_head=4, rotary_dim=4
    )


@dataclass(frozen=True)
class Run:
    """A model to decode with, and two to draft for it.

    draft: a small one without a memory. twin: nearly the same model, with a memory of its own if
    `model` has one, so that some of its drafts are taken and some are not.
    """

    model: Any
    draft: Any
    twin: Any


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The family's model in eval mode, the same one at each call."""
    torch.manual_seed(0)
    config = FAMILIES[name]()
    config._experts_implementation = "eager"  # the grouped kernels of experts know no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()
    # Random weights are never confident.
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


class _Doubled:
    """The module torch, with float64 for float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def all_in_float64() -> Iterator[None]:
    """The DeepSeeks compute some things in float32, whatever their dtype. In this block these are
    computed in float64 if the dtype is float64."""
    narrow = torch.Tensor.float

    def as_wide(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype is torch.float64 else narrow(self, *args, **kwargs)

    with ExitStack() as patches:
        for module in (modeling_deepseek_v3, modeling_deepseek_v4):
            patches.enter_context(mock.patch.object(module, "torch", _Doubled()))
        patches.enter_context(mock.patch.object(torch.Tensor, "float", as_wide))
        yield


def cached(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    return getattr(output, CACHE)


def wake(memory: EngramMemory, seed: int = 5) -> EngramMemory:
    """Give a memory weights and rows as after training: the projections, the gate, the conv and the
    rows all take part. Rows that cannot be written stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    if all(store.info.writable for store in memory.stores.values()):
        memory.init_rows(1.0, 3)
    return memory


def with_memory(model: Any) -> Any:
    """The model, with a memory attached at two of its layers and woken."""
    wake(engraphy.attach(model, small_config(model)))
    return model


def answers(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of the model [B, T + 4, vocab]: of a forward over ids, and of 4 tokens after them."""
    text = model.generate(
        ids_BT,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat([model(ids_BT).logits, torch.stack(text.logits, 1)], 1)


@functools.cache
def run_of(name: str, dtype: torch.dtype, memory: bool) -> Run:
    """The models that the matrix decodes with. Its tests share them, and change none."""
    model, twin = build(name, dtype), build(name, dtype)
    if memory:
        with_memory(model)
        with_memory(twin)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for parameter in twin.get_output_embeddings().parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    return Run(model, build("llama", dtype), twin)
