"""Small checkpoints in the files of the releases, with what tests vary in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engraphy.addresses.vocab import VocabMap
from engraphy.released import sample
from engraphy.released.sample import (
    ITEM_BYTES,
    QWEN,
    V41,
    WORDS,
    Tensors,
    tokenizer,
    write_checkpoint,
    write_safetensors,
)
from engraphy.released.sample_gguf import write_split
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig

__all__ = [
    "ITEM_BYTES",
    "QWEN",
    "V41",
    "WORDS",
    "Tensors",
    "qwen_tensors",
    "records",
    "tokenizer",
    "v41_tensors",
    "write_gguf",
    "write_qwen",
    "write_release",
    "write_safetensors",
    "write_v41",
]


def v41_tensors(
    config: Mapping[str, Any] = V41, seed: int = 0, scale_dtype: str = "F8_E8M0"
) -> Tensors:
    return sample.v41_tensors(config, seed, scale_dtype)


def qwen_tensors(config: Mapping[str, Any] = QWEN, seed: int = 0, fp8: bool = False) -> Tensors:
    return sample.qwen_tensors(config, seed, fp8)


def write_release(
    path: Path, config: Mapping[str, Any], tensors: Tensors, files: Sequence[Sequence[str]]
) -> Path:
    """A checkpoint folder without a tokenizer: each of `files` holds the tensors it lists."""
    path.mkdir(parents=True)
    write_checkpoint(path, config, tensors, files)
    return path


def write_v41(
    path: Path,
    config: Mapping[str, Any] = V41,
    seed: int = 0,
    scale_dtype: str = "F8_E8M0",
    tensors: Tensors | None = None,
) -> Path:
    path.mkdir(parents=True)
    tensors = v41_tensors(config, seed, scale_dtype) if tensors is None else tensors
    sample.write_v41(path, config, tensors)
    return path


def write_qwen(
    path: Path,
    config: Mapping[str, Any] = QWEN,
    seed: int = 0,
    fp8: bool = False,
    tensors: Tensors | None = None,
) -> Path:
    """Without a tokenizer, so that tests say which one they mean."""
    path.mkdir(parents=True)
    tensors = qwen_tensors(config, seed, fp8) if tensors is None else tensors
    sample.write_qwen(path, config, tensors)
    (path / "tokenizer.json").unlink()
    return path


def write_gguf(path: Path, config: Mapping[str, Any], layer: int) -> tuple[str, np.ndarray]:
    """A GGUF release of DeepSeek-V4.1: the URL of its store, and the records of a layer."""
    path.mkdir(parents=True)
    memory = EngramConfig.from_hf(dict(config))
    rng = np.random.default_rng(0)
    values = {
        number: rng.standard_normal((memory.hash.row_count(number), memory.dim)).astype(np.float32)
        for number in memory.hash.layer_ids
    }
    write_split(path, config, values, VocabMap.from_tokenizer(tokenizer()))
    url = f"checkpoint:{path / 'model-00001-of-00002.gguf'}"
    return url, RowFormat("q8_0", memory.dim).encode(values[layer])


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
