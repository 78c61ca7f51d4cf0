"""One shard: a safetensors file with the tensor `rows`, U8 [rows, row_bytes].

Its header is padded to 4096 bytes. This module defines every byte of a shard's header, and its
errors name the way in which a file differs. Shard and table_id determine the header, so a check is
a comparison; the header is parsed only for error messages.

Source: the safetensors format (8 bytes of header length, JSON that may end in spaces, data).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ShardCorrupt, ShardForeign, ShardMissing, ShardTruncated, TableError
from ..system.lfs import refuse_pointer
from .safetensors import StoredTensor

HEADER_BYTES = 4096  # a page, so that mappings and O_DIRECT reads can begin at row 0
MAX_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Shard:
    """The place and the size of one shard of a table.

    Attributes:
        path: The file.
        rows: Its number of rows.
        row_bytes: Bytes of a row.
    """

    path: Path
    rows: int
    row_bytes: int

    @property
    def name(self) -> str:
        """Name of the file. Its metadata repeats it, so that misplaced shards are found."""
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + self.rows * self.row_bytes

    @property
    def tensor(self) -> StoredTensor:
        """The tensor with its rows."""
        size = self.rows * self.row_bytes
        shape = (self.rows, self.row_bytes)
        return StoredTensor(self.path, "rows", "U8", shape, HEADER_BYTES, size)

    def header(self, table_id: str) -> bytes:
        """The 4096 bytes before row 0.

        The table_id comes first, so that rewriting it changes only one disk sector.
        """
        rows = {
            "dtype": "U8",
            "shape": [self.rows, self.row_bytes],
            "data_offsets": [0, self.rows * self.row_bytes],
        }
        metadata = {"table_id": table_id, "shard": self.name}
        text = json.dumps({"__metadata__": metadata, "rows": rows}, separators=(",", ":"))
        length = HEADER_BYTES - 8
        return length.to_bytes(8, "little") + text.encode().ljust(length)

    def create(self, table_id: str) -> None:
        """Makes the file and syncs it. All rows are zero; they are sparse and take no space."""
        with open(self.path, "xb") as file:
            file.write(self.header(table_id))
            file.truncate(self.size)
            file.flush()
            os.fsync(file.fileno())

    def check(self, table_ids: Collection[str]) -> str:
        """Checks presence, header and size of the file.

        Args:
            table_ids: The ids of the table that are valid.

        Returns:
            The table_id in the header, one of `table_ids`.

        Raises:
            ShardMissing: There is no file.
            ShardForeign: It belongs to another table, or to another place in this one.
            ShardTruncated: It is too short or too long.
            ShardCorrupt: Its header is damaged.
            TableError: The system cannot read it.
        """
        with self._open(os.O_RDONLY) as fd:
            return self._check(fd, table_ids)

    def open(self, table_ids: Collection[str], writable: bool) -> int:
        """Checks the file as `check` does. Returns a file descriptor, which the caller closes."""
        fd = self._open_fd(os.O_RDWR if writable else os.O_RDONLY)
        try:
            self._check(fd, table_ids)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def map(self, table_ids: Collection[str], writable: bool) -> np.ndarray:
        """Maps the rows as uint8 [rows, row_bytes], without read-ahead.

        Checks the file as `check` does.
        """
        with self._open(os.O_RDWR if writable else os.O_RDONLY) as fd:
            self._check(fd, table_ids)
            access = mmap.PROT_READ
            if writable:
                access |= mmap.PROT_WRITE
            memory = mmap.mmap(fd, self.size, flags=mmap.MAP_SHARED, prot=access)
        memory.madvise(mmap.MADV_RANDOM)
        rows_F = np.frombuffer(memory, np.uint8, offset=HEADER_BYTES)
        return rows_F.reshape(self.rows, self.row_bytes)

    def write(self, first: int, rows_NR: np.ndarray) -> None:
        """Writes rows from row `first` of this shard on. The caller checks bounds and dtype."""
        data = np.ascontiguousarray(rows_NR).reshape(-1).data
        offset = HEADER_BYTES + first * self.row_bytes
        with self._open(os.O_RDWR) as fd:
            while data:
                written = os.pwrite(fd, data, offset)
                data = data[written:]
                offset += written

    def write_id(self, table_id: str) -> None:
        """Writes another table_id into the header and syncs it."""
        with self._open(os.O_RDWR) as fd:
            os.pwrite(fd, self.header(table_id), 0)
            os.fsync(fd)

    def sync(self) -> None:
        """Syncs the file to disk, including writes through mappings of it."""
        with self._open(os.O_RDWR) as fd:
            os.fsync(fd)

    def hash_rows(self) -> str:
        """SHA-256 of the rows (all bytes after the header), as hex.

        Raises:
            TableError: The system cannot read them.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(HEADER_BYTES)
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(error) from error

    @contextmanager
    def _open(self, flags: int) -> Generator[int]:
        fd = self._open_fd(flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_fd(self, flags: int) -> int:
        try:
            return os.open(self.path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShardMissing(
                f"{self.path}: expected a shard of {self.size} bytes, found no file"
            ) from None
        except OSError as error:
            raise TableError(f"{self.path}: the shard cannot be opened ({error})") from error

    def _check(self, fd: int, table_ids: Collection[str]) -> str:
        try:
            header = os.pread(fd, HEADER_BYTES, 0)
            size = os.fstat(fd).st_size
        except OSError as error:  # a directory in its place, a broken disk
            raise self._unreadable(error) from error
        matching = [table_id for table_id in table_ids if header == self.header(table_id)]
        if not matching:
            raise self._diagnosis(header, size, table_ids)
        if size != self.size:
            raise ShardTruncated(
                f"{self.path}: expected {self.size} bytes ({self.rows} rows of {self.row_bytes}), "
                f"found {size}"
            )
        return matching[0]

    def _unreadable(self, error: OSError) -> TableError:
        return TableError(f"{self.path}: the shard cannot be read ({error})")

    def _diagnosis(self, header: bytes, size: int, table_ids: Collection[str]) -> TableError:
        """The error that says in which way a header is not that of this shard."""
        refuse_pointer(self.path, TableError)
        if size < HEADER_BYTES:
            return ShardTruncated(
                f"{self.path}: expected {self.size} bytes, found {size}: less than the header"
            )
        try:
            fields: Any = json.loads(header[8:])
            table_id = str(fields["__metadata__"]["table_id"])
            name = str(fields["__metadata__"]["shard"])
            shape = str(list(fields["rows"]["shape"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return ShardCorrupt(
                f"{self.path}: expected a shard's header of {HEADER_BYTES} bytes, found "
                f"{header[:32]!r}... ({type(error).__name__}: {error})"
            )
        if table_id not in table_ids:
            return ShardForeign(
                f"{self.path}: expected a shard of table {' or '.join(table_ids)}, "
                f"found one of table {table_id}"
            )
        if name != self.name:
            return ShardForeign(
                f"{self.path}: expected shard {self.name}, found shard {name} in its place"
            )
        if shape != str([self.rows, self.row_bytes]):
            return ShardCorrupt(
                f"{self.path}: expected rows of shape {[self.rows, self.row_bytes]}, found {shape}"
            )
        return ShardCorrupt(f"{self.path}: the header differs from that of the shard it names")


def shards_of(
    directory: Path, layer: int, rows: int, shard_rows: int, row_bytes: int
) -> list[Shard]:
    """The shards of a layer: `shard_rows` rows each, and the rest in the last one.

    The numbers in their names begin at 1.
    """
    count = -(-rows // shard_rows)
    shards: list[Shard] = []
    for index in range(count):
        name = f"layer-{layer:05d}-{index + 1:05d}-of-{count:05d}.safetensors"
        kept = min(shard_rows, rows - index * shard_rows)
        shards.append(Shard(directory / name, kept, row_bytes))
    return shards
