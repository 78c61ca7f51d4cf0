"""Arrays in one file, which can be read as mapped memory: a safetensors file whose metadata has a
format.

Source: the safetensors format (8 bytes of header length, JSON that may end in spaces, data).
"""

from __future__ import annotations

import json
import math
import mmap
import operator
import os
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..system.files import publish_file
from ..system.lfs import refuse_pointer

_DTYPES = {"I64": np.dtype("<i8"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LINE = 64  # data begin with a cache line, and so do arrays of whole lines that come first
_MOST_HEADER = 1 << 20
_NO_HEADER = (TypeError, AttributeError, RecursionError)  # of JSON that is something else


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays of int64, int32 or uint32 to a file, which appears whole.

    Args:
        path: The file.
        arrays: Name -> array; they are written in this order.
        metadata: Name -> text; "format" says what the file is.

    Raises:
        WriteFailed: The system refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, values in arrays.items():
        begin = end
        end = begin + values.nbytes
        header[name] = {
            "dtype": _NAMES[values.dtype.newbyteorder("<")],
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    length = len(text) + -(8 + len(text)) % _LINE
    with publish_file(path) as file:
        file.write(length.to_bytes(8, "little") + text.ljust(length))
        for values in arrays.values():
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def read_arrays(
    path: str | os.PathLike[str], kind: str, mapped: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads what `write_arrays` wrote.

    Args:
        path: The file.
        kind: The expected "format" of the metadata.
        mapped: Map the file, one copy for all processes. Whoever shortens it then ends a process
            that reads it. False = read it into memory.

    Returns:
        Arrays that cannot be written, and the metadata.

    Raises:
        ConfigError: There is no such file, or it is damaged or of another kind.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEADER or (8 + length) % _LINE:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            metadata = {str(name): str(text) for name, text in header.pop("__metadata__").items()}
            if metadata["format"] != kind:
                raise ValueError(f"format {metadata['format']!r}")
            content = _mapped(file) if mapped else _read(file)
        data = content[8 + length :]
        arrays = {
            name: _array(data, entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in header.items()
        }
        end = max([0, *(entry["data_offsets"][1] for entry in header.values())])
        if len(data) != end:
            raise ValueError(f"{len(content)} bytes in place of {8 + length + end}")
    except (OSError, ArithmeticError, LookupError, ValueError, *_NO_HEADER) as error:
        refuse_pointer(path, ConfigError)
        found = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: expected a file of {kind}, found {found}") from None
    return arrays, metadata


def _mapped(file: BufferedReader) -> np.ndarray:
    """A file's bytes, mapped; a plain array, which pickles and prints as one."""
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _read(file: BufferedReader) -> np.ndarray:
    """A copy of a file's bytes, which begins with a page."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    memory = mmap.mmap(-1, size)
    found = file.readinto(memory)
    if found != size:
        raise ValueError(f"{found} bytes in place of {size}")
    content = np.frombuffer(memory, np.uint8)
    content.flags.writeable = False
    return content


def _array(data: np.ndarray, kind: str, shape: list[int], ends: list[int]) -> np.ndarray:
    dtype = _DTYPES[kind]
    count = math.prod(map(operator.index, shape))  # no product of Python's overflows
    size = count * dtype.itemsize
    begin, end = map(operator.index, ends)
    if min(shape, default=0) < 0 or end - begin != size or begin < 0 or begin % dtype.itemsize:
        raise ValueError(f"shape {shape} in bytes {ends}")
    return data[begin:end].view(dtype).reshape(shape)
