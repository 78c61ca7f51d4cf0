"""Small made-up checkpoints with the file layout of a release, to try commands on.

Tensor names, dtypes, sharding, index and config fields are taken from the public headers of
DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next. The rows are random. The vocabulary has 60 words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ..addresses.vocab import VocabMap
from ..errors import ConfigError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..system.files import publish_folder
from .sample_gguf import write_split

Tensors = dict[str, tuple[str, np.ndarray]]
"""Name: safetensors dtype, and uint8 [..., bytes of the last axis]."""

ITEM_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8}
WORDS = (*(f"w{i}" for i in range(40)), *(f"W{i}" for i in range(20)))  # 40 after lowercasing
V41: Mapping[str, Any] = {
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
QWEN: Mapping[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "hc_count": 4,
    "rms_norm_eps": 1e-6,
    "vocab_size": len(WORDS),
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
RELEASES = ("deepseek_v41", "qwen4", "qwen4_fp8", "deepseek_v41_gguf", "qwen4_gguf")


def write_sample(
    path: str | os.PathLike[str], release: str, rows_per_head: int = 3000, seed: int = 0
) -> Path:
    """Writes a checkpoint folder: config.json, index, shards of the table, tokenizer.

    For "..._gguf" it holds two GGUF files instead, with the same rows in blocks of q8_0.

    Args:
        path: a new folder.
        release: one of RELEASES.
        rows_per_head: least number of rows of a head, where the search for primes begins.
        seed: seed of the rows.

    Returns:
        The folder's absolute path.

    Raises:
        ConfigError: the release is unknown, the size is invalid, or `path` is taken.
        WriteFailed: the system refuses to write.
    """
    if release not in RELEASES:
        raise ConfigError(f"release: expected one of {', '.join(RELEASES)}, found {release!r}")
    path = Path(os.path.abspath(path))
    with publish_folder(path) as folder:
        is_deepseek = release.startswith("deepseek")
        if is_deepseek:
            config = {**V41, "engram_vocab_size": rows_per_head}
            tensors = v41_tensors(config, seed)
        else:
            config = {**QWEN, "ngram_vocab_size_base": rows_per_head}
            tensors = qwen_tensors(config, seed, fp8=release == "qwen4_fp8")
        if release.endswith("_gguf"):
            vocab = VocabMap.from_tokenizer(tokenizer()) if is_deepseek else None
            write_split(folder, config, _values(config, tensors), vocab)
        elif is_deepseek:
            write_v41(folder, config, tensors)
        else:
            write_qwen(folder, config, tensors)
    return path


def _values(config: Mapping[str, Any], tensors: Tensors) -> dict[int, np.ndarray]:
    """The rows of each layer as numbers, float32 [rows, d]."""
    memory = EngramConfig.from_hf(dict(config))
    values: dict[int, np.ndarray] = {}
    for layer in memory.hash.layer_ids:
        names = [name for name in tensors if f"layers.{layer}." in name]
        scale = f"layers.{layer}.engram.embed.scale"
        if scale in names:
            parts = [tensors[f"layers.{layer}.engram.embed.weight"][1], tensors[scale][1]]
            fmt = RowFormat("fp8", memory.dim)
            raw_NR = np.concatenate(parts, axis=1)
        else:
            shards = [name for name in names if "shard_" in name]
            shards.sort(key=lambda name: int(name.split("shard_")[1].split(".")[0]))
            fmt = RowFormat("bf16", memory.dim)
            raw_NR = np.concatenate([tensors[name][1] for name in shards])
        values[layer] = fmt.decode(raw_NR)
    return values


def tokenizer() -> Tokenizer:
    """A tokenizer of WORDS, one id each."""
    return Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=WORDS[0]))


def v41_tensors(config: Mapping[str, Any], seed: int, scale_dtype: str = "F8_E8M0") -> Tensors:
    """One weight and one scale for each layer, with codes and scales of finite numbers."""
    memory = EngramConfig.from_hf(dict(config))
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in memory.hash.layer_ids:
        rows = memory.hash.row_count(layer)
        stem = f"layers.{layer}.engram.embed"
        codes = rng.integers(0, 256, (rows, memory.dim), np.uint8)
        codes[(codes & 127) == 127] = 1  # these codes are NaN
        scales = rng.integers(117, 122, (rows, memory.dim // 32), np.uint8)
        tensors[f"{stem}.weight"] = "F8_E4M3", codes
        tensors[f"{stem}.scale"] = scale_dtype, scales
    return tensors


def qwen_tensors(config: Mapping[str, Any], seed: int, fp8: bool) -> Tensors:
    """For each layer: parts as `torch.chunk` makes them, the hash's buffers; for fp8 one scale."""
    memory = EngramConfig.from_hf(dict(config))
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in memory.hash.layer_ids:
        rows = memory.hash.row_count(layer)
        base = f"model.language_model.layers.{layer}.ple.ple_embedding"
        if fp8:
            raw = rng.integers(0, 126, (rows, memory.dim), np.uint8)
            scale = np.array([0x80, 0x3C], np.uint8)  # 2**-6 in bf16
            tensors[f"{base}.ngram_embedding.weight_scale"] = "BF16", scale
        else:
            bits = rng.standard_normal((rows, memory.dim)).astype(np.float32).view(np.uint32) >> 16
            raw = bits.astype(np.uint16).view(np.uint8)
        step = -(-rows // config["split_ngram_parts"])
        for number, first in enumerate(range(0, rows, step)):
            name = f"{base}.ngram_embedding.shard_{number}.weight"
            tensors[name] = "F8_E4M3" if fp8 else "BF16", raw[first : first + step]
        buffers = {
            "layer_multipliers": memory.hash.multipliers(layer),
            "ngram_heads_vocab_sizes": memory.hash.primes(layer),
            "ngram_heads_offsets": memory.hash.offsets(layer),
        }
        for name, values in buffers.items():
            tensors[f"{base}.{name}"] = "I64", np.array(values, np.int64).view(np.uint8)
    return tensors


def write_v41(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Writes one file per layer with its weight and scale, as released, and the tokenizer."""
    files: list[list[str]] = [[]]
    for layer in config["engram_layer_ids"]:
        files.append([name for name in tensors if name.startswith(f"layers.{layer}.")])
    write_checkpoint(folder, config, tensors, files)
    tokenizer().save(str(folder / "tokenizer.json"))


def write_qwen(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Writes the parts, spread over two files and not in order, and the tokenizer."""
    names = sorted(tensors, reverse=True)
    write_checkpoint(folder, config, tensors, [names[0::2], names[1::2]])
    tokenizer().save(str(folder / "tokenizer.json"))


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, files: Sequence[Sequence[str]]
) -> None:
    """Writes config.json, the index, and one safetensors file for each list of tensor names.

    Each file also holds a tensor that belongs to no table, as the files of releases do.
    """
    nested = {"model_type": "x", "text_config": dict(config)}
    (folder / "config.json").write_text(json.dumps(nested))
    weight_map: dict[str, str] = {}
    other = "BF16", np.zeros((3, 8), np.uint8)
    for number, names in enumerate(files):
        file_name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        contents = {f"layers.{number}.ffn.w1.weight": other}
        contents |= {name: tensors[name] for name in names}
        write_safetensors(folder / file_name, contents)
        weight_map |= dict.fromkeys(contents, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Writes tensors of any dtype name from their bytes, uint8 [..., bytes of the last axis]."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
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
