"""Hashing of shards: what a seal writes into them, and what verifying compares."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import ShardCorrupt, TableError, TableUnsealed
from ..system.checks import as_int
from .manifest import Manifest
from .shards import Shard

_MOST_THREADS = 8


@dataclass(frozen=True)
class Verified:
    """What `Table.verify` has hashed.

    Attributes:
        shards: Number of shards that were hashed.
        of: Number of shards that the table has.
        bytes: Bytes of rows that were hashed.
    """

    shards: int
    of: int
    bytes: int


def seal_shards(opened: Manifest, dirty: Collection[str]) -> Manifest:
    """Brings the shards of an open table to the state that a seal gives them.

    Syncs and hashes the dirty shards. If a hash differs from the one of the last seal, the table
    gets its next id, which is written into every shard.

    Args:
        opened: The manifest of the table, open for writing.
        dirty: Names of the shards whose rows may have changed.

    Returns:
        The manifest of the sealed table, which is still to be written.

    Raises:
        TableError: A shard is missing, damaged, or cannot be read.
    """
    shards = opened.all_shards()
    written = [shard for shard in shards if shard.name in dirty]
    for shard in written:
        shard.sync()
    hashes = {shard.name: sha256 for shard, sha256 in zip(written, _hash_all(written), strict=True)}
    sealed = _sealed(opened, hashes)
    for shard in shards:
        if shard.check(opened.table_ids) != sealed.table_id:
            shard.write_id(sealed.table_id)
    return sealed


def _sealed(opened: Manifest, hashes: dict[str, str]) -> Manifest:
    sealed = dataclasses.replace(opened, next_id=None, sha256={**opened.sha256, **hashes})
    changed = [name for name, new in hashes.items() if opened.sha256.get(name) not in (None, new)]
    if changed:
        sealed = dataclasses.replace(sealed, table_id=opened.table_ids[-1], parent=opened.table_id)
    return sealed


def verify_table(path: Path, table_id: str, sample: int | None) -> Verified:
    """Hashes the rows of shards of a sealed table, and its hot index; see `Table.verify`.

    Args:
        path: The table's directory.
        table_id: The id that the table is expected to have.
        sample: Number of shards to hash, drawn at random; None = all.
    """
    now = Manifest.read(path)
    if now.next_id is not None:
        raise TableUnsealed(f"{path}: expected a sealed table, found one that is open for writing")
    if now.table_id != table_id:
        raise TableError(
            f"{path}: expected table {table_id}, found {now.table_id}: it was sealed again"
        )
    shards = now.all_shards()
    chosen = shards
    if sample is not None:
        count = as_int("sample", sample, 1, len(shards))
        chosen = random.sample(shards, count)
    _verify_shards(now, chosen)
    now.index()
    size = sum(shard.rows * shard.row_bytes for shard in chosen)
    return Verified(len(chosen), len(shards), size)


def _verify_shards(sealed: Manifest, shards: list[Shard]) -> None:
    for shard in shards:
        shard.check(sealed.table_ids)
    for shard, sha256 in zip(shards, _hash_all(shards), strict=True):
        expected = sealed.sha256[shard.name]
        if sha256 != expected:
            raise ShardCorrupt(f"{shard.path}: expected rows of SHA-256 {expected}, found {sha256}")


def _hash_all(shards: list[Shard]) -> list[str]:
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(Shard.hash_rows, shards))
