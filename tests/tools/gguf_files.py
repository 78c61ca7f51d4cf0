"""GGUF files as forks of llama.cpp write them, made by the `gguf` package, with small tables.

Blocks of kinds that the package cannot quantise are drawn at random, with finite scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig
from tests.tools.releases import QWEN, V41, tokenizer

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "iq4_nl": gguf.GGMLQuantizationType.IQ4_NL,
    "mxfp4": gguf.GGMLQuantizationType.MXFP4,
    "q2_k": gguf.GGMLQuantizationType.Q2_K,
    "q3_k": gguf.GGMLQuantizationType.Q3_K,
    "q4_k": gguf.GGMLQuantizationType.Q4_K,
    "q5_k": gguf.GGMLQuantizationType.Q5_K,
}
BLOCK_KINDS = ("q8_0", "q4_0", "iq4_nl", "mxfp4", "q2_k", "q3_k", "q4_k", "q5_k")
# Where the f16 scales of a block lie.
HALVES = {
    "q8_0": (0,),
    "q4_0": (0,),
    "iq4_nl": (0,),
    "mxfp4": (),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
}
# d of a row is that of the release for kinds with blocks of 256.
V41_WIDE: Mapping[str, Any] = {**V41, "engram_head_dim": 256}
QWEN_WIDE: Mapping[str, Any] = {**QWEN, "ple_embed_dim": 640}  # 160 for each of 4 columns


def drawn_rows(kind: str, count: int, d: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, row_bytes]: any codes, and finite scales of either sign, some subnormal."""
    rng = np.random.default_rng(seed)
    fmt = RowFormat(kind, d)
    if kind not in HALVES:
        return fmt.encode(rng.standard_normal((count, d)).astype(np.float32))
    values, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    blocks = rng.integers(0, 256, (count * d // values, size), np.uint8)
    for at in HALVES[kind]:
        scales = rng.standard_normal(len(blocks)) * 10.0 ** rng.integers(-8, 4, len(blocks))
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == "mxfp4":
        blocks[:, 0] = rng.integers(0, 252, len(blocks))
    return blocks.reshape(count, fmt.row_bytes)


def oracle(kind: str, raw_NR: np.ndarray) -> np.ndarray:
    """float32 [N, d]: what the `gguf` package makes of rows."""
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw_NR, TYPES[kind])


@dataclass(frozen=True)
class Spelling:
    """How a fork names things. Every key is below the architecture's name.

    Attributes:
        arch: The architecture.
        keys: Field of config.json -> key; a field that is missing here is not written.
        constants: multipliers, primes, offsets, token_map -> key.
        table: Name of a layer's tensor; has {layer}, or not.
        as_tensors: Constants are tensors instead of metadata.
    """

    arch: str
    keys: Mapping[str, str]
    constants: Mapping[str, str]
    table: str
    as_tensors: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


DEEPSEEK = Spelling(
    "deepseek41",
    {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "hc_mult": "hyper_connection.count",
        "engram_layer_ids": "engram.layer_ids",
        "engram_n_heads": "engram.head_count",
        "engram_head_dim": "engram.key_length",
        "engram_max_ngram_size": "engram.max_ngram_size",
        "engram_pad_token_id": "engram.pad_id",
    },
    {
        "multipliers": "engram.multipliers",
        "primes": "engram.primes",
        "offsets": "engram.offsets",
        "token_map": "engram.token_map",
    },
    "blk.{layer}.engram_embd.weight",
)
QWEN4 = Spelling(
    "qwen4exp",
    {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "hc_count": "hyper_connection.count",
        "ple_layer_ids": "ple.layers",
        "ngram_size": "ple.ngram_size",
        "heads_per_ngram": "ple.heads_per_ngram",
        "ple_conv_kernel_size": "ple.conv_kernel",
        "eos_token_id": "ple.eos_token_id",
    },
    {
        "multipliers": "ple.layer_multipliers",
        "primes": "ple.head_vocab_sizes",
        "offsets": "ple.head_offsets",
    },
    "per_layer_token_embd.weight",
)


def token_map() -> np.ndarray:
    from engraphy.addresses.vocab import VocabMap

    return VocabMap.from_tokenizer(tokenizer()).table


def rows_of(kind: str, config: Mapping[str, Any], seed: int = 0) -> dict[int, np.ndarray]:
    """uint8 [rows, row_bytes] for each layer of a config."""
    memory = EngramConfig.from_hf(dict(config))
    return {
        layer: drawn_rows(kind, memory.hash.row_count(layer), memory.dim, seed + layer)
        for layer in memory.hash.layer_ids
    }


def constants_of(config: Mapping[str, Any], has_map: bool) -> dict[str, np.ndarray]:
    """Multipliers, primes, offsets of all layers one after the other, and the token map."""
    spec = EngramConfig.from_hf(dict(config)).hash
    arrays = {
        name: np.array([getattr(spec, name)(layer) for layer in spec.layer_ids]).reshape(-1)
        for name in ("multipliers", "primes", "offsets")
    }
    if has_map:
        arrays["token_map"] = token_map()
    return arrays


def write_gguf(
    path: Path,
    rows: Mapping[int, np.ndarray],
    kind: str,
    config: Mapping[str, Any] = V41,
    spelling: Spelling = DEEPSEEK,
    *,
    constants: Mapping[str, np.ndarray] | None = None,
    split_tensors: int = 0,
    raw_type: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Writes a model with tables, and some tensors besides.

    Args:
        path: NAME.gguf; with `split_tensors` the files are NAME-00001-of-000NN.gguf.
        rows: Records of each layer.
        kind: Their row kind.
        config: config.json of the release.
        spelling: How keys and tensors are called.
        constants: By default those of the config.
        split_tensors: Most tensors of a file; 0 = one file.
        raw_type: Another type than that of the kind.

    Returns:
        The file, or the first one.
    """
    writer = gguf.GGUFWriter(
        path, spelling.arch, split_max_tensors=split_tensors, small_first_shard=False
    )
    for name, key in spelling.keys.items():
        value = config[name]
        if name == "ple_layer_ids":
            value = [layer - 1 for layer in value]
        _add(writer, f"{spelling.arch}.{key}", value)
    if "ple.layers" in spelling.keys.values():
        columns = (config["ngram_size"] - 1) * config["heads_per_ngram"]
        key = f"{spelling.arch}.embedding_length_per_layer_input"
        writer.add_uint32(key, config["ple_embed_dim"] // columns)
    for key, value in spelling.extra.items():
        _add(writer, key, value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(config["vocab_size"])])
    if constants is None:
        constants = constants_of(config, "token_map" in spelling.constants)
    writer.add_tensor("token_embd.weight", np.zeros((8, 16), np.float32))
    for name, values in constants.items():
        key = spelling.constants.get(name)
        if key is not None and spelling.as_tensors:
            dtype = np.int32 if name == "token_map" else np.int64
            writer.add_tensor(key, values.astype(dtype))
        elif key is not None:
            _add_array(writer, f"{spelling.arch}.{key}", values, name == "token_map")
    for layer, raw_NR in rows.items():
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(16, np.float32))
        name = spelling.table.format(layer=layer)
        writer.add_tensor(name, raw_NR, raw_dtype=raw_type or TYPES[kind])
    writer.add_tensor("output.weight", np.zeros((3, 16), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if not split_tensors:
        return path
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        kind = gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, list(value), kind, gguf.GGUFValueType.INT32)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, value)


def _add_array(writer: gguf.GGUFWriter, key: str, values: Iterable[int], of_int32: bool) -> None:
    sub_type = gguf.GGUFValueType.INT32 if of_int32 else gguf.GGUFValueType.UINT64
    values = [int(value) for value in values]
    writer.add_key_value(key, values, gguf.GGUFValueType.ARRAY, sub_type)


def renamed(spelling: Spelling, **changes: Any) -> Spelling:
    """A spelling with other parts."""
    return dataclasses.replace(spelling, **changes)
