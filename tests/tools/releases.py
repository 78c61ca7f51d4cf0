"""Small checkpoints with the tensor names, dtypes, sharding, index and config fields of the
released ones.

Names and fields as public listings of the headers of DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next
show them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from engraphy.spec import EngramConfig

ITEM_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8}
Tensors = dict[
    str, tuple[str, np.ndarray]
]  # dtype name, and the bytes with the tensor's shape but for its last axis

WORDS = [f"w{i}" for i in range(40)] + [
    f"W{i}" for i in range(20)
]  # 60 tokens, 40 after lowercasing
V41 = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "hc_mult": 4,
    "rms_norm_eps": 1e-20,
    "vocab_size": len(WORDS),
    "engram_layer_ids": [1, 3],
    "engram_max_ngram_size": 3,
    "engram_n_heads": 2,
    "engram_head_dim": 64,
    "engram_vocab_size": 50,
    "engram_compressed_vocab_size": 40,
    "engram_pad_token_id": 2,
}
QWEN = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "hc_count": 4,
    "rms_norm_eps": 1e-6,
    "vocab_size": 60,
    "eos_token_id": 5,
    "ple_layer_ids": [2],
    "ple_embed_dim": 128,
    "ple_conv_kernel_size": 4,
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 3,
    "seed": 1234,
}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """dtype names as given, data uint8 [..., bytes of the last axis]."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, raw) in tensors.items():
        shape = [*raw.shape[:-1], raw.shape[-1] // ITEM_BYTES[dtype]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + raw.size]}
        offset += raw.size
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, raw in tensors.values():
            file.write(raw.tobytes())


def write_release(
    path: Path, config: Mapping, tensors: Tensors, files: Sequence[Sequence[str]]
) -> Path:
    """A checkpoint folder: each of `files` holds the tensors it lists, among others; an index says
    which."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": dict(config)}))
    weight_map, other = {}, ("BF16", np.zeros((3, 8), np.uint8))
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        held = {f"layers.{number}.ffn.w1.weight": other} | {
            tensor: tensors[tensor] for tensor in names
        }
        write_safetensors(path / name, held)
        weight_map |= dict.fromkeys(held, name)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return path


def tokenizer() -> Tokenizer:
    return Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))


def v41_tensors(config: Mapping = V41, seed: int = 0, scale_dtype: str = "F8_E8M0") -> Tensors:
    """Codes and scales of finite numbers."""
    memory, rng = EngramConfig.from_hf(dict(config)), np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in memory.hash.layer_ids:
        rows, stem = memory.hash.row_count(layer), f"layers.{layer}.engram.embed"
        codes = rng.integers(0, 256, (rows, memory.dim), np.uint8)
        codes[(codes & 127) == 127] = 1
        tensors[f"{stem}.weight"] = "F8_E4M3", codes
        tensors[f"{stem}.scale"] = (
            scale_dtype,
            rng.integers(117, 122, (rows, memory.dim // 32), np.uint8),
        )
    return tensors


def write_v41(
    path: Path,
    config: Mapping = V41,
    seed: int = 0,
    scale_dtype: str = "F8_E8M0",
    tensors: Tensors | None = None,
) -> Path:
    """One file a table, the weight and its scale in it, as released; and the tokenizer."""
    tensors = v41_tensors(config, seed, scale_dtype) if tensors is None else tensors
    files = [
        [name for name in tensors if name.startswith(f"layers.{layer}.")]
        for layer in config["engram_layer_ids"]
    ]
    write_release(path, config, tensors, [[], *files])
    tokenizer().save(str(path / "tokenizer.json"))
    return path


def qwen_tensors(config: Mapping = QWEN, seed: int = 0, fp8: bool = False) -> Tensors:
    """Parts as `torch.chunk` makes them, the hash's own buffers, and for fp8 the one scale (2**-6)."""
    memory, rng, tensors = EngramConfig.from_hf(dict(config)), np.random.default_rng(seed), {}
    for layer in memory.hash.layer_ids:
        rows, base = (
            memory.hash.row_count(layer),
            f"model.language_model.layers.{layer}.ple.ple_embedding",
        )
        if fp8:
            raw = rng.integers(0, 126, (rows, memory.dim), np.uint8)
            tensors[f"{base}.ngram_embedding.weight_scale"] = (
                "BF16",
                np.array([0x80, 0x3C], np.uint8),
            )
        else:
            bits = rng.standard_normal((rows, memory.dim)).astype(np.float32).view(np.uint32) >> 16
            raw = bits.astype(np.uint16).view(np.uint8)
        step = -(-rows // config["split_ngram_parts"])
        for number, first in enumerate(range(0, rows, step)):
            name = f"{base}.ngram_embedding.shard_{number}.weight"
            tensors[name] = "F8_E4M3" if fp8 else "BF16", raw[first : first + step]
        ours = {
            "layer_multipliers": memory.hash.multipliers(layer),
            "ngram_heads_vocab_sizes": memory.hash.primes(layer),
            "ngram_heads_offsets": memory.hash.offsets(layer),
        }
        for name, values in ours.items():
            tensors[f"{base}.{name}"] = "I64", np.array(values, np.int64).view(np.uint8)
    return tensors


def write_qwen(
    path: Path,
    config: Mapping = QWEN,
    seed: int = 0,
    fp8: bool = False,
    tensors: Tensors | None = None,
) -> Path:
    """Parts spread over files in another order than theirs."""
    tensors = qwen_tensors(config, seed, fp8) if tensors is None else tensors
    names = sorted(tensors, reverse=True)
    return write_release(path, config, tensors, [names[0::2], names[1::2]])


def records(tensors: Tensors, layer: int) -> np.ndarray:
    """uint8 [rows, row_bytes]: what the table's rows must be, told by the tensors alone."""
    codes = tensors.get(f"layers.{layer}.engram.embed.weight")
    if codes is not None:
        return np.concatenate([codes[1], tensors[f"layers.{layer}.engram.embed.scale"][1]], axis=1)
    parts = {
        int(name.split("shard_")[1].split(".")[0]): raw
        for name, (_, raw) in tensors.items()
        if f".layers.{layer}." in name and "shard_" in name
    }
    return np.concatenate([parts[number] for number in range(len(parts))])
