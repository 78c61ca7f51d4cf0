"""The tables of a release in safetensors files: finds and checks their tensors.

These are the tensors of the table of layer L; their names may have any prefix. Both releases may
split a weight into parts, `.shard_I`, of equal row counts except for the last:

    DeepSeek-V4.1   layers.L.engram.embed
        .weight             F8_E4M3 [rows, d]
        .scale              F8_E8M0 or U8 [rows, d/32]
    Qwen4-Exp       layers.L.ple.ple_embedding
        .ngram_embedding.shard_I.weight     BF16 or F8_E4M3 [n, d]
        .ngram_embedding.weight_scale       BF16 or F32 [1], with F8_E4M3 only
        .layer_multipliers                  I64
        .ngram_heads_vocab_sizes            I64
        .ngram_heads_offsets                I64

The names are defined with the dialects, in spec/dialects.

Sources: public listings of the safetensors headers of DeepSeek-V4.1-Flash and of Qwen3.8-Flash-Next
and its FP8 release; `qwen4_exp` in transformers 5.23 (conversion_mapping.py, split_ngram_parts).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DigestMismatch, TableError
from ..rows.codecs import BLOCK
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..spec.model_config import config_fields
from ..system.lfs import refuse_pointer
from ..table.safetensors import (
    INDEX_NAME,
    StoredTensor,
    read_header,
    tensor_names,
    weight_files,
)
from .found import Found, one_format

_PLAIN_KINDS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


def find_tables(directory: Path) -> Found:
    """Reads config.json, the index, and the headers of the files that hold tables.

    Args:
        directory: The checkpoint's folder.

    Raises:
        EngraphyError: What `Checkpoint.open` raises.
    """
    data = read_config(directory)
    config = EngramConfig.from_hf(data)
    tensors = _Tensors(directory, weight_files(directory))
    tables = {layer: _table(tensors, config, layer) for layer in config.hash.layer_ids}
    tensors.check_all_found(config.hash.rules.released.table)
    return Found(
        config,
        one_format(directory, [fmt for fmt, _, _ in tables.values()]),
        {layer: weights for layer, (_, weights, _) in tables.items()},
        {layer: scales for layer, (_, _, scales) in tables.items()},
        config_fields(data).get("vocab_size", config.hash.vocab_size),
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a folder. Raises ConfigError if it is missing or no JSON object."""
    path = directory / "config.json"
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: expected a checkpoint's config.json, found no file") from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path, ConfigError)
        raise ConfigError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object, found {type(data).__name__}")
    return data


class _Tensors:
    """The tensors of a checkpoint by name. files: tensor name -> file, from the index."""

    def __init__(self, directory: Path, files: Mapping[str, Path]) -> None:
        self.directory = directory
        self._files = files
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._found: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def find(self, name: str) -> StoredTensor:
        """The tensor of this name. Raises TableError if there is none, or as `read_header` does."""
        if name not in self._files:
            raise TableError(
                f"{self.directory}: expected the tensor {name}, found none of this name"
                f"{self.left_out(re.compile(re.escape(name)))}"
            )
        path = self._files[name]
        if path not in self._headers:
            self._headers[path] = read_header(path)
        if name not in self._headers[path]:
            raise TableError(
                f"{path}: expected the tensor {name}, which the index puts here, found none"
            )
        self._found.add(name)
        return self._headers[path][name]

    def check_all_found(self, table: str) -> None:
        """Raises TableError if a tensor below a table's name was never requested from `find`.

        Such a tensor may change what the rows mean, whether the index lists it or not.

        Args:
            table: What follows the layer's number in tensor names.
        """
        pattern = re.compile(rf"((?:.*\.)?)layers\.\d+\.{re.escape(table)}(?:[._].*)?")
        names = {*self._files, *(name for path in self._headers for name in tensor_names(path))}
        under = {name: match[1] for name in names if (match := pattern.fullmatch(name))}
        prefixes = {under[name] for name in self._found if name in under}
        for name in sorted(under.keys() - self._found):
            if under[name] in prefixes:
                raise TableError(
                    f"{self.directory}: {name}: expected nothing under the name of a table but the "
                    "tensors that its rows are made of, in the layers that config.json names, "
                    "found one more, and what it means for the rows is not known; "
                    "a newer Engraphy may know it"
                )

    def left_out(self, pattern: re.Pattern[str]) -> str:
        """The end of a message: files of the folder with matching tensors that the index lacks."""
        holding = []
        for path in sorted(self.directory.glob("*.safetensors")):
            with contextlib.suppress(TableError):
                names = [name for name in tensor_names(path) if pattern.fullmatch(name)]
                if not self._files.keys() >= set(names):
                    holding.append(path.name)
        if not holding:
            return ""
        return (
            f"; the folder has it in {', '.join(holding)}, which {INDEX_NAME} does not say: "
            "take the index of the same release, or add these tensors to its weight_map"
        )


def _table(
    tensors: _Tensors, config: EngramConfig, layer: int
) -> tuple[RowFormat, tuple[StoredTensor, ...], tuple[StoredTensor, ...]]:
    """Row format, weights and scales of one layer, checked against the config."""
    release = config.hash.rules.released
    stem, names = _names(tensors, release.table, layer)
    weights = [tensors.find(name) for name in names]
    _check_rows(weights, config, layer, lambda: tensors.left_out(_weight_pattern(re.escape(stem))))
    dtype = weights[0].dtype
    where = f"{weights[0].path}: {names[0]}"
    if release.block_scales:
        if dtype != "F8_E4M3":
            raise TableError(f"{where}: dtype: expected F8_E4M3, found {dtype}")
        fmt = RowFormat("fp8", config.dim)
        scales = tuple(_scale(tensors, weight, config.dim) for weight in weights)
        return fmt, tuple(weights), scales
    _check_hash(tensors, stem.rpartition(".")[0], config, layer)
    scale_name = f"{stem}.weight_scale"
    is_fp8 = dtype == "F8_E4M3"
    has_scale = scale_name in tensors
    if is_fp8 != has_scale or not (is_fp8 or dtype in _PLAIN_KINDS):
        raise TableError(
            f"{where}: dtype: expected {', '.join(_PLAIN_KINDS)}, or F8_E4M3 with {scale_name}, "
            f"found {dtype} {'with' if has_scale else 'without'} it"
        )
    if is_fp8:
        scale = _table_scale(tensors.find(scale_name))
        return RowFormat("fp8_scaled", config.dim, scale), tuple(weights), ()
    return RowFormat(_PLAIN_KINDS[dtype], config.dim), tuple(weights), ()


def _weight_pattern(stem: str) -> re.Pattern[str]:
    return re.compile(rf"({stem})(?:\.shard_(\d{{1,9}}))?\.weight")


def _names(tensors: _Tensors, table: str, layer: int) -> tuple[str, list[str]]:
    """The common beginning of the names of a layer's weights, and the names in row order."""
    pattern = _weight_pattern(rf"(?:.*\.)?layers\.{layer}\.{re.escape(table)}")
    found = {match: name for name in tensors if (match := pattern.fullmatch(name))}
    stems = sorted({match[1] for match in found})
    if len(stems) != 1:
        near = sorted(name for name in tensors if table in name)[:3]
        left_out = "" if stems else tensors.left_out(pattern)
        raise TableError(
            f"{tensors.directory}: expected one table layers.{layer}.{table}.weight, "
            f"found {len(stems)} among {len(tensors)} tensors: {stems or near}{left_out}"
        )
    numbered = {-1 if match[2] is None else int(match[2]): name for match, name in found.items()}
    expected = [-1] if -1 in numbered else list(range(len(numbered)))
    if len(numbered) != len(found) or sorted(numbered) != expected:
        raise TableError(
            f"{tensors.directory}: {stems[0]}: expected one tensor, "
            f"or shard_0 to shard_{max(numbered)}, "
            f"found {sorted(found.values())}{tensors.left_out(pattern)}"
        )
    return stems[0], [numbered[number] for number in expected]


def _check_rows(
    weights: list[StoredTensor], config: EngramConfig, layer: int, left_out: Callable[[], str]
) -> None:
    first = weights[0]
    for weight in weights:
        where = f"{weight.path}: {weight.name}"
        if len(weight.shape) != 2 or weight.shape[1] != config.dim:
            raise TableError(
                f"{where}: row width: expected [rows, {config.dim}], as config.json says, "
                f"found {list(weight.shape)}"
            )
        if weight.dtype != first.dtype:
            raise TableError(
                f"{where}: dtype: expected {first.dtype} as in {first.name}, found {weight.dtype}"
            )
        shorter = 0 < weight.rows < first.rows
        if weight.rows != first.rows and not (shorter and weight is weights[-1]):
            raise TableError(
                f"{where}: rows: expected {first.rows} as in {first.name}, found {weight.rows}"
            )
    expected = config.hash.row_count(layer)
    found = sum(weight.rows for weight in weights)
    if found != expected:
        raise TableError(
            f"{first.path.parent}: rows of layer {layer}: expected {expected}, which follow from "
            f"config.json, found {found} in {len(weights)} tensors ({first.name}){left_out()}"
        )


def _scale(tensors: _Tensors, weight: StoredTensor, d: int) -> StoredTensor:
    scale = tensors.find(weight.name.removesuffix("weight") + "scale")
    where = f"{scale.path}: {scale.name}"
    if scale.dtype not in ("F8_E8M0", "U8"):
        raise TableError(f"{where}: dtype: expected F8_E8M0 or U8, found {scale.dtype}")
    if scale.shape != (weight.rows, d // BLOCK):
        raise TableError(
            f"{where}: shape of the scales: expected {[weight.rows, d // BLOCK]}, "
            f"one for {BLOCK} values, found {list(scale.shape)}"
        )
    return scale


def _table_scale(tensor: StoredTensor) -> float:
    if tensor.dtype not in _PLAIN_KINDS or tensor.shape not in ((), (1,)):
        raise TableError(
            f"{tensor.path}: {tensor.name}: expected one BF16, F16 or F32 scale, "
            f"found {tensor.dtype} {list(tensor.shape)}"
        )
    raw_NR = np.empty((1, tensor.size), np.uint8)
    as_bytes = dataclasses.replace(tensor, dtype="U8", shape=raw_NR.shape)
    as_bytes.read(0, raw_NR)
    return float(RowFormat(_PLAIN_KINDS[tensor.dtype], 1).decode(raw_NR)[0, 0])


def _check_hash(tensors: _Tensors, base: str, config: EngramConfig, layer: int) -> None:
    """Checks the multipliers, primes and offsets among the weights, if the release stores them."""
    computed = config.hash.rules.released.hash_values(config.hash, layer)
    for name, expected in computed.items():
        if f"{base}.{name}" not in tensors:
            continue
        tensor = tensors.find(f"{base}.{name}")
        if (tensor.dtype, tensor.shape) != ("I64", (len(expected),)):
            raise TableError(
                f"{tensor.path}: {tensor.name}: expected I64 [{len(expected)}], "
                f"found {tensor.dtype} {list(tensor.shape)}"
            )
        found = np.empty(len(expected), np.int64)
        tensor.read(0, found.view(np.uint8).reshape(-1, 8))
        if tuple(found.tolist()) != expected:
            raise DigestMismatch(
                f"{tensor.path}: {tensor.name}: expected {list(expected)}, which follow from "
                f"config.json, found {found.tolist()}"
            )
