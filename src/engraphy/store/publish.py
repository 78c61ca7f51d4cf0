"""Publishes a table as a pool in one region: `publish_pool`."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from ..errors import ShardCorrupt, ShardTruncated, StoreError, TableError
from ..system.files import publish_file
from ..system.write_errors import write_errors
from ..table.manifest import FILE_NAME, Manifest
from ..table.shards import HEADER_BYTES, Shard
from ..table.table import Table
from .pool_file import first_bytes, granule, is_in_place, lock_to_write
from .pool_header import BYTES, SEALED_AT, PoolHeader

_STEP = 1 << 23  # bytes that are copied, and hashed, at a time
_MOST_THREADS = 8

Progress = Callable[[str, int, int], None]


def publish_pool(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Progress | None = None,
) -> PoolHeader:
    """Publishes a sealed table as a pool, or as the next epoch of one.

    The rows are compared with the table's checksums on the way. A named file appears whole, by a
    rename, and its readers end on the old one. A memfd (/proc/self/fd/N) or a device is written in
    place.

    Args:
        source: the folder of the table.
        target: a file, on a disk, /dev/shm or hugetlbfs; or a memfd or a DAX device.
        progress: called with the name of the work, bytes done, and bytes in all.

    Returns:
        The header of what was published.

    Raises:
        TableError: if the table cannot be used as it is, or was written meanwhile.
        ShardCorrupt: if rows of the table are not those that were sealed. Nothing is published.
        StoreError: if the region is too small, or has to be written in place while it is read.
        WriteFailed: if the system refuses, or has no room.
    """
    table = Table.open(source)
    try:
        if _has_no_name(target):
            return _publish_in_place(table, os.fspath(target), progress)
        with _alone(Path(target)):
            epoch = _epoch_of(target) + 1
            with publish_file(target) as file:
                return _write(table, file.fileno(), target, epoch, progress)
    finally:
        table.close()


@contextmanager
def _alone(target: Path) -> Generator[None]:
    """Waits until no other process publishes the same pool."""
    path = target.with_name(f".{target.name}.lock")
    with write_errors(target):
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _has_no_name(target: str | os.PathLike[str]) -> bool:
    """Whether there is a region that has to be written in place."""
    try:
        status = os.stat(target)
    except OSError:
        return False
    if stat.S_ISDIR(status.st_mode):
        raise StoreError(
            f"pool {target}: expected a file, a memfd or a device to publish to, found a folder"
        )
    return not stat.S_ISREG(status.st_mode) or status.st_nlink == 0


def _epoch_of(target: str | os.PathLike[str]) -> int:
    """The epoch of the pool at a path; 0 if there is none."""
    try:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return _header_of(fd).epoch
    except (TableError, ShardCorrupt):
        return 0
    finally:
        os.close(fd)


def _header_of(fd: int) -> PoolHeader:
    return PoolHeader.of(first_bytes(fd), "the region")


def _publish_in_place(table: Table, target: str, progress: Progress | None) -> PoolHeader:
    with write_errors(Path(target), "the pool is not sealed: publish it again"):
        fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        try:
            assert is_in_place(fd)
            lock_to_write(fd, target)
            epoch = 0
            try:
                old = _header_of(fd)
                epoch = old.epoch
                _unseal(fd, old)
            except (TableError, ShardCorrupt):
                pass  # no pool yet
            return _write(table, fd, target, epoch + 1, progress)
        finally:
            os.close(fd)


def _unseal(fd: int, old: PoolHeader) -> None:
    """Ends the old pool for readers that hold no lock here, before a byte of it is written."""
    with mmap.mmap(fd, old.size, mmap.MAP_SHARED) as memory:
        memory[SEALED_AT : SEALED_AT + 8] = bytes(8)
        memory[old.size - 1] = 0
        memory.flush()


def _write(
    table: Table,
    fd: int,
    target: str | os.PathLike[str],
    epoch: int,
    progress: Progress | None,
) -> PoolHeader:
    """Writes rows, engram.json and header into an open region, and seals it."""
    text = (table.path / FILE_NAME).read_bytes()
    manifest = Manifest.of_text(text, table.path)
    header = PoolHeader.plan(manifest, epoch, len(text), granule(fd))
    described = header.to_bytes()
    _make_room(fd, target, header.size)
    with mmap.mmap(fd, header.size, mmap.MAP_SHARED) as memory:
        memory[:BYTES] = described
        memory[header.size - 1] = 0
        _copy_shards(table, manifest, header, memory, progress)
        first, length = header.manifest
        memory[first : first + length] = text
        _check_unchanged(table)
        memory.flush()
        memory[header.size - 1] = 1
        memory[SEALED_AT : SEALED_AT + 8] = struct.pack("<Q", epoch)
        memory.flush()
    return dataclasses.replace(header, sealed=True)


def _make_room(fd: int, target: str | os.PathLike[str], size: int) -> None:
    """Reserves the region, so that a full disk is an error and not a SIGBUS."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        os.posix_fallocate(fd, 0, size)
        return
    found = _device_bytes(fd, status)
    if found < size:
        raise StoreError(f"pool {target}: expected a device of {size} bytes, found {found}")


def _device_bytes(fd: int, status: os.stat_result) -> int:
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(fd, 0, os.SEEK_END)
    device = status.st_rdev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        return int(Path("/sys/dev/char", number, "size").read_text())
    except (OSError, ValueError):
        return 0


def _copy_shards(
    table: Table,
    manifest: Manifest,
    header: PoolHeader,
    memory: mmap.mmap,
    progress: Progress | None,
) -> None:
    places: list[tuple[Shard, int]] = []
    for layer, place in header.layers.items():
        at = place.offset
        for shard in table.shards(layer):
            places.append((shard, at))
            at += shard.rows * shard.row_bytes
    total = sum(shard.rows * shard.row_bytes for shard, _ in places)
    done = 0

    def copy(item: tuple[Shard, int]) -> tuple[Shard, str]:
        shard, at = item
        return shard, _copy_shard(table, shard, memory, at)

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        for shard, found in threads.map(copy, places):
            expected = manifest.sha256[shard.name]
            if found != expected:
                raise ShardCorrupt(
                    f"{shard.path}: expected rows of SHA-256 {expected}, found {found}; it is not "
                    "published"
                )
            done += shard.rows * shard.row_bytes
            if progress is not None:
                progress("publish", done, total)


def _copy_shard(table: Table, shard: Shard, memory: mmap.mmap, at: int) -> str:
    """Reads the rows of a shard straight into the region. Returns the SHA-256 of what is there."""
    digest = hashlib.sha256()
    size = shard.rows * shard.row_bytes
    fd = table.open_shard(shard)
    try:
        with memoryview(memory) as region:
            done = 0
            while done < size:
                with region[at + done : at + min(size, done + _STEP)] as part:
                    count = os.preadv(fd, [part], HEADER_BYTES + done)
                    digest.update(part[:count])
                if not count:
                    raise ShardTruncated(
                        f"{shard.path}: expected {size} bytes of rows, found {done}: it was "
                        "changed while it was published"
                    )
                done += count
    finally:
        os.close(fd)
    return digest.hexdigest()


def _check_unchanged(table: Table) -> None:
    """Raises TableError if the table was opened for writing while it was copied."""
    now = Manifest.read(table.path)
    if now.next_id is not None or now.table_id != table.table_id:
        raise TableError(
            f"{table.path}: expected table {table.table_id} to stay unchanged while it is "
            "published, found that it was written"
        )
