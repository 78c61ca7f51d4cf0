"""A table that all processes of a host share: one copy in memory, made by whoever comes first.

A pool is a directory of a table, on a file system that is memory (tmpfs such as /dev/shm, or DAX
over a CXL or persistent memory device). It is filled beside its place, under a lock that the system
takes back from a process that dies, and renamed when it is whole: what is there under its name is
complete, and half a pool is begun anew.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
from pathlib import Path

from ..errors import DigestMismatch, StoreError, TableError
from ..system.files import publish_folder
from ..table.manifest import FILE_NAME, Manifest
from ..table.table import Table
from .file import FileStore
from .mapping import check_size

_STEP = 1 << 26  # bytes that are copied at a time: between two steps the process can be interrupted


class PoolStore(FileStore):
    """One layer of a pool, mapped read-only."""

    kind = "pool"
    in_memory = True


def open_pool(
    path: str | os.PathLike[str],
    layer: int,
    source: str | os.PathLike[str] | None = None,
    populate: bool = True,
) -> PoolStore:
    """The store of `layer` of the pool at `path`; source: the directory of the table that it has to
    hold.

    With a source a pool that is not there is filled, all layers of it; other processes that open it
    wait meanwhile. populate: put all pages into this process' page table now, or the first reads
    take a fault each. Raises StoreError where there is no pool and no source, or no room for it;
    DigestMismatch where the pool holds another table; and what `Table.open` raises.
    """
    directory = Path(os.path.abspath(path))
    wanted = None if source is None else Table.open(source)
    if not (directory / FILE_NAME).exists():
        if wanted is None:
            raise StoreError(
                f"pool {directory}: expected a pool that has been filled, found none; from=DIR fills it "
                "with the table at DIR"
            )
        wanted.rows(layer)  # before a long copy: whether there is such a layer
        _fill(directory, wanted)
    table = Table.open(directory)
    try:
        if wanted is not None and table.table_id != wanted.table_id:
            raise DigestMismatch(
                f"pool {directory}: expected table {wanted.table_id} of {wanted.path}, found table "
                f"{table.table_id}; remove the pool to have it filled anew"
            )
        return PoolStore(table, layer, close_table=True, populate=populate)
    except BaseException:
        table.close()
        raise


def _fill(directory: Path, source: Table) -> None:
    """Put a copy of the source at `directory`, unless another process has."""
    try:
        lock = os.open(
            directory.with_name(f".{directory.name}.lock"),
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
            0o666,
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the process that fills it is done, or dies
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
    """A whole copy, engram.json last. Raises TableError where the source was written meanwhile."""
    shards = [shard for layer in source.layers for shard in source.shards(layer)]
    for shard in shards:
        with open(target / shard.name, "xb") as file:
            os.posix_fallocate(
                file.fileno(), 0, shard.size
            )  # reading a hole of a tmpfs takes memory, too
    for shard in shards:
        fd = source.open_shard(shard)
        try:
            _copy_data(fd, shard.size, target / shard.name)
        finally:
            os.close(fd)
    now = Manifest.read(source.path)
    if now.next_id is not None or now.table_id != source.table_id:
        raise TableError(
            f"{source.path}: expected table {source.table_id} to stay as it is while a pool is filled "
            "with it, found it written"
        )
    dataclasses.replace(now, directory=target).write()
    Table.open(target).close()


def _copy_data(fd: int, size: int, target: Path) -> None:
    """What is not a hole, into a file of zeros. Raises ShardTruncated where the source has become
    shorter."""
    with open(target, "r+b", buffering=0) as file:
        end = 0
        while (begin := _next_data(fd, end)) is not None:
            end = os.lseek(fd, begin, os.SEEK_HOLE)
            file.seek(begin)
            while begin < end and (
                copied := os.sendfile(file.fileno(), fd, begin, min(_STEP, end - begin))
            ):
                begin += copied
        check_size(target.name, size, os.fstat(fd).st_size)
        os.fchmod(file.fileno(), 0o444)


def _next_data(fd: int, position: int) -> int | None:
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a hole up to the end
            return None
        raise
