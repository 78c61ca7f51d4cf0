"""Small tables and stores of every kind, with the records that they hold, for tests of stores."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.store import (
    CacheStore,
    RamStore,
    ReloadableStore,
    RowStore,
    StoreInfo,
    open_store,
    publish_pool,
)
from engraphy.store.testing import in_children
from engraphy.store.testing import random_ids as some_ids
from engraphy.table import Table
from tests.tools import releases

__all__ = ["some_ids"]

LAYER, D = 3, 32
KINDS = ("f32", "f16", "bf16", "fp8", "fp8_scaled", "int8", "int4")
TO_WRITE = (
    "ram",
    "file open for writing",
    "pread open for writing",
    "not mapped",
    "tiny cache around ram",
    "tiny cache around file open for writing",
    "cache by URL around pread open for writing",
    "reloadable file open for writing",
)
MAPPED = (
    "ram",
    "file",
    "file in shards",
    "file open for writing",
    "pool",
    "pool file",
    "pool memfd",
    "checkpoint in parts",
    "checkpoint in GGUF",
    "reloadable file",
    "reloadable file open for writing",
)
NOT_MAPPED = (
    "pread",
    "pread in shards",
    "pread direct",
    "pread open for writing",
    "not mapped",
    "checkpoint with scales",
    "tiny cache around ram",
    "tiny cache around file in shards",
    "large cache around file",
    "tiny cache around pread in shards",
    "large cache around pread",
    "tiny cache around pread direct",
    "tiny cache around pool",
    "cache by URL around pool file",
    "tiny cache around checkpoint with scales",
    "cache by URL around file in shards",
    "cache by URL around pread direct",
    "tiny cache around file open for writing",
    "cache by URL around pread open for writing",
    "reloadable pread in shards",
    "reloadable tiny cache around pread direct",
)
STORES = (*MAPPED, *NOT_MAPPED)
OPTIONS = {
    "pread": "?read=pread",
    "pread in shards": "?read=pread&threads=3",
    "pread direct": "?direct=1",
    "pread open for writing": "?read=pread",
}
WHOLE = ("ram", "file", "pread", "not mapped")  # one shard; the others have more
CHECKPOINTS = {
    "checkpoint in parts": "bf16",
    "checkpoint with scales": "fp8",
    "checkpoint in GGUF": "q8_0",
}  # the kind of rows that each has


@dataclass(frozen=True)
class Words:
    """Stands for a vocabulary map."""

    digest: str = "v" * 64

    def __len__(self) -> int:
        return 50


class NotMapped(RowStore):
    """Rows that can only be gathered, as from a network; also what a store has to provide."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        super().__init__()
        self._rows_NR = np.zeros((rows, row_bytes), np.uint8)

    @property
    def info(self) -> StoreInfo:
        return StoreInfo("not mapped", *self._rows_NR.shape, writable=True)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        out_NR[...] = self._rows_NR[ids_N]

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        self._rows_NR[ids_N] = rows_NR


def fmt_of(kind: str, d: int = D) -> RowFormat:
    return RowFormat(kind, d, scale=0.01 if kind == "fp8_scaled" else None)


def create(path: Path, fmt: RowFormat, shard_rows: int | None = None, rows: int = 20) -> Table:
    """A table with layers 1 and 3. rows: of a head, about; a layer has four of them."""
    spec = HashSpec.demo((1, LAYER), (2, 3), 2, rows, 50, 0)
    return Table.create(
        path,
        EngramConfig(spec, LayerSpec(8, spec.columns * fmt.d, order=3), fmt.d),
        fmt,
        Words(),
        shard_rows=shard_rows,
    )


def records(fmt: RowFormat, rows: int, seed: int = 0) -> np.ndarray:
    return fmt.encode(np.random.default_rng(seed).standard_normal((rows, fmt.d)).astype(np.float32))


def sealed(
    path: Path, fmt: RowFormat | None = None, shard_rows: int | None = None, rows: int = 20
) -> np.ndarray:
    """Make a sealed table; returns the records of layer 3."""
    table = create(path, fmt or fmt_of("int8"), shard_rows, rows)
    expected = records(table.fmt, table.rows(LAYER))
    table.write_rows(LAYER, 0, expected)
    table.seal()
    return expected


def kinds_of(name: str) -> tuple[str, ...]:
    """Kinds of rows to try: all, one that a checkpoint has, two of a wrapper, which knows nothing
    of them."""
    kinds = ("bf16", "int8") if "around" in name or "reloadable" in name else KINDS
    return next(((kind,) for checkpoint, kind in CHECKPOINTS.items() if checkpoint in name), kinds)


def usual(name: str) -> RowFormat:
    """The format of the rows that a store of this name has where the test does not say it."""
    return fmt_of("int8" if "int8" in kinds_of(name) else kinds_of(name)[0])


def build(name: str, path: Path, fmt: RowFormat | None = None) -> tuple[RowStore, np.ndarray]:
    """A store of this name and the records in it; fmt: see `usual`."""
    fmt = fmt or usual(name)
    path.mkdir(exist_ok=True)
    for wrapper in (
        "reloadable ",
        "tiny cache around ",
        "large cache around ",
        "cache by URL around ",
    ):
        if name.startswith(wrapper):
            inner = name.removeprefix(wrapper)
            if "URL" in wrapper:
                return _by_url(inner, path, fmt, _two_sets(fmt))
            store, expected = build(inner, path, fmt)
            if wrapper == "reloadable ":
                return ReloadableStore(store), expected
            return CacheStore(
                store, _two_sets(fmt) if wrapper.startswith("tiny") else 1 << 20
            ), expected
    if name in ("ram", "not mapped"):
        expected = sealed(path / "table", fmt)
        store = (RamStore if name == "ram" else NotMapped)(*expected.shape)
        store.scatter(np.arange(len(expected)), expected)
        return store, expected
    return _by_url(name, path, fmt)


def _two_sets(fmt: RowFormat) -> int:
    """A budget for 32 rows, of 80 and more."""
    return 2 * (192 + 16 * fmt.row_bytes)


def _by_url(
    name: str, path: Path, fmt: RowFormat, cache: int | None = None
) -> tuple[RowStore, np.ndarray]:
    url, expected = make(name, path, fmt)
    if cache is not None:
        url += f"{'&' if '?' in url else '?'}cache={cache}"
    return open_store(url, layer=LAYER, mode="w" if "writing" in name else "r"), expected


def make(name: str, path: Path, fmt: RowFormat) -> tuple[str, np.ndarray]:
    """The URL of a store of this name, and the records in it; once its files are made."""
    if name in CHECKPOINTS:
        if name == "checkpoint in parts":
            config = releases.QWEN | {"ple_layer_ids": [LAYER + 1]}
            releases.write_qwen(path / "release", config)
            return f"checkpoint:{path / 'release'}", releases.records(
                releases.qwen_tensors(config), LAYER
            )
        config = releases.V41 | {"engram_head_dim": D}
        if name == "checkpoint in GGUF":
            return releases.write_gguf(path / "release", config, LAYER)
        releases.write_v41(path / "release", config)
        return f"checkpoint:{path / 'release'}", releases.records(
            releases.v41_tensors(config), LAYER
        )
    expected = sealed(path / "table", fmt, None if name in WHOLE else 7)
    if name == "pool":
        return f"pool:{path / 'pool'}?from={path / 'table'}", expected
    if name.startswith("pool "):
        target = f"/proc/self/fd/{memfd()}" if name == "pool memfd" else path / "pool"
        publish_pool(path / "table", target)
        return f"pool:{target}", expected
    return f"file:{path / 'table'}{OPTIONS.get(name, '')}", expected


def memfd(flags: int = 0) -> int:
    """Memory without a name, which lives as long as this process."""
    fd = os.memfd_create("pool", os.MFD_CLOEXEC | flags)
    _KEPT.append(fd)
    return fd


_KEPT: list[int] = []


def shards_of(store: RowStore) -> Sequence[np.ndarray] | None:
    """Its mapped memory, held beyond the scope of a read."""
    with store.reading() as shards:
        return shards


def check_in_child(check: Callable[[], bool]) -> None:
    """Assert that `check()` is true in a forked child, which is killed where it hangs."""
    in_children([check])


def open_fds() -> int:
    gc.collect()  # what earlier tests left
    return len(os.listdir("/proc/self/fd"))


def mappings_of(path: Path) -> int:
    """How many mappings of files below `path` this process has."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def resident(path: Path) -> int:
    """Bytes of the files below `path` that are in this process' page table."""
    ours, found = False, 0
    for words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if "-" in words[0]:
            ours = words[-1].startswith(str(path))
        elif ours and words[0] == "Rss:":
            found += int(words[1]) * 1024
    return found


def in_own_namespace(
    code: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python where it may mount; skips the test where the system does not allow that."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    return subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
