"""What a store says about itself: what it holds (`StoreInfo`), what was read (`StoreStats`)."""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass, field

from ..rows.format import RowFormat
from ..table.table import Table
from .latency import BUCKETS, Latency, bucket_of, latency_of

_MOST_UNCOUNTED = 1024


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds. Fields that a store does not know are None.

    Attributes:
        kind: the URL scheme of the store.
        rows: number of rows.
        row_bytes: bytes of a row.
        writable: whether rows can be written now.
        table_id: identity of the table behind the store.
        layer: the model's layer, 0-based.
        path: where the table or checkpoint lies.
        format: format of the rows.
        address_digest: identity of the addresses: hash spec, vocabulary map, row width.
        reads: how the store reads rows, in words; None if it had no choice.
    """

    kind: str
    rows: int
    row_bytes: int
    writable: bool
    table_id: str | None = None
    layer: int | None = None
    path: str | None = None
    format: RowFormat | None = None
    address_digest: str | None = None
    reads: str | None = None

    @classmethod
    def of_layer(cls, kind: str, table: Table, layer: int, reads: str) -> StoreInfo:
        """The info of a store over one layer of a table.

        Raises:
            ConfigError: if the table does not have the layer.
        """
        return cls(
            kind,
            table.rows(layer),
            table.row_bytes,
            table.mode == "w",
            table.table_id,
            layer,
            str(table.path),
            table.fmt,
            table.address_digest,
            reads,
        )

    def as_of_now(self, table: Table) -> StoreInfo:
        """The info after a seal, which ends writing and may change the table_id."""
        writable = table.mode == "w"
        if writable == self.writable and table.table_id == self.table_id:
            return self
        return dataclasses.replace(self, writable=writable, table_id=table.table_id)

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes

    @property
    def name(self) -> str:
        """The store's name in messages."""
        return f"{self.kind} store of {self.path or 'rows'}"


@dataclass(frozen=True)
class StoreStats:
    """What a store has read since it was opened.

    Attributes:
        gathers: calls that read rows.
        rows: rows of these calls.
        bytes: bytes of these rows.
        reads: read calls to the system; 0 for stores that map files.
        read_bytes: bytes of these read calls.
        hits: rows found in the cache; None for stores that are no cache.
        misses: rows that the cache read from the store behind it; None likewise.
        under_way: calls of `gather` that have not returned yet.
        latency: how long the calls took.
    """

    gathers: int
    rows: int
    bytes: int
    reads: int = 0
    read_bytes: int = 0
    hits: int | None = None
    misses: int | None = None
    under_way: int = field(default=0, compare=False)
    latency: Latency = field(default=Latency(), compare=False)

    @property
    def hit_rate(self) -> float | None:
        """hits / rows; None if the store is no cache, and before the first row."""
        if self.hits is None or not self.rows:
            return None
        return self.hits / self.rows

    @property
    def amplification(self) -> float | None:
        """Bytes read from files per byte of rows; None if files are mapped."""
        if not self.read_bytes or not self.bytes:
            return None
        return self.read_bytes / self.bytes


class Counters:
    """Counts what `StoreStats` shows. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gathers = 0
        self._rows = 0
        self._reads = 0
        self._read_bytes = 0
        self._hits: int | None = None
        self._misses: int | None = None
        self._under_way = 0
        self._nanoseconds = 0
        self._buckets = [0] * BUCKETS
        # (rows, nanoseconds) of calls that are still to be counted: for the few rows of a token
        # taking the lock would take longer than reading them.
        self._tokens: list[tuple[int, int]] = []

    def stats(self, row_bytes: int) -> StoreStats:
        """The counters so far."""
        with self._lock:
            self._count_tokens()
            return StoreStats(
                self._gathers,
                self._rows,
                self._rows * row_bytes,
                self._reads,
                self._read_bytes,
                self._hits,
                self._misses,
                under_way=self._under_way,
                latency=latency_of(self._buckets, self._nanoseconds),
            )

    def begin(self) -> None:
        """Counts a call of `gather` that begins."""
        with self._lock:
            self._under_way += 1

    def end(self, rows: int | None = None, begun: int = 0) -> None:
        """Counts a call of `gather` that has returned `rows` rows, or (None) has raised."""
        taken = time.perf_counter_ns() - begun
        with self._lock:
            self._under_way -= 1
            if rows is not None:
                self._add(rows, taken)

    def add_call(self, rows: int, begun: int) -> None:
        """Counts a call that began at `begun` (perf_counter_ns) and read `rows` rows."""
        taken = time.perf_counter_ns() - begun
        with self._lock:
            self._add(rows, taken)

    def _add(self, rows: int, taken: int) -> None:
        self._gathers += 1
        self._rows += rows
        self._nanoseconds += taken
        self._buckets[bucket_of(taken)] += 1

    def add_token(self, rows: int, taken: int) -> None:
        """Counts a call that read `rows` rows in `taken` nanoseconds."""
        self._tokens.append((rows, taken))
        if len(self._tokens) >= _MOST_UNCOUNTED:
            with self._lock:
                self._count_tokens()

    def _count_tokens(self) -> None:
        """Counts what `add_token` left. Others may append meanwhile; the caller has the lock."""
        tokens = self._tokens[:]
        del self._tokens[: len(tokens)]
        for rows, taken in tokens:
            self._add(rows, taken)

    def add_reads(self, reads: int, read_bytes: int) -> None:
        """Counts read calls to the system."""
        with self._lock:
            self._reads += reads
            self._read_bytes += read_bytes

    def add_looks(self, hits: int, misses: int) -> None:
        """Counts rows found in a cache, and rows that it read from the store behind it."""
        with self._lock:
            self._hits = (self._hits or 0) + hits
            self._misses = (self._misses or 0) + misses

    def after_fork(self) -> None:
        """In a forked child: the thread that held the lock, and the calls under way, are gone."""
        self._lock = threading.Lock()
        self._under_way = 0
