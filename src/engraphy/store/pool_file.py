"""A pool in one region: a file, a memfd or a device that all processes map.

The region may be a plain file, a file of /dev/shm or hugetlbfs, a memfd (/proc/self/fd/N) or a DAX
device. A named file is published anew by a rename: who has mapped the old one reads on in it. A
memfd or a device has no second place, so it is written in place, which is refused while a process
of this host has it mapped. A process elsewhere that has it mapped gets ShardForeign.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import (
    ConfigError,
    ShardCorrupt,
    ShardForeign,
    ShardTruncated,
    StoreError,
    TableError,
    TableUnsealed,
)
from ..table.manifest import Manifest
from ..table.sealing import Verified
from .base import StoreInfo
from .mapped import MappedStore
from .mapping import PAGE, MappedFile, Watch
from .pool_header import BYTES, SEALED_AT, PoolHeader

_DEVICE_ALIGN = 1 << 21  # DAX devices are mapped in whole huge pages


class PoolFileStore(MappedStore):
    """One layer of a pool in one region, mapped read-only.

    Args:
        path: the region.
        layer: the model's layer, 0-based.
        populate: map all rows of the layer into this process now, and treat them as rows in memory
            from then on.

    Attributes:
        header: what the region holds.

    Raises:
        ConfigError: if the pool does not have the layer.
        TableUnsealed: if the region is being published, or its publisher died.
        TableError, ShardCorrupt, ShardTruncated: if it holds no pool, or a damaged one.
    """

    kind = "pool"

    def __init__(self, path: str | os.PathLike[str], layer: int, populate: bool = True) -> None:
        with attached(path) as (fd, header):
            place = header.layers.get(layer)
            if place is None:
                raise ConfigError(
                    f"{path}: expected one of the layers {list(header.layers)}, found {layer!r}"
                )
            file = _Region(fd, os.fspath(path), header)
        row_bytes = header.row_format.row_bytes
        memory = file.records(place.offset, place.rows, row_bytes)
        super().__init__([memory], Watch([file]))
        self.header = header
        self.tells_residency = file.tells_residency
        self.in_memory = populate
        reads = ["mmap"]
        if populate:
            reads.append(file.populate(place.offset, place.offset + place.rows * row_bytes))
        self._info = StoreInfo(
            self.kind,
            place.rows,
            row_bytes,
            False,
            header.table_id,
            layer,
            os.fspath(path),
            header.row_format,
            header.address_digest,
            ", ".join(reads),
        )

    @property
    def info(self) -> StoreInfo:
        return self._info


class _Region(MappedFile):
    """A mapped region, which is in doubt as soon as it is written anew."""

    def __init__(self, fd: int, path: str, header: PoolHeader) -> None:
        super().__init__(fd, path, header.size)
        self._header = header
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)

    def check_size(self) -> None:
        """Raises ShardTruncated or ShardForeign unless the region is as it was mapped."""
        if self._is_file:
            super().check_size()
        sealed = int.from_bytes(self._memory[SEALED_AT : SEALED_AT + 8], "little")
        if sealed != self._header.epoch or not self._memory[-1]:
            raise ShardForeign(
                f"{self.path}: expected epoch {self._header.epoch} of the pool, found it written "
                "anew while it was served; open the store again"
            )


def is_pool_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path may lead to a region: to anything that is there and is no folder."""
    return os.path.exists(path) and not os.path.isdir(path)


def read_header(path: str | os.PathLike[str]) -> PoolHeader:
    """What a region holds now: a new epoch shows that a table was published since.

    Raises:
        StoreError: if there is nothing.
        TableUnsealed, TableError, ShardCorrupt, ShardTruncated: as `PoolFileStore` raises them.
    """
    with attached(path) as (_, header):
        return header


def verify_pool(path: str | os.PathLike[str]) -> Verified:
    """Hashes the rows of a region, and compares the hashes with those that the table was sealed
    with.

    Returns:
        What was hashed: the shards of the table, whose rows lie one after the other.

    Raises:
        ShardCorrupt: if rows differ. Names the shard and both digests.
        StoreError, TableError: as `read_header` does.
    """
    with attached(path) as (fd, header):
        region = _Region(fd, os.fspath(path), header)
    watch = Watch([region])
    watch.before()
    memory = np.asarray(region).data
    first, length = header.manifest
    table = Manifest.of_text(bytes(memory[first : first + length]), Path(path))
    total = 0
    for layer, place in header.layers.items():
        at = place.offset
        for shard in table.shards(layer):
            end = at + shard.rows * shard.row_bytes
            found = hashlib.sha256(memory[at:end]).hexdigest()
            watch.after()  # of a region that was written anew the hash says nothing
            if found != table.sha256[shard.name]:
                raise ShardCorrupt(
                    f"{path}, {shard.name}: expected rows of SHA-256 {table.sha256[shard.name]}, "
                    f"found {found}"
                )
            total += end - at
            at = end
    count = len(table.all_shards())
    return Verified(count, count, total)


@contextmanager
def attached(path: str | os.PathLike[str]) -> Generator[tuple[int, PoolHeader]]:
    """A sealed region, open for reading, and its header.

    A mapping that is made within the block keeps the region's lock for as long as it lives: it is a
    lock of the open file, which the mapping duplicates.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StoreError(
            f"pool {path}: expected a pool that has been published, found none; engraphy table "
            "publish makes one of a table"
        ) from None
    except OSError as error:
        raise TableError(f"pool {path}: it cannot be opened ({error})") from error
    try:
        is_free = not is_in_place(fd) or _lock(fd, fcntl.LOCK_SH)
        try:
            header = PoolHeader.of(first_bytes(fd), os.fspath(path))
        except OSError as error:
            raise TableError(f"pool {path}: it cannot be read ({error})") from error
        _check_sealed(path, header, is_free)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            found = os.fstat(fd).st_size
            if found < header.size:
                raise ShardTruncated(f"{path}: expected {header.size} bytes, found {found}")
        yield fd, header
    finally:
        os.close(fd)


def _check_sealed(path: str | os.PathLike[str], header: PoolHeader, is_free: bool) -> None:
    expected = f"{path}: expected a sealed pool, found that"
    if not is_free:
        raise TableUnsealed(f"{expected} {header.publisher} is publishing it; try again")
    if not header.sealed:
        raise TableUnsealed(
            f"{expected} {header.publisher} did not finish publishing epoch {header.epoch}; "
            "publish it again"
        )


def is_in_place(fd: int) -> bool:
    """Whether a region is written in place: it has no name that another file could get."""
    status = os.fstat(fd)
    return not stat.S_ISREG(status.st_mode) or status.st_nlink == 0


def lock_to_write(fd: int, path: str | os.PathLike[str]) -> None:
    """Locks a region that is written in place. Raises StoreError if somebody has it mapped."""
    if not _lock(fd, fcntl.LOCK_EX):
        raise StoreError(
            f"pool {path}: expected no process that reads or writes it, since it has to be written "
            "in place, found one; close its readers, or publish to another region"
        )


def _lock(fd: int, kind: int) -> bool:
    """Takes a lock if nobody holds one against it. A file system without locks gives it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def granule(fd: int) -> int:
    """What the size of a region has to be a multiple of: a page, or a huge page."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return max(PAGE, os.fstatvfs(fd).f_bsize)  # of hugetlbfs, that is its page
    return _DEVICE_ALIGN


def first_bytes(fd: int) -> bytes:
    """The first 4096 bytes; fewer if there are not so many. A character device is only mapped."""
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        return os.pread(fd, BYTES, 0)
    with mmap.mmap(fd, _DEVICE_ALIGN, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        return memory[:BYTES]
