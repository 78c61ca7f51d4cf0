"""A table on disk: a directory with engram.json and safetensors shards.

It knows files, but neither stores nor tokens.

    create / open "w"  ->  engram.json says "open"
    write rows
    seal               ->  engram.json says "sealed"

Only a sealed table opens for reading, and renaming engram.json is the last step of a seal. A
process that dies earlier leaves an open table. To repair it, open it for writing and seal it: the
seal hashes all its shards again. docs/guide/table-format.md describes the format.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..addresses.hot import HotIndex
from ..errors import ConfigError, DigestMismatch, RowOutOfRange, TableError, TableUnsealed
from ..rows.format import RowFormat
from ..spec.config import EngramConfig
from ..system.checks import as_int, check_array
from ..system.files import publish_folder
from .creation import Vocab, build, check_parts
from .lock import WriterLock
from .manifest import FILE_NAME, Manifest
from .safetensors import read_rows
from .sealing import Verified, seal_shards, verify_table
from .shards import HEADER_BYTES, MAX_SHARD_BYTES, Shard


class Table:
    """An open table; made by `Table.create` and `Table.open`.

    Attributes:
        mode: "r", "w", or "closed".
    """

    def __init__(
        self, manifest: Manifest, lock: WriterLock | None, dirty: Iterable[Shard] = ()
    ) -> None:
        self._manifest = manifest
        self._lock = lock
        self.mode = "r" if lock is None else "w"
        self._dirty = {shard.name for shard in dirty}
        self._gate = threading.RLock()  # no row is written while shards are hashed
        _ALL.add(self)

    def __repr__(self) -> str:
        rows = {layer: self.rows(layer) for layer in self.layers}
        state = "sealed" if self._manifest.next_id is None else "open"
        return (
            f"Table({str(self.path)!r}, rows={rows}, format={self.fmt!r}, "
            f"table_id={self.table_id!r}, state={state!r}, mode={self.mode!r})"
        )

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
        hot: HotIndex | None = None,
    ) -> Table:
        """Makes a new table of zero rows, open for writing.

        The table appears whole. Its rows are sparse: they take disk space only as they are written.

        Args:
            path: A new or empty directory.
            config: The memory that the table belongs to.
            fmt: Format of the rows; its d is config.dim.
            vocab: The vocabulary map, of config.hash.vocab_size ids.
            shard_rows: Rows of a shard; by default as many as 1 GiB holds.
            parent: The table_id of the table that this one is made from; None = from no table.
            hot: The hot index that the config names; it is written into the directory.

        Raises:
            TableError: `path` exists and is not an empty directory.
            ConfigError: config, fmt, vocab and hot do not fit each other, or shard_rows is invalid.
            DigestMismatch: `hot` is another index than the config names.
            WriteFailed: The system refuses.
        """
        directory = Path(os.path.abspath(path))
        check_parts(config, fmt, vocab, hot)
        if shard_rows is None:
            shard_rows = (MAX_SHARD_BYTES - HEADER_BYTES) // fmt.row_bytes
        manifest = Manifest(
            directory,
            config,
            fmt,
            vocab_digest=vocab.digest,
            shard_rows=as_int("shard_rows", shard_rows, 1),
            table_id=secrets.token_hex(16),
            parent=parent,
            next_id=secrets.token_hex(16),
            sha256={},
        )
        lock = None
        try:
            with publish_folder(directory, last=FILE_NAME, taken=TableError) as temporary:
                lock = build(dataclasses.replace(manifest, directory=temporary), hot)
        except BaseException:
            if lock is not None:
                lock.drop()
            raise
        return cls(manifest, lock, manifest.all_shards())

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: str = "r") -> Table:
        """Opens an existing table.

        Checks engram.json, and the sizes and headers of the shards; `verify` checks their content.
        Mode "w" also accepts a table that was left open. Readers that are open at the same time see
        rows as they are written.

        Args:
            path: The table's directory.
            mode: "r" needs a sealed table. "w" takes the table's one writer lock, and marks the
                table as open before anything can be written.

        Raises:
            TableError: There is no table, engram.json is invalid, or there is another writer.
            TableUnsealed: The table is open, and mode is "r".
            ShardMissing: A shard or the hot index is not there.
            ShardForeign: A shard belongs to another table, or the hot index is another one.
            ShardTruncated: A shard or the hot index is too short or too long.
            ShardCorrupt: The header of a shard is damaged.
            DigestMismatch: engram.json contradicts itself.
            ConfigError: `mode` is neither "r" nor "w".
        """
        directory = Path(os.path.abspath(path))
        if mode not in ("r", "w"):
            raise ConfigError(f"mode: expected 'r' or 'w', found {mode!r}")
        manifest = Manifest.read(directory)
        if mode == "w":
            return cls._open_to_write(directory)
        if manifest.next_id is not None:
            raise TableUnsealed(
                f"{directory}: expected a sealed table, found one that was opened for writing and "
                "not sealed since; Table.open(path, 'w').seal() takes it as it is"
            )
        manifest.check_shards()
        return cls(manifest, None)

    @classmethod
    def _open_to_write(cls, directory: Path) -> Table:
        lock = WriterLock.take(directory)
        try:
            manifest = Manifest.read(directory)  # again: no other process can write it now
            manifest.check_shards()
            if manifest.next_id is not None:
                # It is not known what the last writer wrote: all shards count as changed.
                return cls(manifest, lock, manifest.all_shards())
            manifest = dataclasses.replace(manifest, next_id=secrets.token_hex(16))
            manifest.write()
            return cls(manifest, lock)
        except BaseException:
            lock.drop()
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
        """Rows of every shard except a layer's last."""
        return self._manifest.shard_rows

    @property
    def address_digest(self) -> str:
        """Identity of the addresses: hash spec, vocabulary map, d."""
        return self._manifest.address_digest

    @property
    def table_id(self) -> str:
        """Identity of the rows; sealing changed rows gives a new one."""
        return self._manifest.table_id

    @property
    def changed(self) -> bool:
        """Whether rows may have changed since the last seal."""
        return bool(self._dirty)

    @property
    def parent(self) -> str | None:
        """The table_id that this table was made from or had before."""
        return self._manifest.parent

    @property
    def hot(self) -> HotIndex | None:
        """The index of the n-grams that have rows of their own, read and hashed; None if there are
        none.

        Raises:
            TableError: It is missing, another one, or damaged (see `open`).
        """
        return self._manifest.index()

    def rows(self, layer: int) -> int:
        """Number of rows of a layer, of hot n-grams too.

        Raises:
            ConfigError: The table does not have the layer.
        """
        return self._manifest.config.row_count(layer)

    def shards(self, layer: int) -> list[Shard]:
        """The files that hold the rows of a layer.

        Raises:
            ConfigError: The table does not have the layer.
        """
        return self._manifest.shards(layer)

    def open_shard(self, shard: Shard) -> int:
        """Opens one of the table's shards. It is writable while the table is.

        Returns:
            A file descriptor, which the caller closes.

        Raises:
            TableError: A shard is missing or damaged (see `open`), or the table is closed.
        """
        self._expect("r", "w")
        return shard.open(self._manifest.table_ids, self.mode == "w")

    def check_address(self, digest: str) -> None:
        """Checks that the table has the addresses of a model.

        Args:
            digest: The model's, from `EngramConfig.address_digest`.

        Raises:
            DigestMismatch: The table has another address digest.
        """
        if digest != self.address_digest:
            raise DigestMismatch(
                f"{self.path}: expected a table of address digest {digest}, found "
                f"{self.address_digest}: another tokenizer, hash specification or row width"
            )

    def shard_arrays(self, layer: int) -> list[np.ndarray]:
        """The rows of a layer as mapped memory.

        The arrays are writable if the table is open for writing. Write to them inside `writing`
        only.

        Returns:
            uint8 [n, row_bytes] for each shard, of equal sizes but the last.

        Raises:
            TableError: A shard is missing or damaged (see `open`), or the table is closed.
        """
        self._expect("r", "w")
        return [
            shard.map(self._manifest.table_ids, self.mode == "w") for shard in self.shards(layer)
        ]

    def read_rows(self, layer: int, first: int, out_nR: np.ndarray) -> None:
        """Reads rows from number `first` on into uint8 [n, row_bytes], without mapping them."""
        read_rows([shard.tensor for shard in self.shards(layer)], first, out_nR)

    @contextmanager
    def writing(self, layer: int, shards: Iterable[int]) -> Generator[None]:
        """The scope of every change of rows. It notes the shards, which the seal then hashes.

        Args:
            layer: The layer whose rows change.
            shards: Numbers of its shards whose rows change, from 0.

        Raises:
            TableError: The table is not open for writing.
        """
        with self._gate:
            self._expect("w")
            known = self._manifest.shards(layer)
            self._dirty.update(known[shard].name for shard in shards)
            yield

    def write_rows(self, layer: int, first: int, rows_NR: np.ndarray) -> None:
        """Writes consecutive rows without mapping them, for conversions.

        If the arguments are invalid, nothing is written.

        Args:
            layer: A layer of the table.
            first: Row id of the first row.
            rows_NR: uint8 [N, row_bytes].

        Raises:
            RowOutOfRange: The layer does not have that many rows.
            InputError: `rows_NR` has another shape or dtype.
            TableError: The table is not open for writing.
        """
        check_array("rows", rows_NR, (None, self.row_bytes), (np.uint8,))
        end = first + len(rows_NR)
        if not 0 <= first <= end <= self.rows(layer):
            raise RowOutOfRange(
                f"rows {first} to {end - 1} of layer {layer}: expected 0 to {self.rows(layer) - 1}"
            )
        size = self.shard_rows
        touched = range(first // size, -(-end // size))
        with self.writing(layer, touched):
            shards = self._manifest.shards(layer)
            for number in touched:
                shard_first = number * size
                low = max(first, shard_first)
                high = min(end, shard_first + size)
                shards[number].write(low - shard_first, rows_NR[low - first : high - first])

    def seal(self) -> str:
        """Ends writing: syncs and hashes the shards that may have changed, renames engram.json.

        The table is then in mode "r".

        Returns:
            The table_id: a new one, with the old as parent, if rows differ from those last sealed.

        Raises:
            TableError: The table is not open for writing, or a shard is damaged.
            WriteFailed: The system refuses engram.json.
        """
        with self._gate:
            self._expect("w")
            sealed = seal_shards(self._manifest, self._dirty)
            sealed.write()
            self._manifest = sealed
            self._dirty.clear()
            self._leave("r")
            return sealed.table_id

    def verify(self, sample: int | None = None) -> Verified:
        """Hashes the rows of shards, and compares the hashes with those that were sealed.

        Args:
            sample: Number of shards to hash, drawn at random; None = all.

        Raises:
            ShardCorrupt: Rows differ from those that were sealed, or the hot index does. Names the
                file and both digests.
            TableUnsealed: The table is open for writing.
            TableError: The table was sealed again since it was opened, or a file is damaged (see
                `open`).
            ConfigError: `sample` is not between 1 and the number of shards.
        """
        self._expect("r", "w")
        return verify_table(self.path, self.table_id, sample)

    def close(self) -> None:
        """Closes the table and releases the writer's lock. Unsealed rows stay unsealed."""
        with self._gate:
            self._leave("closed")

    def _expect(self, *modes: str) -> None:
        if self.mode not in modes:
            raise TableError(
                f"{self.path}: expected a table open in mode {' or '.join(modes)}, "
                f"found mode {self.mode}"
            )

    def _leave(self, mode: str) -> None:
        self.mode = mode
        if self._lock is not None:
            self._lock.release(self.path)
            self._lock = None


_ALL: weakref.WeakSet[Table] = weakref.WeakSet()


def _after_fork() -> None:
    for table in list(_ALL):
        # The thread that held the lock may not exist in the child.
        table._gate = threading.RLock()  # pyright: ignore[reportPrivateUsage]


os.register_at_fork(after_in_child=_after_fork)
