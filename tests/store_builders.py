"""Small tables and stores of every kind, with the records that they hold, for the tests of stores."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.store import RamStore, RowStore, StoreInfo, open_store
from engraphy.table import Table

LAYER, D = 3, 32
TO_WRITE = ("ram", "file open for writing", "pread open for writing", "not mapped")
MAPPED = ("ram", "file", "file in shards", "file open for writing", "pool")
NOT_MAPPED = ("pread", "pread in shards", "pread direct", "pread open for writing", "not mapped")
STORES = (*MAPPED, *NOT_MAPPED)
OPTIONS = {"pread": "?read=pread", "pread in shards": "?read=pread&threads=3", "pread direct": "?direct=1",
           "pread open for writing": "?read=pread"}


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
    return Table.create(path, EngramConfig(spec, LayerSpec(8, spec.columns * fmt.d, order=3), fmt.d), fmt, Words(),
                        shard_rows=shard_rows)


def records(fmt: RowFormat, rows: int, seed: int = 0) -> np.ndarray:
    return fmt.encode(np.random.default_rng(seed).standard_normal((rows, fmt.d)).astype(np.float32))


def sealed(path: Path, fmt: RowFormat | None = None, shard_rows: int | None = None, rows: int = 20) -> np.ndarray:
    """Make a sealed table; returns the records of layer 3."""
    table = create(path, fmt or fmt_of("int8"), shard_rows, rows)
    expected = records(table.fmt, table.rows(LAYER))
    table.write_rows(LAYER, 0, expected)
    table.seal()
    return expected


def build(name: str, path: Path, fmt: RowFormat) -> tuple[RowStore, np.ndarray]:
    """A store of this name and the records in it."""
    path.mkdir(exist_ok=True)
    expected = sealed(path / "table", fmt, None if name in ("ram", "file", "pread", "not mapped") else 7)
    if name in ("ram", "not mapped"):
        store = (RamStore if name == "ram" else NotMapped)(*expected.shape)
        store.scatter(np.arange(len(expected)), expected)
        return store, expected
    if name == "pool":
        return open_store(f"pool:{path / 'pool'}?from={path / 'table'}", layer=LAYER), expected
    url = f"file:{path / 'table'}{OPTIONS.get(name, '')}"
    return open_store(url, layer=LAYER, mode="w" if "writing" in name else "r"), expected


def some_ids(rows: int, count: int = 500, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, rows, count)


def check_in_child(check: Callable[[], bool]) -> None:
    """Assert that `check()` is true in a forked child, which is killed where it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forking beside threads; here it is meant
        child = os.fork()
    if not child:
        signal.alarm(20)
        good = False
        try:
            good = check()
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


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


def in_own_namespace(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where it may mount; skips the test where the system does not allow that."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    return subprocess.run(["unshare", "-rm", sys.executable, "-c", code, *arguments], capture_output=True, text=True,
                          env=os.environ | environment)
