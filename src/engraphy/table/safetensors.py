"""Where tensors lie in safetensors files: reads headers and index, and rows by their offset.

The `safetensors` library has no numpy dtype for F8_E4M3, F8_E8M0 or BF16; a table needs their bytes
and no numbers. Every way in which a file can contradict itself is found before a row is read.

Source: the safetensors format (8 bytes of header length, JSON, data) and the index file of sharded
checkpoints.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ShardCorrupt, ShardMissing, ShardTruncated, TableError
from ..system.lfs import refuse_pointer

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 64  # what torch and numpy have
_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        path: The file.
        name: The tensor's name.
        dtype: As the header has it, such as "BF16".
        shape: The tensor's shape.
        offset: Place of its first byte in the file.
        size: Its bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def rows(self) -> int:
        """The first dimension."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * _ITEM_BYTES[self.dtype]

    def read(self, first: int, out_nR: np.ndarray) -> None:
        """Reads rows from the file.

        Args:
            first: The first row.
            out_nR: uint8 [n, row_bytes], C-contiguous, which is written.

        Raises:
            ShardTruncated: The file has become shorter.
            TableError: The system cannot read it.
        """
        left = out_nR.reshape(-1).data
        at = self.offset + first * self.row_bytes
        try:
            with open(self.path, "rb", buffering=0) as file:
                while left:
                    count = os.preadv(file.fileno(), [left], at)
                    if not count:
                        raise ShardTruncated(
                            f"{self.path}: expected {len(left)} more bytes at {at}, found the end"
                        )
                    left = left[count:]
                    at += count
        except OSError as error:
            raise TableError(f"{self.path}: rows cannot be read ({error})") from error


def read_rows(tensors: Sequence[StoredTensor], first: int, out_nR: np.ndarray) -> None:
    """Reads rows of several tensors as if they were one.

    Args:
        tensors: Tensors with the same number of rows, but the last may have fewer.
        first: The first row, counted over all tensors.
        out_nR: uint8 [n, row_bytes], C-contiguous, which is written.

    Raises:
        ShardTruncated: A file has become shorter.
        TableError: The system cannot read a file.
    """
    done = 0
    while done < len(out_nR):
        number, local = divmod(first + done, tensors[0].rows)
        count = min(len(out_nR) - done, tensors[number].rows - local)
        tensors[number].read(local, out_nR[done : done + count])
        done += count


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Tensors of dtypes that no table has are left out.

    Raises:
        ShardMissing: There is no file.
        ShardTruncated: It is too short or too long for its header.
        ShardCorrupt: The header is damaged, or tensors overlap or leave gaps.
        TableError: The system cannot read it, or it is a Git LFS pointer.
    """
    parsed, data = _parse_header(path)
    tensors = {
        name: StoredTensor(path, name, dtype, shape, data + begin, end - begin)
        for name, (dtype, shape, begin, end) in parsed.items()
        if dtype in _ITEM_BYTES
    }
    for tensor in tensors.values():
        expected = math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]
        if tensor.size != expected:
            raise ShardCorrupt(
                f"{path}: {tensor.name}: {tensor.dtype} {list(tensor.shape)} is not "
                f"{tensor.size} bytes"
            )
    return tensors


def tensor_names(path: Path) -> list[str]:
    """Names of all tensors of a safetensors file, of any dtype.

    Raises:
        TableError: What `read_header` raises.
    """
    return list(_parse_header(path)[0])


_Entry = tuple[str, tuple[int, ...], int, int]
"""dtype, shape, and where the tensor begins and ends after the header."""


def _parse_header(path: Path) -> tuple[dict[str, _Entry], int]:
    """Entries by name, and where the data begins."""
    text, size = _header_text(path)
    try:
        fields: Any = json.loads(text)
        fields.pop("__metadata__", None)
        entries = {name: _entry(entry) for name, entry in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ShardCorrupt(
            f"{path}: expected a safetensors header, found {text[:32]!r}... "
            f"({type(error).__name__}: {error})"
        ) from None
    data = 8 + len(text)
    _check_spans(path, sorted((begin, end) for _, _, begin, end in entries.values()), data, size)
    return entries, data


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header's JSON, and the size of the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                refuse_pointer(path, TableError)
            if size < 8 or size < 8 + length <= 8 + _MAX_HEADER:
                raise ShardTruncated(
                    f"{path}: expected a safetensors file, found {size} bytes: less than its header"
                )
            if length > _MAX_HEADER:
                raise ShardCorrupt(
                    f"{path}: expected a header of at most {_MAX_HEADER} bytes, found {length}"
                )
            return file.read(length), size
    except FileNotFoundError:
        raise ShardMissing(f"{path}: expected a safetensors file, found none") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise TableError(f"{str(path)!r}: it cannot be read ({error})") from error


def _check_spans(path: Path, spans: list[tuple[int, int]], data: int, size: int) -> None:
    """Checks that tensors fill the file: each begins where the one before it ends.

    Args:
        path: The file.
        spans: Where each tensor begins and ends after the header, in order.
        data: Bytes before the first tensor.
        size: Bytes of the file.
    """
    expected = data + max((end for _, end in spans), default=0)
    if size != expected:
        raise ShardTruncated(f"{path}: expected {expected} bytes, as its header says, found {size}")
    before = 0
    for begin, end in spans:
        if begin != before:
            raise ShardCorrupt(
                f"{path}: expected tensors that lie one after the other, "
                "found some that overlap or a gap"
            )
        before = end


def _entry(entry: Mapping[str, Any]) -> _Entry:
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    dtype = entry["dtype"]
    numbers = [begin, end, *shape]
    valid = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if not valid or len(shape) > _MAX_DIMENSIONS or begin > end or not isinstance(dtype, str):
        raise ValueError(f"invalid entry: {dict(entry)}")
    return dtype, tuple(shape), begin, end


def weight_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint, from its index or its single file.

    Raises:
        TableError: The index is invalid, or there is neither; or what `read_header` raises.
    """
    path = directory / INDEX_NAME
    if not path.exists():
        return _single_file(directory)
    try:
        names: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        files = {name: directory / file for name, file in names.items()}
        outside = [file for file in names.values() if Path(file).name != file]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        refuse_pointer(path, TableError)
        raise TableError(
            f"{path}: expected an index with a weight_map, found something else "
            f"({type(error).__name__}: {error})"
        ) from None
    if outside:
        raise TableError(f"{path}: expected names of files beside it, found {outside[0]!r}")
    return files


def _single_file(directory: Path) -> dict[str, Path]:
    path = directory / SINGLE_NAME
    if path.exists():
        return dict.fromkeys(tensor_names(path), path)
    beside = ""
    others = sorted(directory.glob("*.safetensors"))
    if others:
        beside = f": {len(others)} files such as {others[0].name}, whose index is missing"
    raise TableError(f"{directory}: expected {INDEX_NAME} or {SINGLE_NAME}, found neither{beside}")
