"""Where tensors lie in GGUF files: reads header, metadata and tensor list, of split files too.

Engraphy reads the format by itself, so that serving a table needs no further package. Every way in
which a file can contradict itself is found before a row is read.

    magic "GGUF", version, number of tensors, number of metadata entries
    metadata: key, type, value
    tensors: name, dimensions (fastest first), type, offset from the data's beginning
    padding to `general.alignment`, then the data

A model may be split: NAME-00001-of-000NN.gguf and so on. The metadata then stand in the first file.

Source: the specification of GGUF in the ggml project; versions 2 and 3, little-endian.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import ShardCorrupt, ShardForeign, ShardMissing, ShardTruncated, TableError
from ..system.lfs import refuse_pointer
from .gguf_types import BLOCK_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_LEAST_BYTES = 24  # magic, version and two numbers
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_DIMENSIONS = 4
_DEEPEST = 4  # arrays in arrays
_BUFFER_BYTES = 1 << 20  # read at a time: the metadata of a large vocabulary are some MB

_STRING = 8
_ARRAY = 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class Strings:
    """An array of strings in the metadata: only how many, since no table needs them."""

    count: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        path: The file.
        name: The tensor's name.
        type: Name of its type, such as "Q8_0"; "type N" if the number N is unknown.
        shape: Its shape, rows first: a file lists the dimensions in the other order.
        offset: Place of its first byte in the file.
        row_bytes: Bytes of a row, of shape[-1] values; 0 if the type is unknown.
    """

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Values of a row."""
        return self.shape[-1]

    def values(self) -> np.ndarray:
        """The numbers of a small tensor of integers, [values].

        Raises:
            TableError: It has another type, or the system cannot read it.
        """
        kinds = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
        if self.type not in kinds:
            raise TableError(f"{self.path}: {self.name}: expected integers, found {self.type}")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.rows * self.row_bytes)
        except OSError as error:
            raise TableError(f"{self.path}: {self.name}: it cannot be read ({error})") from error
        return np.frombuffer(data, kinds[self.type])


@dataclass(frozen=True)
class Gguf:
    """What the header of a GGUF file says, or the headers of all files of a split model.

    Attributes:
        path: The file, or the first one.
        files: All files, in order.
        metadata: Key -> number, text, bool, array of numbers, `Strings`, or list of such arrays.
        tensors: Name -> tensor.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Gguf:
        """Reads the header of a file, and of the other files of a split model.

        Args:
            path: The file; the first one if the model is split.

        Raises:
            ShardMissing: The file is not there, or another file of a split model.
            ShardTruncated: A file is shorter than its header says.
            ShardCorrupt: A header is damaged or contradicts itself.
            ShardForeign: A file of a split model belongs to another one, or to another place.
            TableError: A file is no GGUF that can be read here (another version, big-endian), is
                not the first of its model, or the system cannot read it.
        """
        path = Path(os.path.abspath(path))
        first = _read_file(path)
        count = _number(first.metadata.get("split.count", 1))
        name = _SPLIT_NAME.fullmatch(path.name)
        if name and int(name[2]) != 1:
            start = path.with_name(f"{name[1]}-{1:05d}-of-{name[3]}{SUFFIX}")
            raise TableError(f"{path}: expected the first file of a split model, {start.name}")
        if count <= 1:
            return first
        if not name or int(name[3]) != count:
            raise ShardForeign(
                f"{path}: expected the name NAME-{1:05d}-of-{count:05d}{SUFFIX} of the first of "
                f"{count} files (split.count), found {path.name}: it was renamed"
            )
        others = [
            _read_split(path.with_name(f"{name[1]}-{number:05d}-of-{count:05d}{SUFFIX}"))
            for number in range(2, count + 1)
        ]
        return _joined(first, others)


def _joined(first: Gguf, others: list[Gguf]) -> Gguf:
    """One model of all its files, checked against each other."""
    count = len(others) + 1
    tensors = dict(first.tensors)
    for index, part in enumerate([first, *others]):
        place = _number(part.metadata.get("split.no", -1))
        total = _number(part.metadata.get("split.count", 1))
        if (place, total) != (index, count):
            raise ShardForeign(
                f"{part.path}: expected file {index} of {count} (split.no, split.count), "
                f"found {place} of {total}"
            )
        twice = sorted(part.tensors.keys() & tensors.keys()) if index else []
        if twice:
            raise ShardCorrupt(f"{part.path}: expected each tensor once, found {twice[0]} again")
        tensors |= part.tensors
    expected = _number(first.metadata.get("split.tensors.count", len(tensors)))
    if len(tensors) != expected:
        raise ShardForeign(
            f"{first.path}: expected {expected} tensors (split.tensors.count) in its {count} "
            f"files, found {len(tensors)}: a file belongs to another model"
        )
    files = (first.path, *(part.path for part in others))
    return dataclasses.replace(first, files=files, tensors=tensors)


def _read_split(path: Path) -> Gguf:
    if not path.exists():
        raise ShardMissing(f"{path}: expected this file of the split model, found none")
    return _read_file(path)


def _number(value: Any) -> int:
    """A whole number of the metadata; -1 if it is something else."""
    return value if isinstance(value, int) else -1


def _read_file(path: Path) -> Gguf:
    try:
        with open(path, "rb", buffering=_BUFFER_BYTES) as file:
            return _Header(path, file).parsed()
    except FileNotFoundError:
        raise ShardMissing(f"{path}: expected a GGUF file, found none") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise TableError(f"{str(path)!r}: it cannot be read ({error})") from error


class _Header:
    """Parses the header of one open file, from its beginning on."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._at = 0

    def parsed(self) -> Gguf:
        """All that the header says. Raises what `Gguf.open` raises."""
        self._check_magic()
        self._check_version()
        tensor_count = self._uint("<Q")
        entry_count = self._uint("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._text()
            if key in metadata:
                raise self._corrupt(f"expected each key once, found {key} again")
            metadata[key] = self._value(self._uint("<I"), 0)
        entries = [self._entry() for _ in range(tensor_count)]
        alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._corrupt(f"{_ALIGNMENT_KEY}: expected a power of two, found {alignment!r}")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in entries:
            if name in tensors:
                raise self._corrupt(f"expected each tensor once, found {name} again")
            if offset % alignment:
                raise self._corrupt(
                    f"{name}: expected an offset of a multiple of {alignment}, found {offset}"
                )
            tensors[name] = self._tensor(name, shape, number, data + offset)
        self._check_spans(list(tensors.values()))
        return Gguf(self._path, (self._path,), metadata, tensors)

    def _check_magic(self) -> None:
        magic = self._file.read(len(MAGIC))
        self._at = len(magic)
        if len(magic) < len(MAGIC) and MAGIC.startswith(magic):
            raise self._truncated(_LEAST_BYTES)
        if magic != MAGIC:
            refuse_pointer(self._path, TableError)
            raise ShardCorrupt(
                f"{self._path}: expected a GGUF file, which begins with {MAGIC!r}, found {magic!r}"
            )

    def _check_version(self) -> None:
        raw = self._take(4)
        version = int.from_bytes(raw, "little")
        if version in VERSIONS:
            return
        if int.from_bytes(raw, "big") in VERSIONS:
            raise TableError(
                f"{self._path}: expected little-endian numbers, found a big-endian file: "
                "convert it with gguf_convert_endian of llama.cpp"
            )
        raise TableError(
            f"{self._path}: expected GGUF of version {' or '.join(map(str, VERSIONS))}, "
            f"found {version}"
        )

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        if number not in BLOCK_TYPES:
            return GgufTensor(self._path, name, f"type {number}", shape, offset, 0)
        type_name, values, size = BLOCK_TYPES[number]
        if shape[-1] % values:
            raise self._corrupt(
                f"{name}: expected rows of a multiple of {values} values for {type_name}, "
                f"found {shape[-1]}"
            )
        row_bytes = shape[-1] // values * size
        return GgufTensor(self._path, name, type_name, shape, offset, row_bytes)

    def _check_spans(self, tensors: list[GgufTensor]) -> None:
        """Checks that tensors lie one after the other, and within the file."""
        end = self._at
        before = "the header"
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise self._corrupt(
                    f"{tensor.name}: expected it from byte {end} on, behind {before}, "
                    f"found it at {tensor.offset}"
                )
            end = tensor.offset + tensor.rows * tensor.row_bytes
            before = tensor.name
            if end > self._size:
                raise self._truncated(end)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of one tensor."""
        name = self._text()
        count = self._uint("<I")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise self._corrupt(
                f"{name}: expected 1 to {_MOST_DIMENSIONS} dimensions, found {count}"
            )
        shape = tuple(self._uint("<Q") for _ in range(count))[::-1]
        number = self._uint("<I")
        offset = self._uint("<Q")
        if math.prod(shape) >= 2**62 or offset >= 2**62 or not all(shape):
            raise self._corrupt(f"{name}: expected a size, found {list(shape)} at {offset}")
        return name, shape, number, offset

    def _value(self, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(depth + 1)
        if kind not in _SCALARS:
            raise self._corrupt(f"expected a known type of metadata, found number {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _array(self, depth: int) -> Any:
        kind = self._uint("<I")
        count = self._uint("<Q")
        if kind == _STRING:
            self._skip_texts(count)
            return Strings(count)
        if kind == _ARRAY:
            if depth >= _DEEPEST:
                raise self._corrupt(f"expected arrays at most {_DEEPEST} deep, found deeper ones")
            return [self._array(depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._corrupt(f"expected a known type of metadata, found number {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _skip_texts(self, count: int) -> None:
        """Reads over strings: the tokens of a model are some hundred thousand."""
        read = self._file.read
        at = self._at
        for _ in range(count):
            raw = read(8)
            length = int.from_bytes(raw, "little")
            at += 8 + length
            if len(raw) < 8 or at > self._size:
                raise self._truncated(at)
            read(length)
        self._at = at

    def _text(self) -> str:
        raw = self._take(self._uint("<Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self._corrupt(f"expected text in UTF-8, found {raw[:32]!r}") from None

    def _uint(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        """The next bytes. Raises ShardTruncated if the file ends before them."""
        if self._at + count > self._size:
            raise self._truncated(self._at + count)
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._truncated(self._at + count)
        self._at += count
        return raw

    def _truncated(self, expected: int) -> ShardTruncated:
        return ShardTruncated(
            f"{self._path}: expected at least {expected} bytes, as its header says, "
            f"found {self._size}"
        )

    def _corrupt(self, message: str) -> ShardCorrupt:
        return ShardCorrupt(f"{self._path}: {message}")
