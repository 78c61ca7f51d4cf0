"""qwen4: the per-layer embedding (PLE) of Qwen4-Exp, `qwen4_exp` in transformers 5.23.

A layer's number in the hash is its position among the memory layers. `ple_layer_ids` count the
model's layers from one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ...system.checks import as_int, as_ints
from ..layer import LayerSpec
from ..model_config import check_layers, first, largest_order, need
from .demo import INT64_MAX, LAYER_PRIME
from .primes import primes_from
from .record import COMMON_GGUF_FIELDS, Dialect, Fields, GgufNames, Release

if TYPE_CHECKING:
    from ..hash import HashSpec

_GAMMA = 0x9E3779B97F4A7C15
_UINT64 = 2**64 - 1


def _multipliers(spec: HashSpec, index: int) -> tuple[int, ...]:
    """splitmix64, seeded by the position of the layer."""
    bound = max(1, INT64_MAX // spec.vocab_size // 2)
    seed = spec.seed + LAYER_PRIME * index
    return tuple(_splitmix64(seed + _GAMMA * (i + 2)) % bound * 2 + 1 for i in range(spec.order))


def _splitmix64(value: int) -> int:
    z = value & _UINT64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _UINT64
    return z ^ (z >> 31)


def _primes(spec: HashSpec) -> tuple[tuple[int, ...], ...]:
    """Consecutive primes from rows_per_head on, through all heads of all layers."""
    primes = primes_from(spec.rows_per_head[0])
    return tuple(tuple(next(primes) for _ in range(spec.columns)) for _ in spec.layer_ids)


def _hash_arguments(fields: Fields) -> dict[str, Any]:
    counted_from_one = as_ints("ple_layer_ids", fields["ple_layer_ids"])
    check_layers("ple_layer_ids", counted_from_one, 1, fields)
    order = largest_order("ngram_size", fields.get("ngram_size", 3))
    return {
        "layer_ids": [layer - 1 for layer in sorted(set(counted_from_one))],
        "orders": range(2, order + 1),
        "heads": fields.get("heads_per_ngram", 8),
        "rows_per_head": fields.get("ngram_vocab_size_base", 20_000_000),
        "vocab_size": need(fields, "vocab_size"),
        "filler_id": first(need(fields, "eos_token_id")),
        "seed": fields.get("seed", 1234),
        "pad_to": fields.get("make_ngram_vocab_size_divisible_by", 128),
    }


def _layer_arguments(fields: Fields, columns: int) -> tuple[int, dict[str, Any]]:
    hidden = as_int("hidden_size", need(fields, "hidden_size", "dim"), 1)
    eps = need(fields, "rms_norm_eps", "norm_eps")
    width = fields.get("ple_embed_dim")
    width = hidden if width is None else as_int("ple_embed_dim", width, 1)
    if width % columns:
        raise ConfigError(
            f"ple_embed_dim: expected a multiple of the {columns} columns, found {width}"
        )
    return width // columns, {
        "hidden_size": hidden,
        "eps": eps,
        "streams": fields.get("hc_count", 4),
        "kernel": fields.get("ple_conv_kernel_size", 4),
    }


QWEN4 = Dialect(
    "qwen4",
    _multipliers,
    _primes,
    LayerSpec.qwen4,
    one_size=True,
    stops_at_filler=True,
    raw_ids=True,
    release=Release(
        title="Qwen4-Exp",
        marker="ple_layer_ids",
        hash_arguments=_hash_arguments,
        layer_arguments=_layer_arguments,
        field_names={
            "layer_ids": "ple_layer_ids, counted from 0",
            "orders": "ngram_size",
            "heads": "heads_per_ngram",
            "rows_per_head": "ngram_vocab_size_base",
            "vocab_size": "vocab_size",
            "filler_id": "eos_token_id",
            "seed": "seed",
            "pad_to": "make_ngram_vocab_size_divisible_by",
        },
        dim_name="ple_embed_dim over the columns",
        table="ple.ple_embedding.ngram_embedding",
        hash_tensors={
            "layer_multipliers": "multipliers",
            "ngram_heads_vocab_sizes": "primes",
            "ngram_heads_offsets": "offsets",
        },
        gguf=GgufNames(
            table="per_layer_token_embd.weight",
            fields={
                **COMMON_GGUF_FIELDS,
                "hc_count": ("hyper_connection_count",),
                "ple_layer_ids": ("ple_layers",),
                "ngram_size": ("ple_ngram_size",),
                "heads_per_ngram": ("ple_heads_per_ngram",),
                "ple_embed_dim": ("embedding_length_per_layer_input",),
                "ple_conv_kernel_size": ("ple_conv_kernel",),
                "eos_token_id": ("ple_eos_token_id",),
                "seed": ("ple_seed",),
                "ngram_vocab_size_base": ("ple_vocab_base",),
                "make_ngram_vocab_size_divisible_by": ("ple_vocab_divisor",),
            },
            constants={
                "multipliers": ("ple_layer_multipliers",),
                "primes": ("ple_head_vocab_sizes",),
                "offsets": ("ple_head_offsets",),
            },
            rows_field="ngram_vocab_size_base",
            rows_per_head=20_000_000,
            zero_based=("ple_layer_ids",),
            width_field="ple_embed_dim",
            width_of_all=True,
        ),
    ),
)
