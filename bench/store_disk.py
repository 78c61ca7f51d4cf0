"""A table on disk: cold, beside the best random reads of the disk; in the page cache, beside numpy
and a C copy.

Part of bench/store.py. Cold means that no page of the table is in the page cache; this is checked,
not assumed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from probe import DEPTHS, PAGE, Probe, huge
from store_ram import LIMIT, probes, use_threads
from turns import Result, Variant, best, best_first, rows_a_second, threads_in_words

from engraphy import EngramConfig, HashSpec, LayerSpec, RowFormat, Table, VocabMap
from engraphy.store import RowStore, open_store
from engraphy.table.shards import HEADER_BYTES

ROW_BYTES = 256  # divides the header, so that a reader that knows no header can take it for rows
PEER = "engramdb"
PEER_VERSION = "0.3.0"
MAPPED = "file:, mapped"
PREAD = "file:, pread"
MEMMAP = "numpy memmap[ids]"
READS = "pread probe"
PREAD_THREADS = (32, 128)
CHUNK = 1 << 18  # rows
PAGE_ROWS = PAGE // ROW_BYTES


@dataclass(frozen=True)
class OnDisk:
    """The full shards of a sealed table of one layer: rows 0 to `rows` - 1 are in `shards`,
    `shard_rows` in each."""

    path: Path
    shards: list[Path]
    shard_rows: int

    @property
    def rows(self) -> int:
        return len(self.shards) * self.shard_rows

    def where(self, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each row, and its first byte in the shard's file."""
        shard_N, local_N = np.divmod(ids_N, self.shard_rows)
        return shard_N, HEADER_BYTES + local_N * ROW_BYTES

    def drop(self, probe: Probe) -> None:
        """Drops the table from the page cache. Raises SystemExit if it stays there."""
        for path in self.shards:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if (share := probe.resident(self.shards)) > 0.001:
            raise SystemExit(
                f"{self.path}: expected no page in the page cache, found {share:.1%} of them: "
                "is it a disk?"
            )

    def bring(self) -> None:
        """Reads the table into the page cache."""
        for path in self.shards:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


def make_table(folder: Path, table_bytes: int) -> OnDisk:
    """Makes a table of random rows, in shards of about 1 GiB that are whole pages. The number of
    rows is a prime, so the last shard is smaller; it is not read."""
    spec = HashSpec.demo((0,), (2,), 1, table_bytes // ROW_BYTES, vocab_size=1000, pad_id=0)
    dim = ROW_BYTES // 2
    rng = np.random.default_rng(0)
    rows = spec.row_count(0)
    shard_rows = rows // max(1, round(table_bytes / 2**30)) // PAGE_ROWS * PAGE_ROWS
    table = Table.create(
        folder / "table",
        EngramConfig(spec, LayerSpec(8, dim, order=2), dim),
        RowFormat("bf16", dim),
        VocabMap.identity(1000),
        shard_rows=shard_rows,
    )
    for first in range(0, rows, CHUNK):
        count = min(CHUNK, rows - first)
        rows_NR = np.frombuffer(rng.bytes(count * ROW_BYTES), np.uint8).reshape(count, ROW_BYTES)
        table.write_rows(0, first, rows_NR)
    table.seal()
    shards = [shard.path for shard in table.shards(0) if shard.rows == shard_rows]
    return OnDisk(table.path, shards, shard_rows)


def find_peer(folder: Path | None) -> Any:
    """The engramdb module, or None if it is not installed."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(PEER)
    except ImportError as error:
        print(
            f"\n{PEER} is left out ({error}): pip install --no-deps --target DIR "
            f"engramdb-python=={PEER_VERSION}, then --peer DIR"
        )
        return None
    if (found := importlib.metadata.version("engramdb-python")) != PEER_VERSION:
        raise SystemExit(f"engramdb-python: expected version {PEER_VERSION}, found {found}")
    return module


class PeerStore:
    """The same files through engramdb, which takes a shard's header for rows. It takes lists of ids
    and returns new bytes."""

    def __init__(self, module: Any, table: OnDisk, threads: int | None) -> None:
        self._table = table
        self._header = HEADER_BYTES // ROW_BYTES  # rows
        folder = table.path.with_name("peer")
        folder.mkdir(exist_ok=True)
        for number, path in enumerate(table.shards):
            if not (link := folder / f"shard_{number:03d}.bin").exists():
                os.link(path, link)
        threaded = {} if threads is None else {"threads": threads}
        self._store = module.Store(
            str(folder), len(table.shards), table.shard_rows + self._header, ROW_BYTES, **threaded
        )

    def ids(self, ids_N: np.ndarray) -> list[int]:
        return (ids_N + (ids_N // self._table.shard_rows + 1) * self._header).tolist()

    def fetch(self, ids: list[int]) -> bytes:
        return self._store.fetch(ids)

    def close(self) -> None:
        self._store.close()


def check(table: OnDisk, peer: Any) -> None:
    """Raises SystemExit unless all ways to read give the same rows."""
    ids_N = np.random.default_rng(3).integers(0, table.rows, 1000)
    shard_N, begin_N = table.where(ids_N)
    mapped = [np.memmap(path, np.uint8, "r") for path in table.shards]
    expected = b"".join(
        mapped[shard][begin : begin + ROW_BYTES].tobytes()
        for shard, begin in zip(shard_N.tolist(), begin_N.tolist(), strict=True)
    )
    for options in ("read=mmap", "read=pread", "direct=1"):
        store = open_store(f"file:{table.path}?{options}", layer=0)
        if store.gather(ids_N).tobytes() != expected:
            raise SystemExit(f"file:?{options}: other rows than the file has")
        store.close()
    if peer is not None:
        theirs = PeerStore(peer, table, None)
        if theirs.fetch(theirs.ids(ids_N)) != expected:
            raise SystemExit(f"{PEER}: other rows than the file has")


def cold(probe: Probe, table: OnDisk, peer: Any, count: int, threads: int, rounds: int) -> Result:
    """Speeds of `count` random rows a call, fewer if few reads are under way. The table is dropped
    from the page cache before each call. Opening is not timed."""
    use_threads(threads)
    cache = _PageCache(probe, table)
    variants = {
        f"{READS}, depth {depth}{', direct' * direct}": _cold_probe(cache, depth, direct, count)
        for direct in (False, True)
        for depth in DEPTHS
    }
    variants[MAPPED] = _cold_store(cache, "read=mmap", max(1, count // 4))
    for depth in PREAD_THREADS:
        variants[f"{PREAD}, threads={depth}"] = _cold_store(
            cache, f"read=pread&threads={depth}", count
        )
        variants[f"{PREAD}, threads={depth}, direct"] = _cold_store(
            cache, f"direct=1&threads={depth}", count
        )
    if peer is not None:
        variants[PEER] = _cold_peer(cache, peer, None, count)
        variants[f"{PEER}, threads={PREAD_THREADS[-1]}"] = _cold_peer(
            cache, peer, PREAD_THREADS[-1], count
        )
    speeds = rows_a_second(variants, rounds, seed=4)
    cache.close()
    limit = best(speeds, READS)
    asked = [(0.9, limit)]
    if peer is not None:
        asked.append((1.5, best(speeds, PEER)))
    title = f"cold disk, {ROW_BYTES} B rows, {count} a call"
    result = Result(title, ROW_BYTES, speeds, limit, {best(speeds, PREAD): asked})
    print(result.markdown(), flush=True)
    return result


class _PageCache:
    """Drops a table from the page cache. Its mappings have to be closed first, since mapped pages
    stay."""

    def __init__(self, probe: Probe, table: OnDisk) -> None:
        self.probe = probe
        self.table = table
        self.rng = np.random.default_rng(5)
        self._open: list[RowStore] = []
        self._files: dict[bool, list[int]] = {}

    def empty(self) -> None:
        while self._open:
            self._open.pop().close()
        self.table.drop(self.probe)

    def store(self, options: str) -> RowStore:
        """A store of the table, closed when the page cache is emptied again."""
        self._open.append(open_store(f"file:{self.table.path}?{options}", layer=0))
        return self._open[-1]

    def files(self, direct: bool) -> np.ndarray:
        """Open files of the shards, for random reads."""
        if direct not in self._files:
            flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
            self._files[direct] = [os.open(path, flags) for path in self.table.shards]
            for file in self._files[direct]:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        return np.array(self._files[direct])

    def close(self) -> None:
        self.empty()
        for files in self._files.values():
            for file in files:
                os.close(file)


def _cold_probe(cache: _PageCache, depth: int, direct: bool, count: int) -> Variant:
    files_S = cache.files(direct)
    reads = min(count, 256 * depth)

    def prepare() -> tuple[np.ndarray, np.ndarray]:
        cache.empty()
        shard_N, begin_N = cache.table.where(cache.rng.integers(0, cache.table.rows, reads))
        return files_S[shard_N], begin_N // PAGE * PAGE

    def run(prepared: tuple[np.ndarray, np.ndarray]) -> float:
        files_N, offsets_N = prepared
        return cache.probe.pread(files_N, offsets_N, depth)

    return Variant(reads, prepare, run)


def _cold_store(cache: _PageCache, options: str, rows: int) -> Variant:
    out_NR = np.zeros((rows, ROW_BYTES), np.uint8)

    def prepare() -> tuple[RowStore, np.ndarray]:
        cache.empty()
        return cache.store(options), cache.rng.integers(0, cache.table.rows, rows)

    def run(prepared: tuple[RowStore, np.ndarray]) -> np.ndarray:
        store, ids_N = prepared
        return store.gather(ids_N, out=out_NR)

    return Variant(rows, prepare, run)


def _cold_peer(cache: _PageCache, peer: Any, threads: int | None, count: int) -> Variant:
    def prepare() -> tuple[PeerStore, list[int]]:
        cache.empty()
        store = PeerStore(peer, cache.table, threads)
        return store, store.ids(cache.rng.integers(0, cache.table.rows, count))

    def run(prepared: tuple[PeerStore, list[int]]) -> bytes:
        store, ids = prepared
        return store.fetch(ids)

    return Variant(count, prepare, run)


def warm(probe: Probe, table: OnDisk, peer: Any, ids: int, threads: int, rounds: int) -> Result:
    """Speeds of `ids` random rows a call. The table is in the page cache, and in the page table of
    each process that maps it."""
    use_threads(threads)
    table.bring()
    with probe.mapped(table.shards, HEADER_BYTES, table.shard_rows * ROW_BYTES) as memory:
        variants = _warm_variants(probe, memory, table, peer, ids, threads)
        speeds = rows_a_second(variants, rounds, seed=8)
    asked = [(5.0, MEMMAP)]
    if peer is not None:
        asked.append((10.0, best(speeds, PEER)))
    title = f"warm page cache, {ROW_BYTES} B rows, {threads_in_words(threads)}"
    result = Result(title, ROW_BYTES, best_first(speeds, LIMIT), LIMIT, {MAPPED: asked})
    print(result.markdown(), flush=True)
    return result


def _warm_variants(
    probe: Probe, memory: np.ndarray, table: OnDisk, peer: Any, ids: int, threads: int
) -> dict[str, Variant]:
    rng = np.random.default_rng(9)
    out_NR = huge(ids * ROW_BYTES).reshape(ids, ROW_BYTES)
    memmap = memory.reshape(-1, ROW_BYTES).view(np.memmap)  # as if the shards were one file

    def fresh() -> np.ndarray:
        return rng.integers(0, table.rows, ids)

    variants = probes(probe, memory, ROW_BYTES, fresh, ids, out_NR, threads)
    for name, options in ((MAPPED, "populate=1"), (PREAD, "read=pread")):
        store = open_store(f"file:{table.path}?{options}", layer=0)
        variants[name] = Variant(
            ids, fresh, lambda ids_N, store=store: store.gather(ids_N, out=out_NR)
        )
    variants[MEMMAP] = Variant(ids, fresh, lambda ids_N: memmap[ids_N])
    if peer is not None:
        for depth in (None, threads):
            store = PeerStore(peer, table, depth)
            name = PEER if depth is None else f"{PEER}, threads={depth}"
            variants[name] = Variant(ids, lambda store=store: store.ids(fresh()), store.fetch)
    return variants
