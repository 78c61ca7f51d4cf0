"""Tensors in safetensors files, where they lie: headers and index read here, rows by offset,
nothing loaded.

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

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
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
    """One tensor of a safetensors file. offset: of its first byte in the file. size: its bytes."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def rows(self) -> int:
        """First dimension."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * _ITEM_BYTES[self.dtype]

    def read(self, first: int, out_nR: np.ndarray) -> None:
        """Rows from row `first` on into uint8 [n, row_bytes], C-contiguous, past the mapping.

        Raises ShardTruncated where the file has become shorter, TableError where it cannot be read.
        """
        left, at = out_nR.reshape(-1).data, self.offset + first * self.row_bytes
        try:
            with open(self.path, "rb", buffering=0) as file:
                while left:
                    count = os.preadv(file.fileno(), [left], at)
                    if not count:
                        raise ShardTruncated(
                            f"{self.path}: expected {len(left)} more bytes at {at}, found the end"
                        )
                    left, at = left[count:], at + count
        except OSError as error:
            raise TableError(f"{self.path}: rows cannot be read ({error})") from error


def read_rows(tensors: Sequence[StoredTensor], first: int, out_nR: np.ndarray) -> None:
    """Rows of tensors that follow each other, of equal rows but the last, from row `first` on:
    uint8 [n, row_bytes]."""
    done = 0
    while done < len(out_nR):
        number, local = divmod(first + done, tensors[0].rows)
        count = min(len(out_nR) - done, tensors[number].rows - local)
        tensors[number].read(local, out_nR[done : done + count])
        done += count


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name; those of dtypes that no table has are left out.

    Raises ShardMissing, ShardTruncated (too short or too long for its header), ShardCorrupt (the
    header: tensors that overlap or leave gaps, too), TableError for what cannot be read and for a
    Git LFS pointer.
    """
    parsed, data = _parse_header(path)
    tensors = {
        name: StoredTensor(path, name, dtype, shape, data + begin, end - begin)
        for name, (dtype, shape, begin, end) in parsed.items()
        if dtype in _ITEM_BYTES
    }
    for tensor in tensors.values():
        if tensor.size != math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]:
            raise ShardCorrupt(
                f"{path}: {tensor.name}: {tensor.dtype} {list(tensor.shape)} is not {tensor.size} bytes"
            )
    return tensors


def tensor_names(path: Path) -> list[str]:
    """Names of all tensors of a safetensors file, of any dtype. Raises what `read_header` raises."""
    return list(_parse_header(path)[0])


def _parse_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int]:
    """Entries by name, and where the data begins."""
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
            text = file.read(length)
    except FileNotFoundError:
        raise ShardMissing(f"{path}: expected a safetensors file, found none") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise TableError(f"{str(path)!r}: it cannot be read ({error})") from error
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        parsed = {name: _entry(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ShardCorrupt(
            f"{path}: expected a safetensors header, found {text[:32]!r}... "
            f"({type(error).__name__}: {error})"
        ) from None
    data, end = 8 + length, max((end for _, _, _, end in parsed.values()), default=0)
    if size != data + end:
        raise ShardTruncated(
            f"{path}: expected {data + end} bytes, as its header says, found {size}"
        )
    spans = sorted((begin, end) for _, _, begin, end in parsed.values())
    if any(
        begin != before
        for (begin, _), before in zip(spans, [0, *(end for _, end in spans)], strict=False)
    ):
        raise ShardCorrupt(
            f"{path}: expected tensors that lie one after the other, found some that overlap or a gap"
        )
    return parsed, data


def _entry(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    numbers = [begin, end, *shape]
    impossible = (
        any(type(n) is not int or not 0 <= n < 2**63 for n in numbers)
        or len(shape) > _MAX_DIMENSIONS
    )
    if not isinstance(entry["dtype"], str) or impossible or begin > end:
        raise ValueError(f"an entry that cannot be: {dict(entry)}")
    return entry["dtype"], tuple(shape), begin, end


def weight_files(directory: Path) -> dict[str, Path]:
    """File of every tensor of a checkpoint, from its index or its single file.

    Raises TableError for an index that is none, or where there is neither; what `read_header`
    raises.
    """
    path = directory / INDEX_NAME
    if not path.exists():
        if not (directory / SINGLE_NAME).exists():
            others = sorted(directory.glob("*.safetensors"))
            beside = (
                f": {len(others)} files such as {others[0].name}, whose index is missing"
                if others
                else ""
            )
            raise TableError(
                f"{directory}: expected {INDEX_NAME} or {SINGLE_NAME}, found neither{beside}"
            )
        return dict.fromkeys(tensor_names(directory / SINGLE_NAME), directory / SINGLE_NAME)
    try:
        names = json.loads(path.read_bytes())["weight_map"]
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
