"""Converts released checkpoints to sealed tables, in bounded memory: the same bytes, or another
row format.

    write a journal that says 0 rows
    create the table, "open"
    repeat: write rows, sync them, write the journal
    seal the table
    remove the journal

The journal is a file beside the table. It says how many rows are synced, so a conversion that was
killed continues there. The checkpoint's source_id is in the journal and, as `parent`, in the table,
so that a conversion never continues from another source.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..addresses.vocab import VocabMap
from ..errors import TableError
from ..rows.format import RowFormat
from ..system.files import check_folder, free_disk, write_file
from ..table.chunks import Progress, encode_rows
from ..table.manifest import FILE_NAME, Manifest
from ..table.shards import HEADER_BYTES
from ..table.table import Table
from .checkpoint import Checkpoint

JOURNAL_SUFFIX = ".converting.json"
_FORMAT = "engraphy-conversion-1"
CHUNK_BYTES = 8 << 20  # read and written at a time
SYNC_BYTES = 256 << 20  # at most so much is written again after a kill


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        path: The table's folder.
        table_id: The table's identity.
        source_id: The checkpoint's identity, which is the table's parent.
        kind: Kind of the row format.
        rows: Rows of all layers.
        bytes: Bytes of these rows.
        resumed_at: The row, counted through all layers, at which this call continued an earlier
            one; 0 if it started from the beginning.
    """

    path: str
    table_id: str
    source_id: str
    kind: str
    rows: int
    bytes: int
    resumed_at: int


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vocab_file: str | os.PathLike[str] | None = None,
    kind: str | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Makes a sealed table of a released checkpoint's rows, byte for byte or in another format.

    Continues where an earlier call was killed. Takes some MB of memory, whatever the table's size.

    Args:
        checkpoint: The checkpoint's folder, or its GGUF file.
        out: The table's folder.
        vocab_file: A saved vocabulary map; by default that of the checkpoint's tokenizer, or of its
            GGUF file.
        kind: Kind of the table's rows; by default that of the checkpoint.
        progress: Called with the stage, bytes done and bytes in total.

    Returns:
        The table's identity and size.

    Raises:
        ConfigError: Rows of this kind cannot be made.
        InputError: A value does not fit the kind; names the row.
        TableError: `out` is taken, is being converted from another source or to another kind, does
            not fit on the disk, or cannot be written. In the last case the same call continues.
        EngraphyError: As `Checkpoint.open` and `Checkpoint.vocab` raise it.
    """
    out = Path(os.path.abspath(out))
    report = progress or (lambda stage, done, total: None)
    try:
        source = Checkpoint.open(checkpoint)
        fmt = _format(source, kind)
        journal = _Journal(out.with_name(out.name + JOURNAL_SUFFIX), source.source_id)
        if journal.read() is None:  # otherwise `out` may be the table of an earlier call
            check_folder(out, taken=TableError)
        vocab = source.vocab(vocab_file)
        table, done = _open_table(source, fmt, vocab, out, journal)
        try:
            if table.mode == "w":
                _copy(source, table, journal, done, report)
                report("sealing", 0, 0)
                table.seal()
            journal.remove()
        finally:
            table.close()
    except OSError as error:
        raise TableError(
            f"{out}: the conversion stopped ({error}); the same command continues it"
        ) from error
    rows = source.config.row_count()
    return Converted(
        str(out),
        table.table_id,
        source.source_id,
        fmt.kind,
        rows,
        rows * fmt.row_bytes,
        done,
    )


def _format(source: Checkpoint, kind: str | None) -> RowFormat:
    """The format of the table's rows."""
    if kind is None or kind == source.fmt.kind:
        return source.fmt
    fmt = RowFormat(kind, source.fmt.d)
    fmt.check_encodes()
    return fmt


def _open_table(
    source: Checkpoint, fmt: RowFormat, vocab: VocabMap, out: Path, journal: _Journal
) -> tuple[Table, int]:
    """The table, and how many of its rows are written.

    The table is new, or unfinished and opened for writing, or finished: then the conversion was
    killed before it removed its journal.
    """
    progress = journal.read()
    if progress is None or not (out / FILE_NAME).exists():
        return _create(source, fmt, vocab, out, journal), 0
    table_id, done = progress
    manifest = Manifest.read(out)
    expected = (source.source_id, source.config.address_digest(vocab.digest), fmt)
    possible = table_id in (manifest.table_id, None) and done <= source.config.row_count()
    if (manifest.parent, manifest.address_digest, manifest.fmt) != expected or not possible:
        raise TableError(
            f"{out}: expected the unfinished conversion of {source.path} to rows of {fmt} that "
            f"{journal.path} describes, found table {manifest.table_id} of parent "
            f"{manifest.parent}, rows of {manifest.fmt}"
        )
    if manifest.next_id is None:
        return Table.open(out), source.config.row_count()
    table = Table.open(out, "w")
    try:
        _check_space(out, source, fmt)
    except BaseException:
        table.close()
        raise
    return table, done


def _create(
    source: Checkpoint, fmt: RowFormat, vocab: VocabMap, out: Path, journal: _Journal
) -> Table:
    _check_space(out, source, fmt)
    journal.write(None, 0)  # first, so that there is never an unfinished table without one
    try:
        return Table.create(out, source.config, fmt, vocab, parent=source.source_id)
    except BaseException:
        journal.remove()
        raise


def _copy(
    source: Checkpoint, table: Table, journal: _Journal, done: int, progress: Progress
) -> None:
    """Writes the rows from number `done` on, layers in order.

    Syncs them, and writes the journal, after every SYNC_BYTES.
    """
    width = table.row_bytes
    step = max(1, CHUNK_BYTES // max(width, source.fmt.row_bytes))
    span = max(1, SYNC_BYTES // width)
    buffer_nR = np.empty((step, source.fmt.row_bytes), np.uint8)
    total = source.config.row_count()
    before = 0  # rows of the layers before this one
    progress("converting", done * width, total * width)
    for layer in table.layers:
        rows = table.rows(layer)
        shards = table.shards(layer)
        for begin in range(min(max(done - before, 0), rows), rows, span):
            end = min(begin + span, rows)
            for first in range(begin, end, step):
                chunk_nR = buffer_nR[: min(step, end - first)]
                source.read_rows(layer, first, chunk_nR)
                if table.fmt != source.fmt:
                    values_nd = source.fmt.decode(chunk_nR)
                    chunk_nR = encode_rows(table.fmt, values_nd, layer, first)
                table.write_rows(layer, first, chunk_nR)
                progress("converting", (before + first + len(chunk_nR)) * width, total * width)
            for shard in shards[begin // table.shard_rows : -(-end // table.shard_rows)]:
                shard.sync()
            journal.write(table.table_id, before + end)
        before += rows


def _check_space(out: Path, source: Checkpoint, fmt: RowFormat) -> None:
    rows = source.config.row_count()
    width = fmt.row_bytes
    shards = list(out.glob("*.safetensors"))  # of an earlier run; sparse
    headers = HEADER_BYTES * max(len(shards), len(source.config.hash.layer_ids))
    on_disk = sum(shard.stat().st_blocks * 512 for shard in shards)
    needed = max(0, rows * width + headers - on_disk)
    free = free_disk(out)
    if free < needed:
        raise TableError(
            f"{out}: expected {needed} bytes of free disk for {rows} rows of {width}, found {free}"
        )


class _Journal:
    """A small file: how many rows of a conversion are synced, counted through all layers."""

    def __init__(self, path: Path, source_id: str) -> None:
        self.path = path
        self.source_id = source_id

    def read(self) -> tuple[str | None, int] | None:
        """The table_id (None before there is a table) and rows; None if there is no journal.

        Raises TableError if the file is no journal, or belongs to another source.
        """
        try:
            data = json.loads(self.path.read_bytes())
            kind = data["format"]
            source = data["source_id"]
            table_id = data["table_id"]
            rows = data["rows"]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise TableError(
                f"{self.path}: expected the journal of a conversion, found something else "
                f"({type(error).__name__}: {error})"
            ) from None
        is_count = type(rows) is int and rows >= 0
        if kind != _FORMAT or not is_count or (table_id is None and rows):
            raise TableError(
                f"{self.path}: expected a journal {_FORMAT} with rows done, found {data}"
            )
        if source != self.source_id:
            raise TableError(
                f"{self.path}: expected the journal of source {self.source_id}, "
                f"found one of {source}: another checkpoint; "
                "give another name, or delete this file and its unfinished table"
            )
        return table_id, rows

    def write(self, table_id: str | None, rows: int) -> None:
        """Replaces the file in one step that survives a crash."""
        body = {"format": _FORMAT, "source_id": self.source_id, "table_id": table_id, "rows": rows}
        write_file(self.path, json.dumps(body))

    def remove(self) -> None:
        """Removes the file: the conversion is done, or never began."""
        self.path.unlink(missing_ok=True)
