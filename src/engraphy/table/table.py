"""A table on disk: a directory with engram.json and safetensors shards. Knows files, neither stores
nor tokens.

    create / open "w"  ->  engram.json says "open"  ->  rows are written  ->  seal  ->  engram.json
    says "sealed"

Only a sealed table opens for reading, and renaming engram.json is the last act of a seal. A process
that dies before leaves an open table, whatever it was doing: open it for writing and seal it, and
it is whole again, its shards hashed anew. The format is in docs/table-format.md.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import random
import secrets
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import (
    ConfigError,
    DigestMismatch,
    RowOutOfRange,
    ShardCorrupt,
    TableError,
    TableUnsealed,
)
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..system.checks import check_array
from ..system.files import publish_folder, still_named, write_errors
from .manifest import FILE_NAME, Manifest
from .shards import HEADER_BYTES, MAX_SHARD_BYTES, Shard

LOCK_NAME = "writer.lock"


class Vocab(Protocol):
    """What a table needs of a vocabulary map (`vocab.VocabMap` is one)."""

    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Verified:
    """What `Table.verify` has hashed: shards of how many, and bytes of rows."""

    shards: int
    of: int
    bytes: int


class Table:
    """An open table; made by `Table.create` and `Table.open`. mode: "r", "w", or "closed"."""

    def __init__(
        self, manifest: Manifest, lock_fd: int | None, dirty: Iterable[Shard] = ()
    ) -> None:
        self._manifest = manifest
        self.mode = "r" if lock_fd is None else "w"
        self._gate = threading.RLock()  # no row is written while shards are hashed
        self._lock_fd = lock_fd
        self._owner = os.getpid()
        _ALL.add(self)
        # A forked child that drops its copy must not unlock, so the finalizer only closes.
        self._drop_lock = weakref.finalize(self, _close, lock_fd)
        self._dirty = {shard.name for shard in dirty}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: EngramConfig,
        fmt: RowFormat,
        vocab: Vocab,
        *,
        shard_rows: int | None = None,
        parent: str | None = None,
    ) -> Table:
        """A new table of zero rows, open for writing. Its rows are sparse: they take disk space as
        they are written.

        shard_rows: rows of a shard, by default as many as 1 GiB holds. parent: the table_id this
        one is made from. It appears whole. Raises TableError if `path` exists and is not an empty
        directory, ConfigError if config, fmt and vocab do not fit each other, WriteFailed if the
        system refuses.
        """
        directory = Path(os.path.abspath(path))
        if fmt.d != config.dim:
            raise ConfigError(
                f"row format: expected d = {config.dim}, the config's dim, found {fmt.d}"
            )
        if len(vocab) != config.hash.vocab_size:
            raise ConfigError(
                f"vocab: expected {config.hash.vocab_size} ids, the hash spec's vocab_size, "
                f"found {len(vocab)}"
            )
        shard_rows = (
            (MAX_SHARD_BYTES - HEADER_BYTES) // fmt.row_bytes if shard_rows is None else shard_rows
        )
        if isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
            raise ConfigError(f"shard_rows: expected a positive integer, found {shard_rows!r}")
        table_id, next_id = secrets.token_hex(16), secrets.token_hex(16)
        manifest = Manifest(
            directory, config, fmt, vocab.digest, shard_rows, table_id, parent, next_id, {}
        )
        lock_fd = None
        try:
            with publish_folder(directory, last=FILE_NAME, taken=TableError) as temporary:
                lock_fd = _build(dataclasses.replace(manifest, directory=temporary))
        except BaseException:
            _close(lock_fd)
            raise
        return cls(manifest, lock_fd, manifest.all_shards())

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: str = "r") -> Table:
        """An existing table. Looks at engram.json and at sizes and headers of the shards; content
        is `verify`'s matter.

        "r" needs a sealed table. "w" takes the table's one writer lock and marks it open before
        anything can be written; it also takes up a table that was left open. A reader open
        meanwhile sees what is being written. Raises TableError (no table, engram.json, another
        writer), TableUnsealed, ShardMissing, ShardForeign, ShardTruncated, ShardCorrupt,
        DigestMismatch (engram.json contradicts itself), ConfigError for another mode.
        """
        directory = Path(os.path.abspath(path))
        if mode not in ("r", "w"):
            raise ConfigError(f"mode: expected 'r' or 'w', found {mode!r}")
        manifest = Manifest.read(directory)
        if mode == "r":
            if manifest.next_id is not None:
                raise TableUnsealed(
                    f"{directory}: expected a sealed table, found one that was opened for writing and "
                    "not sealed since; Table.open(path, 'w').seal() takes it as it is"
                )
            _check_shards(manifest)
            return cls(manifest, None)
        lock_fd = _lock(directory)
        try:
            manifest = Manifest.read(directory)  # once more, now that nobody else can write it
            _check_shards(manifest)
            if (
                manifest.next_id is not None
            ):  # what its last writer wrote is not known: all shards count as changed
                return cls(manifest, lock_fd, manifest.all_shards())
            manifest = dataclasses.replace(manifest, next_id=secrets.token_hex(16))
            manifest.write()
            return cls(manifest, lock_fd)
        except BaseException:
            os.close(lock_fd)
            raise

    @property
    def path(self) -> Path:
        """The directory."""
        return self._manifest.directory

    @property
    def config(self) -> EngramConfig:
        """The memory that the table belongs to."""
        return self._manifest.config

    @property
    def fmt(self) -> RowFormat:
        """Format of the rows."""
        return self._manifest.fmt

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self._manifest.fmt.row_bytes

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that have rows."""
        return self._manifest.config.hash.layer_ids

    @property
    def shard_rows(self) -> int:
        """Rows of every shard but a layer's last."""
        return self._manifest.shard_rows

    @property
    def address_digest(self) -> str:
        """Identity of the addresses: hash spec, vocabulary map, d."""
        return self._manifest.address_digest

    @property
    def table_id(self) -> str:
        """Identity of the rows; a seal after a change gives a new one."""
        return self._manifest.table_id

    @property
    def changed(self) -> bool:
        """Whether rows may differ from those that were last sealed."""
        return bool(self._dirty)

    @property
    def parent(self) -> str | None:
        """The table_id that this table was made from or had before."""
        return self._manifest.parent

    def rows(self, layer: int) -> int:
        """Rows of a layer. Raises ConfigError for a layer that the table does not have."""
        return self._manifest.config.hash.row_count(layer)

    def shards(self, layer: int) -> list[Shard]:
        """The files that hold the rows of a layer. Raises ConfigError for a layer that the table
        does not have."""
        return self._manifest.shards(layer)

    def open_shard(self, shard: Shard) -> int:
        """A file descriptor of one of the table's shards, which the caller closes; writable while
        the table is.

        Raises like `open`.
        """
        self._expect("r", "w")
        return shard.open(self._manifest.table_ids, self.mode == "w")

    def check_address(self, digest: str) -> None:
        """Raise DigestMismatch unless `digest` is the table's address digest."""
        if digest != self.address_digest:
            raise DigestMismatch(
                f"{self.path}: expected a table of address digest {digest}, found "
                f"{self.address_digest}: another tokenizer, hash specification or row width"
            )

    def shard_arrays(self, layer: int) -> list[np.ndarray]:
        """The rows of a layer, mapped: uint8 [n, row_bytes] each, equal sizes but the last.

        Writable while the table is open for writing, inside `writing` only. Raises like `open`.
        """
        self._expect("r", "w")
        return [
            shard.map(self._manifest.table_ids, self.mode == "w") for shard in self.shards(layer)
        ]

    @contextmanager
    def writing(self, layer: int, shards: Iterable[int]) -> Iterator[None]:
        """Every change of rows happens inside this: it notes which shards (from 0) of a layer the
        seal has to hash.

        Raises TableError unless the table is open for writing.
        """
        with self._gate:
            self._expect("w")
            known = self._manifest.shards(layer)
            self._dirty.update(known[shard].name for shard in shards)
            yield

    def write_rows(self, layer: int, first: int, rows_NR: np.ndarray) -> None:
        """Write uint8 [N, row_bytes] to rows first..first+N-1 of a layer, without mapping them: for
        conversions.

        Raises RowOutOfRange, InputError (shape, dtype) or TableError (not open for writing) before
        anything is written.
        """
        check_array("rows", rows_NR, (None, self.row_bytes), (np.uint8,))
        if not 0 <= first <= first + len(rows_NR) <= self.rows(layer):
            raise RowOutOfRange(
                f"rows {first} to {first + len(rows_NR) - 1} of layer {layer}: "
                f"expected 0 to {self.rows(layer) - 1}"
            )
        size, last = self.shard_rows, first + len(rows_NR)
        touched = range(first // size, -(-last // size))
        with self.writing(layer, touched):
            shards = self._manifest.shards(layer)
            for number in touched:
                begin, end = max(first, number * size), min(last, (number + 1) * size)
                shards[number].write(begin - number * size, rows_NR[begin - first : end - first])

    def seal(self) -> str:
        """End writing: sync and hash the shards that may have changed, rename engram.json. The
        table is then mode "r".

        Returns the table_id: a new one, with the old as parent, where rows differ from those last
        sealed. Raises TableError unless the table is open for writing.
        """
        with self._gate:
            self._expect("w")
            old, shards = self._manifest, self._manifest.all_shards()
            dirty = [shard for shard in shards if shard.name in self._dirty]
            for shard in dirty:
                shard.sync()
            found = {
                shard.name: sha256 for shard, sha256 in zip(dirty, _hash_all(dirty), strict=True)
            }
            changed = any(
                old.sha256.get(name) not in (None, sha256) for name, sha256 in found.items()
            )
            sealed = dataclasses.replace(
                old,
                table_id=old.table_ids[-1] if changed else old.table_id,
                parent=old.table_id if changed else old.parent,
                next_id=None,
                sha256={**old.sha256, **found},
            )
            for shard in shards:
                if shard.check(old.table_ids) != sealed.table_id:
                    shard.write_id(sealed.table_id)
            sealed.write()
            self._manifest = sealed
            self._dirty.clear()
            self._unlock("r")
            return sealed.table_id

    def verify(self, sample: int | None = None) -> Verified:
        """Hash the rows of all shards, or of `sample` shards drawn at random, and compare with what
        was sealed.

        Raises ShardCorrupt naming shard, expected and found digest; TableUnsealed or TableError
        where the table is open for writing or was sealed anew since it was opened; for damaged
        files what `open` raises.
        """
        self._expect("r", "w")
        now = Manifest.read(self.path)
        if now.next_id is not None:
            raise TableUnsealed(
                f"{self.path}: expected a sealed table, found one that is open for writing"
            )
        if now.table_id != self.table_id:
            raise TableError(
                f"{self.path}: expected table {self.table_id}, found {now.table_id}: it was sealed anew"
            )
        shards = now.all_shards()
        if sample is not None and not 1 <= sample <= len(shards):
            raise ConfigError(f"sample: expected 1 to {len(shards)} shards, found {sample}")
        chosen = shards if sample is None else random.sample(shards, sample)
        for shard in chosen:
            shard.check(now.table_ids)
        for shard, found in zip(chosen, _hash_all(chosen), strict=True):
            if found != now.sha256[shard.name]:
                raise ShardCorrupt(
                    f"{shard.path}: expected rows of SHA-256 {now.sha256[shard.name]}, found {found}"
                )
        return Verified(
            len(chosen), len(shards), sum(shard.rows * shard.row_bytes for shard in chosen)
        )

    def close(self) -> None:
        """End the use of the table; a writer's lock is released, and what was not sealed stays
        unsealed."""
        with self._gate:
            self._unlock("closed")

    def _expect(self, *modes: str) -> None:
        if self.mode not in modes:
            raise TableError(
                f"{self.path}: expected a table open in mode {' or '.join(modes)}, found mode {self.mode}"
            )

    def _unlock(self, mode: str) -> None:
        self.mode = mode
        if self._lock_fd is not None:
            if (
                os.getpid() == self._owner
            ):  # a forked child must neither remove nor unlock what its parent holds
                path = self.path / LOCK_NAME
                with suppress(OSError):
                    if still_named(path, self._lock_fd):
                        path.unlink()
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            self._drop_lock()
            self._lock_fd = None


def _build(manifest: Manifest) -> int:
    """Make the files of a new table in manifest.directory; returns the held lock."""
    for shard in manifest.all_shards():
        shard.create(manifest.table_id)
    manifest.write()
    Manifest.read(
        manifest.directory
    )  # what cannot be read back is refused now, not after hours of writing
    return _lock(manifest.directory)


def _check_shards(manifest: Manifest) -> None:
    for shard in manifest.all_shards():
        shard.check(manifest.table_ids)


def _hash_all(shards: list[Shard]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(Shard.hash_rows, shards))


def _lock(directory: Path) -> int:
    """Take the lock of the one writer; returns its file descriptor.

    The file is there while somebody writes (and after a kill). Whoever holds the lock removes the
    file before giving it back, so a lock counts only if the file that was locked still has the
    name.
    """
    path = directory / LOCK_NAME
    while True:
        with write_errors(path, "the table is as it was"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise TableError(
                f"{directory}: expected no other writer, found the table open for writing elsewhere"
            ) from None
        if still_named(path, fd):
            return fd
        os.close(fd)  # its last holder removed it between the two calls


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


_ALL: weakref.WeakSet[Table] = weakref.WeakSet()


def _after_fork() -> None:
    for table in list(_ALL):
        table._gate = threading.RLock()  # the thread that held it may not be in the child


os.register_at_fork(after_in_child=_after_fork)
