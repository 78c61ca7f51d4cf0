"""Small tables and the ways to damage them, for bench/damage.py. Each way is a function that
changes files of a `Specimen`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engraphy.addresses.vocab import VocabMap
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.table import Table
from engraphy.table.shards import HEADER_BYTES

MANIFEST = "engram.json"
LAYERS = (1, 3)
# Kind, d, rows of a head and of a shard.
FORMATS = (
    ("f32", 64, 60, 90),
    ("f16", 32, 30, None),
    ("bf16", 32, 60, 130),
    ("fp8", 64, 40, 64),
    ("fp8_scaled", 32, 40, 90),
    ("int8", 32, 20, None),
    ("int4", 32, 60, 140),
)
Rng = np.random.Generator


@dataclass(frozen=True)
class Specimen:
    """A sealed table that is damaged and put right again.

    Attributes:
        path: Its folder.
        fmt: Its row format.
        records: Its rows by layer, uint8 [rows, row_bytes].
        files: Content of its files, by name.
        before: The same table before its rows were changed, under an older table_id.
        twin: Another table of the same addresses, sizes and names of shards.
        touched: Files that a damage has changed.
    """

    path: Path
    fmt: RowFormat
    records: dict[int, np.ndarray]
    files: dict[str, bytes]
    before: dict[str, bytes]
    twin: dict[str, bytes]
    touched: set[str] = field(default_factory=set)

    @property
    def shards(self) -> list[str]:
        return [name for name in self.files if name != MANIFEST]

    def put(self, name: str, data: bytes | None, in_place: bool = False) -> None:
        """Gives a file this content, under a new inode or under the one that it has. None removes
        the file."""
        self.touched.add(name)
        path = self.path / name
        if not in_place:
            path.unlink(missing_ok=True)
        if data is None:
            return
        with open(path, "r+b" if in_place else "xb") as file:
            file.write(data)
            file.truncate()

    def cut(self, name: str, size: int) -> None:
        """Gives a file another size, under the inode that it has."""
        self.touched.add(name)
        os.truncate(self.path / name, size)

    def replace_by_directory(self, name: str) -> None:
        self.put(name, None)
        (self.path / name).mkdir()

    def rows_changed(self) -> bool:
        """True if bytes of rows differ from those written, in files that are there."""
        shards = [name for name in self.touched if name != MANIFEST]
        for name in shards:
            path = self.path / name
            if (
                path.is_file()
                and path.read_bytes()[HEADER_BYTES:] != self.files[name][HEADER_BYTES:]
            ):
                return True
        return False

    def restore(self, all_of_it: bool = False) -> None:
        """Writes touched files anew, under new inodes."""
        for name in self.files if all_of_it else self.touched:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            self.put(name, self.files[name])
        self.touched.clear()


def make(folder: Path, kind: str, d: int, rows: int, shard_rows: int | None) -> Specimen:
    """A sealed table, the same table before its rows were changed, and another table of the same
    addresses and sizes."""
    spec = HashSpec.demo(LAYERS, (2, 3), 2, rows, 50, 0)
    fmt = RowFormat(kind, d, 0.01 if kind == "fp8_scaled" else None)
    config = EngramConfig(spec, LayerSpec(8, spec.columns * d), d)
    rng = np.random.default_rng(rows)

    def fill(table: Table) -> dict[int, np.ndarray]:
        records = {}
        for layer in LAYERS:
            values_Nd = rng.standard_normal((table.rows(layer), d), dtype=np.float32)
            records[layer] = fmt.encode(values_Nd)
        for layer, rows_NR in records.items():
            table.write_rows(layer, 0, rows_NR)
        table.seal()
        return records

    def files(path: Path) -> dict[str, bytes]:
        return {
            file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.stat().st_size
        }

    path = folder / kind
    other = folder / "other"
    fill(Table.create(path, config, fmt, VocabMap.identity(50), shard_rows=shard_rows))
    before = files(path)
    records = fill(Table.open(path, "w"))
    fill(Table.create(other, config, fmt, VocabMap.identity(50), shard_rows=shard_rows))
    twin = files(other)
    shutil.rmtree(other)
    return Specimen(path, fmt, records, files(path), before, twin)


@dataclass(frozen=True)
class Damage:
    """A way to damage a table: the name that it is counted under, and a function that does it."""

    kind: str
    apply: Callable[[Specimen, Rng], None]


def changed(data: bytes, rng: Rng, first: int, last: int) -> bytes:
    """`data` with a bit, a byte or a run of bytes changed, within first..last-1."""
    raw = bytearray(data)
    how = rng.integers(4)
    at = int(rng.integers(first, last))
    if how == 0:
        raw[at] ^= 1 << int(rng.integers(8))
    elif how == 1:
        raw[at] = (raw[at] + int(rng.integers(1, 256))) % 256
    else:
        end = min(last, at + int(rng.integers(1, 64 if how == 2 else 4097)))
        raw[at:end] = rng.bytes(end - at) if rng.random() < 0.7 else bytes(end - at)
    return bytes(raw)


def shard_of(specimen: Specimen, rng: Rng) -> str:
    return str(rng.choice(specimen.shards))


def manifest_bytes(specimen: Specimen, rng: Rng) -> None:
    data = specimen.files[MANIFEST]
    specimen.put(MANIFEST, changed(data, rng, 0, len(data)))


def manifest_digit(specimen: Specimen, rng: Rng) -> None:
    """A digit or letter becomes another: JSON that can still be read."""
    raw = bytearray(specimen.files[MANIFEST])
    at = int(rng.choice([i for i, byte in enumerate(raw) if chr(byte).isalnum()]))
    raw[at] = ord(rng.choice(list("0123456789" if chr(raw[at]).isdigit() else "abcdefABCDEF")))
    specimen.put(MANIFEST, bytes(raw))


def header_bytes(specimen: Specimen, rng: Rng) -> None:
    name = shard_of(specimen, rng)
    data = specimen.files[name]
    last = len(data[:HEADER_BYTES].rstrip()) if rng.random() < 0.7 else HEADER_BYTES
    specimen.put(name, changed(data, rng, 0, last))


def row_bytes(specimen: Specimen, rng: Rng, in_place: bool = False) -> None:
    name = shard_of(specimen, rng)
    data = specimen.files[name]
    specimen.put(name, changed(data, rng, HEADER_BYTES, len(data)), in_place)


def row_block(specimen: Specimen, rng: Rng) -> None:
    """A block of a disk that reads as another block, or as zeros."""
    name = shard_of(specimen, rng)
    size = int(rng.choice([512, 4096]))
    data = bytearray(specimen.files[name])
    first, last = HEADER_BYTES // size, -(-len(data) // size)  # blocks of rows
    to = int(rng.integers(first, last)) * size
    source = int(rng.integers(first, last)) * size
    end = min(to + size, len(data))
    other = bytes(data[source : source + end - to]) if rng.random() < 0.5 else b""
    data[to:end] = other.ljust(end - to, b"\0")
    specimen.put(name, bytes(data))


def cut_length(data: bytes, rng: Rng) -> int:
    """A length below that of `data`: any one, one near the end, or whole pages, equally often."""
    size = len(data)
    lengths = [
        rng.integers(0, size),
        size - 1 - rng.integers(0, min(size, 300)),
        rng.integers(0, -(-size // 4096)) * 4096,
    ]
    return int(rng.choice(lengths))


def cut_shard(specimen: Specimen, rng: Rng) -> None:
    name = shard_of(specimen, rng)
    specimen.cut(name, cut_length(specimen.files[name], rng))


def cut_manifest(specimen: Specimen, rng: Rng) -> None:
    specimen.cut(MANIFEST, cut_length(specimen.files[MANIFEST], rng))


def extend(name: str, specimen: Specimen, rng: Rng) -> None:
    count = int(rng.integers(1, 9000))
    more = (rng.bytes(count), bytes(count), b" " * count)[rng.integers(3)]
    specimen.put(name, specimen.files[name] + more, in_place=True)


def swap(specimen: Specimen, rng: Rng) -> None:
    first, second = rng.choice(specimen.shards, 2, replace=False)
    specimen.put(str(first), specimen.files[str(second)])
    specimen.put(str(second), specimen.files[str(first)])


def shard_from(other: str, specimen: Specimen, rng: Rng, in_place: bool = False) -> None:
    name = shard_of(specimen, rng)
    specimen.put(name, getattr(specimen, other)[name], in_place)


def any_name(specimen: Specimen, rng: Rng) -> str:
    return MANIFEST if rng.random() < 0.3 else shard_of(specimen, rng)


BEFORE = [
    Damage(kind, apply)
    for kind, apply in {
        "engram.json: bits, bytes": manifest_bytes,
        "engram.json: a digit or letter": manifest_digit,
        "engram.json: cut": cut_manifest,
        "engram.json: extended": lambda s, rng: extend(MANIFEST, s, rng),
        "engram.json: older": lambda s, rng: s.put(MANIFEST, s.before[MANIFEST]),
        "engram.json: of another table": lambda s, rng: s.put(MANIFEST, s.twin[MANIFEST]),
        "shard's header: bits, bytes": header_bytes,
        "rows: bits, bytes": row_bytes,
        "rows: a block": row_block,
        "shard: cut": cut_shard,
        "shard: extended": lambda s, rng: extend(shard_of(s, rng), s, rng),
        "shards: two swapped": swap,
        "shard: of another table": lambda s, rng: shard_from("twin", s, rng),
        "shard: older": lambda s, rng: shard_from("before", s, rng),
        "file: gone": lambda s, rng: s.put(any_name(s, rng), None),
        "file: empty": lambda s, rng: s.put(any_name(s, rng), b""),
        "file: a directory": lambda s, rng: s.replace_by_directory(any_name(s, rng)),
    }.items()
]
SERVED = [
    Damage(kind, apply)
    for kind, apply in {
        "shard: cut": cut_shard,
        "shard: extended": lambda s, rng: extend(shard_of(s, rng), s, rng),
        "shard: empty": lambda s, rng: s.cut(shard_of(s, rng), 0),
        "shard: gone": lambda s, rng: s.put(shard_of(s, rng), None),
        "shard: another table's renamed over it": lambda s, rng: shard_from("twin", s, rng),
        "shard: another table's copied over it": lambda s, rng: shard_from(
            "twin", s, rng, in_place=True
        ),
        "rows: bits, bytes": lambda s, rng: row_bytes(s, rng, in_place=True),
        "engram.json: older": lambda s, rng: s.put(MANIFEST, s.before[MANIFEST]),
    }.items()
]
# Bytes of rows are changed where they lie: what opening does not look at, and `verify` does.
ROWS = {"rows: bits, bytes", "rows: a block", "shard: another table's copied over it"}
