"""The n-gram tables of a released checkpoint: what they are, and their rows.

A checkpoint is a folder of safetensors files (safetensors_tables.py) or a GGUF file
(gguf_tables.py), which find the tensors and check them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..addresses.tokenizers import load_map, load_tokenizer
from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..table import gguf
from ..table.safetensors import StoredTensor, read_rows
from . import gguf_tables, safetensors_tables
from .found import TokenMap

_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Checkpoint:
    """The tables of a released checkpoint; made by `open`.

    Attributes:
        path: The checkpoint's folder, or its GGUF file.
        config: The memory that config.json or the GGUF file describes.
        fmt: The format of the rows as records.
        weights: The tensors of each layer, in row order.
        scales: The block scales of each weight tensor, by layer; empty if the release has none.
        raw_vocab: Size of the model's vocabulary.
        source_id: A hash of config, headers and a sample of the rows, 32 hex digits.
        assumed: What a GGUF file does not say and was taken to be so, in words.
        token_map: The vocabulary map in a GGUF file; None if there is none.
    """

    path: Path
    config: EngramConfig
    fmt: RowFormat
    weights: Mapping[int, tuple[StoredTensor, ...]]
    scales: Mapping[int, tuple[StoredTensor, ...]]
    raw_vocab: int
    source_id: str
    assumed: tuple[str, ...] = ()
    token_map: TokenMap | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads what describes the tables, the headers of the files that hold them, and a few rows.

        Args:
            path: The checkpoint's folder, with config.json and the index; or a GGUF file, of a
                split model the first one. A config.json beside a GGUF file describes the memory;
                without one, the metadata of the file do.

        Returns:
            Its tables.

        Raises:
            ConfigError: config.json is missing or describes no known memory, or the metadata of a
                GGUF file do not.
            TableError: A tensor is missing or has an unexpected shape, dtype or value; or the name
                of a table has an unknown tensor below it.
            DigestMismatch: Stored multipliers, primes, offsets or sizes are not those of the
                config.
            ShardMissing, ShardTruncated, ShardCorrupt, ShardForeign: A file is missing or damaged,
                or belongs to another model.
        """
        path = Path(os.path.abspath(path))
        find = gguf_tables.find_tables if is_gguf(path) else safetensors_tables.find_tables
        found = find(path)
        for assumption in found.assumed:
            logging.getLogger("engraphy").info("%s: assumed %s", path, assumption)
        checkpoint = cls(
            path,
            found.config,
            found.fmt,
            found.weights,
            found.scales,
            found.raw_vocab,
            source_id="",
            assumed=found.assumed,
            token_map=found.token_map,
        )
        return dataclasses.replace(checkpoint, source_id=_source_id(checkpoint))

    @property
    def directory(self) -> Path:
        """The folder with the files."""
        return self.path.parent if is_gguf(self.path) else self.path

    def describe(self) -> str:
        """What the checkpoint holds, a line each: tensors, rows, and what was assumed."""
        lines = [f"{self.config.hash.rules.released.title} in {self.path}"]
        for layer, tensors in self.weights.items():
            rows = self.config.hash.row_count(layer)
            names = tensors[0].name
            if len(tensors) > 1:
                names += f" and {len(tensors) - 1} more tensors"
            lines.append(
                f"layer {layer}: {rows:,} rows of {self.fmt.row_bytes} bytes "
                f"({self.fmt.kind}, d = {self.fmt.d}) in {names}"
            )
        lines += [f"assumed {assumption}" for assumption in self.assumed]
        return "\n".join(lines)

    def read_rows(self, layer: int, first: int, out_nR: np.ndarray) -> None:
        """Reads rows first..first+n-1 of a layer as records.

        Args:
            layer: A layer of the memory.
            first: The first row.
            out_nR: uint8 [n, row_bytes], C-contiguous, which is filled.
        """
        if not self.scales[layer]:
            read_rows(self.weights[layer], first, out_nR)
            return
        d = self.fmt.d
        weight_nd = np.empty((len(out_nR), d), np.uint8)
        scale_ns = np.empty((len(out_nR), self.fmt.row_bytes - d), np.uint8)
        read_rows(self.weights[layer], first, weight_nd)
        read_rows(self.scales[layer], first, scale_ns)
        out_nR[:, :d] = weight_nd
        out_nR[:, d:] = scale_ns

    def vocab(self, saved: str | os.PathLike[str] | None = None) -> VocabMap:
        """The vocabulary map that the rows were trained with.

        It is the identity if the release hashes raw ids (Qwen4-Exp).

        Args:
            saved: A file that `VocabMap.save` wrote. By default the map is made from tokenizer.json
                in the checkpoint's folder; without one it is the token map of a GGUF file.

        Returns:
            The map.

        Raises:
            ConfigError: There is neither a saved map nor a tokenizer.json nor a token map.
            DigestMismatch: The map does not belong to the checkpoint.
        """
        size = self.config.hash.vocab_size
        vocab = load_map(saved) if saved is not None else None
        if self.config.hash.rules.raw_ids:
            identity = VocabMap.identity(size)
            if vocab is not None and vocab.digest != identity.digest:
                raise DigestMismatch(
                    f"{saved}: expected the identity map of {size} ids, which "
                    f"{self.config.hash.rules.released.title} hashes, found another map of "
                    f"{len(vocab)}"
                )
            return identity
        if vocab is None:
            vocab = self._tokenizer_map()
        if len(vocab) != size:
            raise DigestMismatch(
                f"{saved or self.directory}: vocabulary map: expected {size} compressed ids, as "
                f"{self._described_in} says, found {len(vocab)}"
            )
        if self.token_map is not None:
            source = str(saved or self.directory / "tokenizer.json")
            gguf_tables.check_map(self.token_map, vocab, source)
        return vocab

    @property
    def _described_in(self) -> str:
        return "config.json" if (self.directory / "config.json").exists() else self.path.name

    def _tokenizer_map(self) -> VocabMap:
        path = self.directory / "tokenizer.json"
        if not path.exists():
            if self.token_map is not None:
                return self.token_map.vocab
            raise ConfigError(
                f"{path}: expected the tokenizer, found no file; "
                "give a saved vocabulary map instead"
            )
        return _map_of(str(path), path.stat().st_mtime_ns, self.raw_vocab)


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, which may be missing, and not a folder."""
    return path.suffix == gguf.SUFFIX and not path.is_dir()


@functools.lru_cache(maxsize=4)  # it takes seconds, and the store of each layer needs it
def _map_of(path: str, _modified: int, raw_vocab: int) -> VocabMap:
    return VocabMap.from_tokenizer(load_tokenizer(path), raw_vocab)


def _source_id(checkpoint: Checkpoint) -> str:
    """A hash of config, headers and a sample of the rows of each layer, 32 hex digits.

    The headers alone would stay the same if a checkpoint were trained further.
    """
    config = checkpoint.config
    described = json.dumps([config.to_json(), checkpoint.fmt.to_json()], sort_keys=True)
    digest = hashlib.sha256(described.encode())
    row_1R = np.empty((1, checkpoint.fmt.row_bytes), np.uint8)
    for layer, weights in sorted(checkpoint.weights.items()):
        for tensor in (*weights, *checkpoint.scales[layer]):
            entry = [tensor.path.name, tensor.name, tensor.dtype, tensor.shape, tensor.offset]
            digest.update(json.dumps(entry).encode())
        sampled = np.linspace(0, config.hash.row_count(layer) - 1, _SAMPLED_ROWS)
        for row in sampled.astype(np.int64).tolist():
            checkpoint.read_rows(layer, row, row_1R)
            digest.update(row_1R.tobytes())
    return digest.hexdigest()[:32]
