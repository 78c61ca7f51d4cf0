"""A table that all processes of a host share: one copy in memory.

A pool is one region that was published (pool_file.py, publish.py), or a directory that the first
process fills. The directory is that of a table on an in-memory file system (tmpfs such as
/dev/shm). It is filled under a temporary name and renamed when it is complete, so a pool under its
own name is always complete. The process that fills it holds a lock. If that process dies, the
system releases the lock, and the next process starts over.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
from pathlib import Path

from ..addresses.hot import FILE_NAME as HOT_INDEX
from ..errors import DigestMismatch, StoreError, TableError
from ..system.files import publish_folder
from ..table.manifest import FILE_NAME, Manifest
from ..table.table import Table
from .file import FileStore
from .mapping import check_size
from .pool_file import PoolFileStore, is_pool_file

_STEP = 1 << 26  # bytes that are copied at a time; the process can be interrupted in between


class PoolStore(FileStore):
    """One layer of a pool, mapped read-only."""

    kind = "pool"
    in_memory = True


def open_pool(
    path: str | os.PathLike[str],
    layer: int,
    source: str | os.PathLike[str] | None = None,
    populate: bool = True,
) -> PoolStore | PoolFileStore:
    """Opens the store of one layer of a pool.

    Args:
        path: the region that `publish_pool` wrote, or the directory of a pool.
        layer: the model's layer, 0-based.
        source: the directory of the table that the pool has to hold. If there is nothing at `path`,
            a directory is filled with all layers of that table; other processes that open it wait
            until it is filled.
        populate: map all pages into this process now. Otherwise the first read of each page takes
            a page fault.

    Raises:
        StoreError: if there is no pool and no source, or no room for the pool.
        DigestMismatch: if the pool holds another table.
        TableUnsealed: if a region is being published, or its publisher died.
        TableError: as `Table.open` and `PoolFileStore` raise it.
    """
    wanted = None if source is None else Table.open(source)
    if is_pool_file(path):
        store = PoolFileStore(path, layer, populate)
        try:
            _check_table(os.fspath(path), store.info.table_id, wanted)
            return store
        except BaseException:
            store.close()
            raise
    directory = Path(os.path.abspath(path))
    if not (directory / FILE_NAME).exists():
        if wanted is None:
            raise StoreError(
                f"pool {directory}: expected a pool that has been filled, found none; "
                "from=DIR fills it with the table at DIR, and engraphy table publish makes a pool"
            )
        wanted.rows(layer)  # raises now, before a long copy, if there is no such layer
        _fill(directory, wanted)
    table = Table.open(directory)
    try:
        _check_table(directory, table.table_id, wanted)
        return PoolStore(table, layer, close_table=True, populate=populate)
    except BaseException:
        table.close()
        raise


def _check_table(path: str | Path, found: str | None, wanted: Table | None) -> None:
    """Raises DigestMismatch if a pool holds another table than the one that is wanted."""
    if wanted is not None and found != wanted.table_id:
        raise DigestMismatch(
            f"pool {path}: expected table {wanted.table_id} of {wanted.path}, found table "
            f"{found}; remove the pool to have it filled again, or publish the table"
        )


def _fill(directory: Path, source: Table) -> None:
    """Copies the source to `directory`, unless another process does so first."""
    lock_path = directory.with_name(f".{directory.name}.lock")
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits until another process is done, or dies
            if not (directory / FILE_NAME).exists():
                _fill_locked(directory, source)
        finally:
            os.close(lock)
    except OSError as error:
        reason = "there is no room for it" if error.errno == errno.ENOSPC else "it cannot be filled"
        raise StoreError(f"pool {directory}: {reason} ({error})") from error


def _fill_locked(directory: Path, source: Table) -> None:
    with publish_folder(directory, last=FILE_NAME, taken=StoreError) as temporary:
        _copy(source, temporary)


def _copy(source: Table, target: Path) -> None:
    """Copies a whole table, engram.json last. Raises TableError if it was written meanwhile."""
    shards = [shard for layer in source.layers for shard in source.shards(layer)]
    for shard in shards:
        with open(target / shard.name, "xb") as file:
            # The whole file at once: on tmpfs even reading a hole takes memory.
            os.posix_fallocate(file.fileno(), 0, shard.size)
    for shard in shards:
        fd = source.open_shard(shard)
        try:
            _copy_data(fd, shard.size, target / shard.name)
        finally:
            os.close(fd)
    hot = source.hot
    if hot is not None:
        hot.save(target / HOT_INDEX)
        (target / HOT_INDEX).chmod(0o444)
    now = Manifest.read(source.path)
    if now.next_id is not None or now.table_id != source.table_id:
        raise TableError(
            f"{source.path}: expected table {source.table_id} to stay unchanged while it is copied "
            "to a pool, found that it was written"
        )
    dataclasses.replace(now, directory=target).write()
    Table.open(target).close()


def _copy_data(fd: int, size: int, target: Path) -> None:
    """Copies everything except holes into a file of zeros.

    Raises ShardTruncated if the source was truncated meanwhile.
    """
    with open(target, "r+b", buffering=0) as file:
        end = 0
        while (begin := _next_data(fd, end)) is not None:
            end = os.lseek(fd, begin, os.SEEK_HOLE)
            file.seek(begin)
            while begin < end:
                copied = os.sendfile(file.fileno(), fd, begin, min(_STEP, end - begin))
                if not copied:
                    break
                begin += copied
        check_size(target.name, size, os.fstat(fd).st_size)
        os.fchmod(file.fileno(), 0o444)


def _next_data(fd: int, position: int) -> int | None:
    """The offset of the next data from `position` on; None if only a hole is left."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
