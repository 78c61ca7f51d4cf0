"""The tables of a release in a GGUF file, or in the files of a split model: finds and checks them.

    DeepSeek-V4.1   blk.L.engram_embd.weight        [d, rows] as GGUF counts: rows of d values
    Qwen4-Exp       per_layer_token_embd.weight     the same, of all layers in order

A tensor with another name is found by its shape. What the file does not say is assumed, and said:
at level INFO of the log "engraphy", and by `Checkpoint.describe`. Constants of the hash in the file
are compared with those computed here.

A config.json beside the file describes the memory; without one, the file's metadata do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..addresses.vocab import VocabMap
from ..errors import ConfigError, DigestMismatch, TableError
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..spec.dialects import GgufNames
from ..spec.model_config import config_fields
from ..table.gguf import Gguf, GgufTensor
from ..table.safetensors import StoredTensor
from .found import Found, TokenMap, one_format
from .gguf_config import Metadata, check_fields, describe, find_dialect
from .safetensors_tables import read_config

ROW_KINDS = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "Q8_0": "q8_0",
    "Q4_0": "q4_0",
    "IQ4_NL": "iq4_nl",
    "MXFP4": "mxfp4",
    "Q2_K": "q2_k",
    "Q3_K": "q3_k",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
}
"""Types of tensors that hold tables, and the kinds of their rows."""

# Rows of fp8 with their scales, as bytes: what ds4 writes, and byte for byte a record of kind fp8.
_BYTES = "I8"
_ENCODING_KEY = "engram_encoding"
_FP8_ENCODING = "e4m3_e8m0_32_row"


def find_tables(path: Path) -> Found:
    """Reads the headers of a GGUF file and of the files it is split into, and finds the tables.

    Args:
        path: The file; the first one of a split model.

    Raises:
        EngraphyError: What `Checkpoint.open` raises.
    """
    gguf = Gguf.open(path)
    metadata = Metadata(gguf)
    config, raw_vocab, assumed = _config(gguf, metadata)
    names = config.hash.rules.released.gguf
    if names is None:
        raise ConfigError(
            f"{path}: expected a release that has GGUF files, found {config.hash.dialect}"
        )
    _check_constants(metadata, config, names)
    finder = _Tables(gguf, metadata, config, names)
    tables = finder.find()
    weights = {layer: (stored,) for layer, (_, stored) in tables.items()}
    return Found(
        config,
        one_format(path, [fmt for fmt, _ in tables.values()]),
        weights,
        {layer: () for layer in weights},
        raw_vocab,
        (*assumed, *finder.assumed),
        _token_map(metadata, config, names),
    )


def _config(gguf: Gguf, metadata: Metadata) -> tuple[EngramConfig, int, list[str]]:
    """The memory, the size of the model's vocabulary, and what was assumed."""
    beside = gguf.path.parent / "config.json"
    if beside.exists():
        fields = config_fields(read_config(beside.parent))
        config = EngramConfig.from_hf(fields)
        check_fields(metadata, config)
        return config, fields.get("vocab_size", config.hash.vocab_size), []
    dialect = find_dialect(gguf, metadata)
    fields, assumed = describe(gguf, metadata, dialect)
    try:
        config = EngramConfig.from_hf(fields)
    except ConfigError as error:
        raise ConfigError(
            f"{gguf.path}: {error}; its metadata do not describe the memory: put the release's "
            "config.json beside it"
        ) from None
    return config, fields.get("vocab_size", config.hash.vocab_size), assumed


def _check_constants(metadata: Metadata, config: EngramConfig, names: GgufNames) -> None:
    """Compares multipliers, primes and offsets in the file with those of the config."""
    spec = config.hash
    for constant in ("multipliers", "primes", "offsets"):
        aliases = names.constants.get(constant, ())
        found = metadata.constants(*aliases)
        if found is None:
            continue
        where = f"{metadata.gguf.path}: {metadata.place(*aliases)}"
        expected = [value for layer in spec.layer_ids for value in getattr(spec, constant)(layer)]
        if len(found) != len(expected):
            raise DigestMismatch(
                f"{where}: expected {len(expected)} {constant} of {len(spec.layer_ids)} layers, "
                f"found {len(found)}"
            )
        for index, (value, other) in enumerate(zip(expected, found, strict=True)):
            if value != other:
                raise DigestMismatch(
                    f"{where}: number {index}: expected {value}, which follows from "
                    f"{'config.json' if _has_config(metadata) else 'the other metadata'}, "
                    f"found {other}"
                )


def _has_config(metadata: Metadata) -> bool:
    return (metadata.gguf.path.parent / "config.json").exists()


def _token_map(metadata: Metadata, config: EngramConfig, names: GgufNames) -> TokenMap | None:
    """The vocabulary map in the file, checked against the filler and the number of its ids."""
    aliases = names.constants.get("token_map", ())
    values = metadata.constants(*aliases)
    if values is None:
        return None
    place = f"{metadata.gguf.path}: {metadata.place(*aliases)}"
    try:
        vocab = VocabMap(np.array(values, np.int64))
    except (ConfigError, OverflowError) as error:
        raise TableError(f"{place}: {error}") from None
    spec = config.hash
    if len(vocab) != spec.vocab_size:
        raise DigestMismatch(
            f"{place}: expected {spec.vocab_size} compressed ids, found {len(vocab)}"
        )
    filler = metadata.value(*names.compressed_filler)
    if filler is not None:
        found = int(vocab.table[spec.filler_id]) if spec.filler_id < vocab.raw_size else -1
        if found != filler:
            raise DigestMismatch(
                f"{metadata.gguf.path}: {metadata.place(*names.compressed_filler)}: expected "
                f"{found}, the compressed id of the filler {spec.filler_id}, found {filler}"
            )
    return TokenMap(place, vocab)


class _Tables:
    """Finds the tensor of each layer, by its name or by its shape."""

    def __init__(
        self, gguf: Gguf, metadata: Metadata, config: EngramConfig, names: GgufNames
    ) -> None:
        self.gguf = gguf
        self.metadata = metadata
        self.config = config
        self.names = names
        self.assumed: list[str] = []

    def find(self) -> dict[int, tuple[RowFormat, StoredTensor]]:
        """Row format and place of the rows of each layer."""
        layers = self.config.hash.layer_ids
        counts = [self.config.hash.row_count(layer) for layer in layers]
        if "{layer}" in self.names.table:
            return {
                layer: self._part(self._tensor(f"layer {layer}", layer, count), 0, count)
                for layer, count in zip(layers, counts, strict=True)
            }
        title = "layer " + ", ".join(map(str, layers))
        tensor = self._tensor(title, layers[0], sum(counts))
        if len(layers) > 1:
            self.assumed.append(f"{tensor.name} holds the rows of layers {list(layers)} in order")
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        return {
            layer: self._part(tensor, first, count)
            for layer, first, count in zip(layers, firsts, counts, strict=True)
        }

    def _tensor(self, title: str, layer: int, rows: int) -> GgufTensor:
        """The tensor with the rows of a layer."""
        name = self.names.table.format(layer=layer)
        tensor = self.gguf.tensors.get(name)
        if tensor is None:
            tensor = self._by_shape(title, name, rows)
        where = f"{tensor.path}: {tensor.name}"
        if tensor.type not in ROW_KINDS and tensor.type != _BYTES:
            raise TableError(
                f"{where}: type: expected one of {', '.join(ROW_KINDS)}, found {tensor.type}"
            )
        if len(tensor.shape) != 2 or tensor.width != self._width(tensor):
            raise TableError(
                f"{where}: row width: expected [rows, {self._width(tensor)}], which follows from "
                f"{self._source}, found {list(tensor.shape)}"
            )
        if tensor.rows != rows:
            raise TableError(
                f"{where}: rows of {title}: expected {rows}, which follow from {self._source}, "
                f"found {tensor.rows}"
            )
        return tensor

    @property
    def _source(self) -> str:
        return "config.json" if _has_config(self.metadata) else "the metadata"

    def _by_shape(self, title: str, name: str, rows: int) -> GgufTensor:
        fitting = [
            tensor
            for tensor in self.gguf.tensors.values()
            if len(tensor.shape) == 2
            and (tensor.rows, tensor.width) == (rows, self._width(tensor))
            and (tensor.type in ROW_KINDS or tensor.type == _BYTES)
        ]
        if len(fitting) != 1:
            raise TableError(
                f"{self.gguf.path}: expected the tensor {name}, or one of {rows} rows of "
                f"{self.config.dim} values, for {title}; found {len(fitting)} such among "
                f"{len(self.gguf.tensors)} tensors: {[tensor.name for tensor in fitting[:3]]}"
            )
        tensor = fitting[0]
        self.assumed.append(
            f"{tensor.name} is the table of {title}, since it alone has {rows} rows of "
            f"{tensor.width}: no tensor is called {name}"
        )
        return tensor

    def _width(self, tensor: GgufTensor) -> int:
        """What one row of a tensor of this type has to be wide."""
        if tensor.type == _BYTES and self.config.dim % 32 == 0:
            return RowFormat("fp8", self.config.dim).row_bytes
        return self.config.dim

    def _part(self, tensor: GgufTensor, first: int, rows: int) -> tuple[RowFormat, StoredTensor]:
        fmt = RowFormat(self._kind(tensor), self.config.dim)
        stored = StoredTensor(
            tensor.path,
            tensor.name,
            "U8",
            (rows, fmt.row_bytes),
            tensor.offset + first * fmt.row_bytes,
            rows * fmt.row_bytes,
        )
        return fmt, stored

    def _kind(self, tensor: GgufTensor) -> str:
        if tensor.type != _BYTES:
            return ROW_KINDS[tensor.type]
        expected = f"{_FP8_ENCODING}{tensor.width}"
        encoding = self.metadata.value(_ENCODING_KEY)
        if encoding != expected:
            place = self.metadata.place(_ENCODING_KEY) or "engram.encoding"
            raise TableError(
                f"{tensor.path}: {place}: expected {expected} for {tensor.name} of type "
                f"{tensor.type}, found {encoding!r}"
            )
        return "fp8"


def check_map(token_map: TokenMap, vocab: VocabMap, source: str) -> None:
    """Compares a vocabulary map with the one in a release's files.

    Args:
        token_map: The map in the files.
        vocab: The other one.
        source: Where it comes from, for the message.

    Raises:
        DigestMismatch: They differ in an id that has a token.
    """
    live = np.flatnonzero(vocab.table >= 0)
    known = token_map.vocab.table
    if len(live) and live[-1] >= len(known):
        raise DigestMismatch(
            f"{token_map.place}: expected at least {live[-1] + 1} ids, as {source} has, "
            f"found {len(known)}"
        )
    different: Sequence[int] = live[known[live] != vocab.table[live]].tolist()
    if different:
        first = different[0]
        raise DigestMismatch(
            f"{token_map.place}: id {first}: expected {vocab.table[first]}, as {source} has, found "
            f"{known[first]}; {len(different)} ids differ: the tokenizer is another one"
        )
