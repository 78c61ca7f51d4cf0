"""Fields of a model's config: read by name and checked, and what a released checkpoint's say about
its memory.

Knows the names that releases use and hands on arguments; spec.py makes specifications of them.
Sources: config.json and inference/config.json of DeepSeek-V4.1-Flash; `qwen4_exp` in transformers
5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..system.checks import as_int, as_ints

MOST_IDS = 1 << 28  # of a vocabulary: what a map of them takes is some memory, and not all of it


def config_fields(config: Any) -> Mapping[str, Any]:
    """The fields of a config (object or mapping), or of the `text_config` in it.

    Raises ConfigError for what has no fields.
    """
    if not isinstance(config, Mapping):
        aliases = getattr(
            config, "attribute_map", {}
        )  # transformers' common names for GPT-2's n_layer and the like
        config = (
            config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", None)
        )
        if config is not None:
            config = {name: config[own] for name, own in aliases.items() if own in config} | config
    if config is None:
        raise ConfigError("expected a model's config: a mapping or an object with fields")
    nested = config.get("text_config")
    try:
        return config if nested is None else config_fields(nested)
    except RecursionError:
        raise ConfigError(
            "expected a model's config, found text_config within text_config without an end"
        ) from None


def hash_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of HashSpec as a checkpoint's `ple_*` / `ngram_*` (Qwen) or `engram_*` fields
    (DeepSeek-V4.1) say.

    Raises ConfigError naming the field that is missing, that contradicts itself under two names, or
    cannot be meant.
    """
    if fields.get("ple_layer_ids"):
        return _qwen_hash(fields)
    if fields.get("engram_layer_ids"):
        return _deepseek_hash(fields)
    raise ConfigError(
        "expected a config with ple_layer_ids (Qwen4-Exp) or engram_layer_ids (DeepSeek-V4.1); "
        f"found neither among {len(fields)} fields"
    )


def layer_arguments(fields: Mapping[str, Any], columns: int) -> tuple[int, dict[str, Any]]:
    """d, and arguments of the dialect's LayerSpec besides width and order, for a memory of
    `columns` columns.

    Raises ConfigError like `hash_arguments`, and where the width is not a multiple of the columns.
    """
    hidden = as_int("hidden_size", need(fields, "hidden_size", "dim"), 1)
    sizes = {"hidden_size": hidden, "eps": need(fields, "rms_norm_eps", "norm_eps")}
    if fields.get("ple_layer_ids"):
        width = as_int(
            "ple_embed_dim",
            hidden if fields.get("ple_embed_dim") is None else fields["ple_embed_dim"],
            1,
        )
        if width % columns:
            raise ConfigError(
                f"ple_embed_dim: expected a multiple of the {columns} columns, found {width}"
            )
        sizes |= {
            "streams": fields.get("hc_count", 4),
            "kernel": fields.get("ple_conv_kernel_size", 4),
        }
        return width // columns, sizes
    return as_int("engram_head_dim", need(fields, "engram_head_dim"), 1), sizes | {
        "streams": need(fields, "hc_mult")
    }


def _qwen_hash(fields: Mapping[str, Any]) -> dict[str, Any]:
    counted_from_one = as_ints("ple_layer_ids", fields["ple_layer_ids"])
    _check_depth("ple_layer_ids", counted_from_one, 1, fields)
    order = _order("ngram_size", fields.get("ngram_size", 3))
    return {
        "dialect": "qwen4",
        "layer_ids": [layer - 1 for layer in sorted(set(counted_from_one))],
        "orders": range(2, order + 1),
        "heads": fields.get("heads_per_ngram", 8),
        "rows_per_head": fields.get("ngram_vocab_size_base", 20_000_000),
        "vocab_size": need(fields, "vocab_size"),
        "filler_id": first(need(fields, "eos_token_id")),
        "seed": fields.get("seed", 1234),
        "pad_to": fields.get("make_ngram_vocab_size_divisible_by", 128),
    }


def _deepseek_hash(fields: Mapping[str, Any]) -> dict[str, Any]:
    layers = as_ints("engram_layer_ids", fields["engram_layer_ids"])
    _check_depth("engram_layer_ids", layers, 0, fields)
    order = _order("engram_max_ngram_size", need(fields, "engram_max_ngram_size"))
    compressed = as_int(
        "engram_compressed_vocab_size", need(fields, "engram_compressed_vocab_size")
    )
    raw = fields.get("vocab_size")
    if raw is not None and compressed > as_int("vocab_size", raw):
        raise ConfigError(
            f"engram_compressed_vocab_size: expected at most vocab_size = {raw}, found {compressed}"
        )
    return {
        "dialect": "deepseek_v41",
        "layer_ids": layers,
        "orders": range(2, order + 1),
        "heads": need(fields, "engram_n_heads"),
        "rows_per_head": need(fields, "engram_vocab_size"),
        "vocab_size": compressed,
        "filler_id": need(fields, "engram_pad_token_id", "engram_pad_id"),
    }


def _order(name: str, value: Any) -> int:
    if not 2 <= (order := as_int(name, value)) <= 32:  # before a list is made of them
        raise ConfigError(f"{name}: expected the largest of the orders, 2 to 32, found {order}")
    return order


def _check_depth(name: str, layers: Sequence[int], lowest: int, fields: Mapping[str, Any]) -> None:
    """Raise ConfigError unless all layers, counted from `lowest`, are the model's, as far as its
    depth is told."""
    depths = [
        fields[key] for key in ("num_hidden_layers", "n_layers") if fields.get(key) is not None
    ]
    last = as_int("num_hidden_layers", depths[0], 1) + lowest - 1 if depths else max(layers)
    if min(layers) < lowest or max(layers) > last:
        raise ConfigError(f"{name}: expected {lowest} to {last}, found {list(layers)}")


def need(fields: Mapping[str, Any], *names: str) -> Any:
    """The value of a field, under whichever of its names the config has it.

    Raises ConfigError where it is missing, and where two names have different values.
    """
    found = {name: fields[name] for name in names if fields.get(name) is not None}
    if not found:
        raise ConfigError(f"the model's config has no {' or '.join(names)}")
    value = next(iter(found.values()))
    if any(other != value for other in found.values()):
        raise ConfigError(
            f"the model's config contradicts itself: expected one value, found {found}"
        )
    return value


def first(value: Any) -> Any:
    """A value, or the first one of a list; None of an empty one."""
    return (value[0] if value else None) if isinstance(value, (list, tuple)) else value
