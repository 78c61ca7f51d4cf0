"""One shard: a safetensors file with the tensor `rows`, U8 [rows, row_bytes], and its header padded
to 4096 bytes.

Knows what a shard must look like, byte for byte, and says by name in which way a file does not. The
header is the same for the same shard and table_id, so checking it is a comparison; a look inside is
only for the message.

Source: the safetensors format (8 bytes of header length, JSON that may end in spaces, data).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ShardCorrupt, ShardForeign, ShardMissing, ShardTruncated, TableError
from ..system.lfs import refuse_pointer

HEADER_BYTES = (
    4096  # row 0 lies at this byte: a page, so that mappings and O_DIRECT reads can begin there
)
MAX_SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Shard:
    """Where one shard of a table lies and what is in it."""

    path: Path
    rows: int
    row_bytes: int

    @property
    def name(self) -> str:
        """Name of the file, which its metadata repeats: a shard in the place of another is found."""
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + self.rows * self.row_bytes

    def header(self, table_id: str) -> bytes:
        """The 4096 bytes before row 0. The table_id comes first: it is rewritten in place within
        one disk sector."""
        text = json.dumps(
            {
                "__metadata__": {"table_id": table_id, "shard": self.name},
                "rows": {
                    "dtype": "U8",
                    "shape": [self.rows, self.row_bytes],
                    "data_offsets": [0, self.rows * self.row_bytes],
                },
            },
            separators=(",", ":"),
        )
        length = HEADER_BYTES - 8
        return length.to_bytes(8, "little") + text.encode().ljust(length)

    def create(self, table_id: str) -> None:
        """Make the file, synced: all rows zero and sparse, so that they take no space."""
        with open(self.path, "xb") as file:
            file.write(self.header(table_id))
            file.truncate(self.size)
            file.flush()
            os.fsync(file.fileno())

    def check(self, table_ids: Collection[str]) -> str:
        """The table_id in the header, one of `table_ids`.

        Raises ShardMissing, ShardForeign, ShardTruncated (too short or too long) or ShardCorrupt
        (the header).
        """
        with self._open(os.O_RDONLY) as fd:
            return self._check(fd, table_ids)

    def open(self, table_ids: Collection[str], writable: bool) -> int:
        """A file descriptor, which the caller closes; checked like `check`."""
        fd = self._open_fd(os.O_RDWR if writable else os.O_RDONLY)
        try:
            self._check(fd, table_ids)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def map(self, table_ids: Collection[str], writable: bool) -> np.ndarray:
        """Rows as uint8 [rows, row_bytes] over the file's pages, without read-ahead; checked like
        `check`."""
        with self._open(os.O_RDWR if writable else os.O_RDONLY) as fd:
            self._check(fd, table_ids)
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            memory = mmap.mmap(fd, self.size, flags=mmap.MAP_SHARED, prot=access)
        memory.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(memory, np.uint8, offset=HEADER_BYTES).reshape(
            self.rows, self.row_bytes
        )

    def write(self, first: int, rows_NR: np.ndarray) -> None:
        """Write rows from row `first` of this shard on; the caller has checked bounds and dtype."""
        data = np.ascontiguousarray(rows_NR).reshape(-1).data
        offset = HEADER_BYTES + first * self.row_bytes
        with self._open(os.O_RDWR) as fd:
            while data:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written

    def write_id(self, table_id: str) -> None:
        """Put another table_id into the header, synced."""
        with self._open(os.O_RDWR) as fd:
            os.pwrite(fd, self.header(table_id), 0)
            os.fsync(fd)

    def sync(self) -> None:
        """Bring to disk what was written to the file or to a mapping of it."""
        with self._open(os.O_RDWR) as fd:
            os.fsync(fd)

    def hash_rows(self) -> str:
        """SHA-256 of the rows (all bytes after the header), as hex. Raises TableError where they
        cannot be read."""
        try:
            with open(self.path, "rb") as file:
                file.seek(HEADER_BYTES)
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._unreadable(error) from error

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
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
            found, size = os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size
        except OSError as error:  # a directory in its place, a broken disk
            raise self._unreadable(error) from error
        matching = [table_id for table_id in table_ids if found == self.header(table_id)]
        if not matching:
            raise self._diagnosis(found, size, table_ids)
        if size != self.size:
            raise ShardTruncated(
                f"{self.path}: expected {self.size} bytes ({self.rows} rows of {self.row_bytes}), "
                f"found {size}"
            )
        return matching[0]

    def _unreadable(self, error: OSError) -> TableError:
        return TableError(f"{self.path}: the shard cannot be read ({error})")

    def _diagnosis(self, found: bytes, size: int, table_ids: Collection[str]) -> Exception:
        refuse_pointer(self.path, TableError)
        if size < HEADER_BYTES:
            return ShardTruncated(
                f"{self.path}: expected {self.size} bytes, found {size}: less than the header"
            )
        try:
            header = json.loads(found[8:])
            metadata, rows = header["__metadata__"], header["rows"]
            table_id, name, shape = (
                str(metadata["table_id"]),
                str(metadata["shard"]),
                str(list(rows["shape"])),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return ShardCorrupt(
                f"{self.path}: expected a shard's header of {HEADER_BYTES} bytes, found "
                f"{found[:32]!r}... ({type(error).__name__}: {error})"
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
    """The shards of a layer: `shard_rows` rows each, the last one what is left. Their names count
    from 1."""
    count = -(-rows // shard_rows)
    return [
        Shard(
            directory / f"layer-{layer:05d}-{index + 1:05d}-of-{count:05d}.safetensors",
            min(shard_rows, rows - index * shard_rows),
            row_bytes,
        )
        for index in range(count)
    ]
