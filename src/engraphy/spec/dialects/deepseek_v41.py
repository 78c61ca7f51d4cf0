"""deepseek_v41: the DeepSeek-V4.1-Flash release. The demo's hash, one size for all orders.

Source: its config.json and inference/config.json, which name some fields differently.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...system.checks import as_int, as_ints
from ..layer import LayerSpec
from ..model_config import check_layers, largest_order, need
from . import demo
from .record import COMMON_GGUF_FIELDS, Dialect, Fields, GgufNames, Release


def _hash_arguments(fields: Fields) -> dict[str, Any]:
    layers = as_ints("engram_layer_ids", fields["engram_layer_ids"])
    check_layers("engram_layer_ids", layers, 0, fields)
    order = largest_order("engram_max_ngram_size", need(fields, "engram_max_ngram_size"))
    vocab_size = need(fields, "engram_compressed_vocab_size")
    compressed = as_int("engram_compressed_vocab_size", vocab_size)
    raw = fields.get("vocab_size")
    if raw is not None and compressed > as_int("vocab_size", raw):
        raise ConfigError(
            f"engram_compressed_vocab_size: expected at most vocab_size = {raw}, found {compressed}"
        )
    return {
        "layer_ids": layers,
        "orders": range(2, order + 1),
        "heads": need(fields, "engram_n_heads"),
        "rows_per_head": need(fields, "engram_vocab_size"),
        "vocab_size": compressed,
        "filler_id": need(fields, "engram_pad_token_id", "engram_pad_id"),
    }


def _layer_arguments(fields: Fields, columns: int) -> tuple[int, dict[str, Any]]:
    hidden = as_int("hidden_size", need(fields, "hidden_size", "dim"), 1)
    eps = need(fields, "rms_norm_eps", "norm_eps")
    dim = as_int("engram_head_dim", need(fields, "engram_head_dim"), 1)
    return dim, {"hidden_size": hidden, "eps": eps, "streams": need(fields, "hc_mult")}


DEEPSEEK_V41 = Dialect(
    "deepseek_v41",
    demo.multipliers,
    demo.primes,
    LayerSpec.deepseek_v41,
    one_size=True,
    release=Release(
        title="DeepSeek-V4.1",
        marker="engram_layer_ids",
        hash_arguments=_hash_arguments,
        layer_arguments=_layer_arguments,
        field_names={
            "layer_ids": "engram_layer_ids",
            "orders": "engram_max_ngram_size",
            "heads": "engram_n_heads",
            "rows_per_head": "engram_vocab_size",
            "vocab_size": "engram_compressed_vocab_size",
            "filler_id": "engram_pad_token_id",
        },
        dim_name="engram_head_dim",
        table="engram.embed",
        block_scales=True,
        row_counts="engram_num_embeddings",
        gguf=GgufNames(
            table="blk.{layer}.engram_embd.weight",
            fields={
                **COMMON_GGUF_FIELDS,
                "hc_mult": ("hyper_connection_count",),
                "engram_layer_ids": ("engram_layer_ids", "engram_layers"),
                "engram_max_ngram_size": ("engram_max_ngram_size", "engram_ngram_size"),
                "engram_n_heads": ("engram_head_count", "engram_n_heads"),
                "engram_head_dim": ("engram_key_length", "engram_head_dim"),
                "engram_compressed_vocab_size": ("engram_compressed_vocab_size",),
                "engram_pad_token_id": ("engram_pad_token_id",),
                "engram_num_embeddings": ("engram_rows", "engram_embedding_counts"),
            },
            constants={
                "multipliers": ("engram_multipliers", "engram_hash_multipliers"),
                "primes": ("engram_primes", "engram_hash_primes", "engram_head_bucket_sizes"),
                "offsets": ("engram_offsets", "engram_hash_offsets", "engram_head_offsets"),
                "token_map": ("engram_token_map",),
            },
            rows_field="engram_vocab_size",
            rows_per_head=16_000_000,
            compressed_filler=("engram_pad_id",),
            width_field="engram_head_dim",
        ),
    ),
)
