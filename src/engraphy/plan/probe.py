"""Measures the disk behind a path: how long batches of random 4 KiB reads take.

Reads are those of a `file:` store with `direct=1`: the same native reader, as many threads. A plan
takes the batches as a tier.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import _native  # pyright: ignore[reportPrivateUsage]
from ..errors import ConfigError, WriteFailed
from ..store.options import MAX_THREADS, THREADS
from ..system.checks import as_int
from ..system.files import free_disk, resolved, write_errors
from ..system.temporaries import temporary
from .pages import DIRECT, DROPPED, PAGE, PageReader
from .tiers import Batch, Tier

SIZE = 1 << 30
SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
"""Reads of a batch that are tried."""
_LEAST = 256  # pages of a file
_SHARE = 4  # a batch reads at most one of so many places, so that batches do not repeat each other
_SECONDS = 0.5  # how long one size is measured, if that is enough rounds
_ROUNDS = (5, 1000)
_LONGEST = 1.0  # seconds of a batch; larger ones are left out
_TABLES = (".safetensors", ".gguf")
_BLOCK = 1 << 24  # bytes that are written at a time


@dataclass(frozen=True)
class Sizes:
    """What was measured of batches of one size.

    Attributes:
        reads: Reads of a batch.
        rounds: Batches.
        seconds: Median of a batch.
        p90, p99: What 90 % and 99 % of the batches did not exceed.
    """

    reads: int
    rounds: int
    seconds: float
    p90: float
    p99: float

    @property
    def rate(self) -> float:
        """Reads a second."""
        return self.reads / self.seconds


@dataclass(frozen=True)
class Probe:
    """A disk, measured.

    Attributes:
        path: What was asked for.
        file: What was read: "a scratch file", or the path of a file.
        bytes: Its size.
        how: How the page cache was kept out.
        threads: Reads under way at a time, at most.
        native: Whether the native reader read; else the plain one, which takes CPU time of Python.
        batches: What was measured, by size.
    """

    path: str
    file: str
    bytes: int
    how: str
    threads: int
    native: bool
    batches: tuple[Sizes, ...]

    @property
    def tier(self) -> Tier:
        """The disk as a plan takes it."""
        batches = tuple(Batch(item.reads, item.seconds, item.p99) for item in self.batches)
        return Tier.measured(self.path, f"{self.path}: {self.how}", batches, PAGE)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, which `engraphy.plan.tier` reads from a file."""
        fields = dataclasses.asdict(self)
        fields["unit"] = PAGE
        fields["batches"] = [
            {**dataclasses.asdict(item), "reads_per_second": round(item.rate, 1)}
            for item in self.batches
        ]
        return fields


def measure(
    path: str | os.PathLike[str],
    *,
    size: int = SIZE,
    threads: int = THREADS,
    say: Callable[[str], None] | None = None,
) -> Probe:
    """Measures random reads of 4 KiB where a table lies, or may come to lie.

    Args:
        path: A file or block device, which is read. A folder: its largest .safetensors or .gguf
            file of `size` bytes or more is read; without one, a scratch file of `size` bytes is
            written into it, and removed afterwards, also after an error.
        size: Bytes of a scratch file. A disk with a cache of its own needs more than that has.
        threads: Reads under way at a time, at most.
        say: Called with what is going to be read or written, and the disk space, before that.

    Returns:
        What was measured. Batches of more than a second are left out, and those that would read
        more than a quarter of the file.

    Raises:
        ConfigError: There is no such path, or the file or a number is too small.
        WriteFailed: The scratch file cannot be written, or there is no space for it.
        StoreError: The file cannot be read.
    """
    as_int("threads", threads, 1, MAX_THREADS)
    as_int("size", size, _LEAST * PAGE)
    place = resolved(path)
    with _file(place, size, say or _silent) as (file, title):
        reader = PageReader(str(file), threads, _LEAST)
        how = DIRECT if reader.direct else DROPPED
        found = tuple(_batches(reader))
    return Probe(
        path=str(place),
        file=title,
        bytes=reader.pages * PAGE,
        how=how,
        threads=threads,
        native=_native.core is not None,
        batches=found,
    )


def _silent(_: str) -> None:
    pass


@contextmanager
def _file(place: Path, size: int, say: Callable[[str], None]) -> Iterator[tuple[Path, str]]:
    """The file to read, and what it is called."""
    if not place.exists():
        raise ConfigError(f"{place}: expected a file or a folder, found neither")
    if not place.is_dir():
        say(f"reading {place}")
        yield place, str(place)
        return
    table = _table_file(place, size)
    if table is not None:
        say(f"reading {table}")
        yield table, str(table)
        return
    with _scratch(place, size, say) as file:
        yield file, "a scratch file"


def _table_file(folder: Path, size: int) -> Path | None:
    """The largest file of a table in a folder; None if none has `size` bytes."""
    files = [file for file in folder.iterdir() if file.suffix in _TABLES and file.is_file()]
    large = [file for file in files if file.stat().st_size >= size]
    return max(large, key=lambda file: file.stat().st_size, default=None)


@contextmanager
def _scratch(folder: Path, size: int, say: Callable[[str], None]) -> Iterator[Path]:
    """A file of `size` random bytes, on the disk and not in the page cache."""
    free = free_disk(folder)
    say(
        f"writing a scratch file of {size / 2**30:.2f} GiB to {folder}, {free / 2**30:.1f} GiB are "
        "free there; it is removed afterwards"
    )
    if free < size:
        raise WriteFailed(f"{folder}: expected {size} bytes of free disk, found {free}")
    rng = np.random.default_rng(0)
    with write_errors(folder / "scratch file"), temporary(folder, "probe", False) as (fd, file):
        for first in range(0, size, _BLOCK):
            block = memoryview(rng.bytes(min(_BLOCK, size - first)))
            while block:
                block = block[os.write(fd, block) :]
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        yield file


def _batches(reader: PageReader) -> Iterator[Sizes]:
    rng = np.random.default_rng(1)
    for reads in SIZES:
        if reads * _SHARE > reader.most:
            return
        measured = _batch(reader, reads, rng)
        yield measured
        if measured.seconds > _LONGEST:
            return


def _batch(reader: PageReader, reads: int, rng: np.random.Generator) -> Sizes:
    least, most = _ROUNDS
    reader.seconds(reader.draw(reads, rng))  # threads start; not counted
    taken: list[float] = []
    begun = time.monotonic()
    while len(taken) < most:
        if len(taken) >= least and time.monotonic() - begun > _SECONDS:
            break
        taken.append(reader.seconds(reader.draw(reads, rng)))
    p90, p99 = np.quantile(taken, (0.9, 0.99)).tolist()
    return Sizes(reads, len(taken), statistics.median(taken), p90, p99)
