"""Small made-up GGUF files with the tables of a sample checkpoint, in blocks of q8_0.

Names and metadata are those that forks of llama.cpp write for DeepSeek-V4.1 and Qwen4-Exp. The
model is split into one file with the metadata and one with the tables. The writer is just large
enough for that; real files are written by the `gguf` package.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..addresses.vocab import VocabMap
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..table.gguf import MAGIC, VERSIONS
from ..table.gguf_types import BLOCK_TYPES

_ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 8, 9, 10
_FORMS = {_UINT32: "I", _INT32: "i", _FLOAT32: "f", _UINT64: "Q"}
_TYPES = {name: number for number, (name, _, _) in BLOCK_TYPES.items()}


def write_split(
    folder: Path,
    config: Mapping[str, Any],
    values: Mapping[int, np.ndarray],
    vocab: VocabMap | None,
) -> None:
    """Writes model-00001-of-00002.gguf and model-00002-of-00002.gguf.

    Args:
        folder: Where to write them.
        config: The fields of config.json.
        values: The rows of each layer, float32 [rows, d], which are rounded to q8_0.
        vocab: The map that is written as token map; None for a release that hashes raw ids.
    """
    memory = EngramConfig.from_hf(dict(config))
    names = memory.hash.rules.released.gguf
    assert names is not None  # both releases have GGUF files
    fmt = RowFormat("q8_0", memory.dim)
    tables = {
        names.table.format(layer=layer): ("Q8_0", fmt.encode(rows_Nd), memory.dim)
        for layer, rows_Nd in values.items()
    }
    norm = np.ones((1, 16), np.float32)
    first = {"token_embd.weight": ("F32", norm.view(np.uint8), 16)}
    total = len(first) + len(tables)
    entries = _metadata(config, memory, vocab)
    _write(folder / "model-00001-of-00002.gguf", entries | _split(0, total), first)
    _write(folder / "model-00002-of-00002.gguf", _split(1, total), tables)


def _split(number: int, tensors: int) -> dict[str, tuple[int, Any]]:
    return {
        "split.no": (_UINT32, number),
        "split.count": (_UINT32, 2),
        "split.tensors.count": (_INT32, tensors),
    }


def _metadata(
    config: Mapping[str, Any], memory: EngramConfig, vocab: VocabMap | None
) -> dict[str, tuple[int, Any]]:
    """Key -> type and value, or a list of values."""
    spec = memory.hash
    is_deepseek = vocab is not None
    arch = "deepseek41" if is_deepseek else "qwen4exp"
    part = "engram" if is_deepseek else "ple"
    entries: dict[str, tuple[int, Any]] = {
        "general.architecture": (_STRING, arch),
        f"{arch}.block_count": (_UINT32, config["num_hidden_layers"]),
        f"{arch}.embedding_length": (_UINT32, config["hidden_size"]),
        f"{arch}.attention.layer_norm_rms_epsilon": (_FLOAT32, config["rms_norm_eps"]),
        f"{arch}.hyper_connection.count": (_UINT32, memory.layer.streams),
        "tokenizer.ggml.tokens": (_STRING, [f"t{i}" for i in range(config["vocab_size"])]),
    }
    layers = "layer_ids" if is_deepseek else "layers"
    entries[f"{arch}.{part}.{layers}"] = (_INT32, list(spec.layer_ids))
    if vocab is None:
        entries |= {
            f"{arch}.ple.ngram_size": (_UINT32, spec.order),
            f"{arch}.ple.heads_per_ngram": (_UINT32, spec.heads),
            f"{arch}.ple.conv_kernel": (_UINT32, memory.layer.kernel),
            f"{arch}.ple.eos_token_id": (_UINT32, spec.filler_id),
            f"{arch}.embedding_length_per_layer_input": (_UINT32, memory.dim),
        }
    else:
        entries |= {
            f"{arch}.engram.max_ngram_size": (_UINT32, spec.order),
            f"{arch}.engram.head_count": (_UINT32, spec.heads),
            f"{arch}.engram.key_length": (_UINT32, memory.dim),
            f"{arch}.engram.pad_id": (_UINT32, int(vocab.table[spec.filler_id])),
            f"{arch}.engram.token_map": (_INT32, vocab.table.tolist()),
        }
    titles = {"multipliers": "layer_multipliers", "primes": "head_vocab_sizes"}
    titles["offsets"] = "head_offsets"
    for name, title in titles.items():
        numbers = [value for layer in spec.layer_ids for value in getattr(spec, name)(layer)]
        entries[f"{arch}.{part}.{name if is_deepseek else title}"] = (_UINT64, numbers)
    return entries


def _write(
    path: Path,
    entries: Mapping[str, tuple[int, Any]],
    tensors: Mapping[str, tuple[str, np.ndarray, int]],
) -> None:
    """Writes one file. tensors: name -> type, uint8 [rows, bytes of a row], values of a row."""
    header = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(entries))
    for key, (kind, value) in entries.items():
        header += _text(key)
        if isinstance(value, list):
            header += struct.pack("<IIQ", _ARRAY, kind, len(value)) + _packed(kind, value)
        else:
            header += struct.pack("<I", kind) + _packed(kind, [value])
    offset = 0
    for name, (kind, raw_NR, width) in tensors.items():
        header += _text(name)
        header += struct.pack("<IQQIQ", 2, width, len(raw_NR), _TYPES[kind], offset)
        offset += _padded(raw_NR.size)
    with open(path, "wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for _, raw_NR, _ in tensors.values():
            file.write(raw_NR.tobytes().ljust(_padded(raw_NR.size), b"\0"))


def _packed(kind: int, values: Sequence[Any]) -> bytes:
    if kind == _STRING:
        return b"".join(_text(value) for value in values)
    return struct.pack(f"<{len(values)}{_FORMS[kind]}", *values)


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
