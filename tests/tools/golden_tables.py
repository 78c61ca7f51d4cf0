"""Writes the golden tables of format 1: `python -m tests.tools.golden_tables`.

NEVER run this over tables that exist. They are kept for good, as the tables that users have: a
later Engraphy has to open and read these very files. A new row kind, or a new version of the
format, gets a folder of its own; the folders that are there stay as they are, and so do the values
expected of them. For that reason the script leaves each folder that exists alone, and refuses to
touch `expected.npz` as soon as there is nothing new to write.

Beside the tables lies `expected.npz`, three arrays for each KIND and LAYER:

    KIND-LAYER-raw     uint8 [N, row_bytes]   the records
    KIND-LAYER-f32     float32 [N, d]         their values
    KIND-LAYER-bf16    uint16 [N, d]          their values as bits of bfloat16, to nearest even

The values come from the reading of docs/guide/table-format.md that stands below, record by record,
not from Engraphy's own decoders.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.table import Table
from tests.tools.paths import DATA

FOLDER = DATA / "tables" / "format-1"
EXPECTED = FOLDER / "expected.npz"
KINDS = ("f32", "f16", "bf16", "fp8", "fp8_scaled", "int8", "int4")
LAYERS = (1, 3)
D = 32  # one block of fp8
SHARD_ROWS = 16  # several shards a layer
TABLE_SCALE = 0.0123  # of fp8_scaled
VOCAB_SIZE = 50
PARENT = "0123456789abcdef" * 2
LARGEST = {
    "f32": 3.0e38,
    "f16": 65504.0,
    "bf16": 3.0e38,
    "fp8": 1.0e30,
    "fp8_scaled": 448.0 * TABLE_SCALE,
    "int8": 65504.0,
    "int4": 65504.0,
}


@dataclass(frozen=True)
class Words:
    """Stands for a vocabulary map, of which a table keeps size and digest."""

    size: int = VOCAB_SIZE
    digest: str = "5" * 64

    def __len__(self) -> int:
        return self.size


def golden_config() -> EngramConfig:
    spec = HashSpec.demo(LAYERS, (2, 3), 1, 10, VOCAB_SIZE, 0, seed=7)
    return EngramConfig(spec, LayerSpec(8, spec.columns * D, order=3), D)


def golden_format(kind: str) -> RowFormat:
    return RowFormat(kind, D, scale=TABLE_SCALE if kind == "fp8_scaled" else None)


def golden_rows(fmt: RowFormat, layer: int, count: int) -> np.ndarray:
    """uint8 [count, row_bytes]: zeros, large and small values, all bytes, and ordinary rows."""
    rng = np.random.default_rng((layer, KINDS.index(fmt.kind)))
    values_Nd = (0.01 * rng.standard_normal((count, D))).astype(np.float32)
    values_Nd[0] = 0.0
    values_Nd[1] = np.linspace(-LARGEST[fmt.kind], LARGEST[fmt.kind], D, dtype=np.float32)
    values_Nd[2] = np.ldexp(np.float32(1.0), -np.arange(D) * 4)  # down to what underflows
    raw_NR = fmt.encode(values_Nd)
    codes = np.arange(fmt.row_bytes) * 8 + 3 * layer
    raw_NR[3] = codes % 256
    raw_NR[4] = (codes * 31 + 5) % 256
    if fmt.kind in ("int8", "int4"):
        raw_NR[3:5, -2:] = np.array([0.375], np.float16).view(np.uint8)  # the scale is a number
    return raw_NR


def e4m3_value(code: int) -> float:
    exponent = (code >> 3) & 15
    mantissa = code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    if code & 127 == 127:
        size = float("nan")
    return -size if code >= 128 else size


def signed(code: int, bits: int) -> int:
    """Two's complement."""
    return code - (1 << bits) if code >> (bits - 1) else code


def record_values(kind: str, record: bytes) -> np.ndarray:
    """float32 [D] of one record, as docs/guide/table-format.md has it."""
    if kind == "f32":
        return np.array(struct.unpack(f"<{D}I", record), np.uint32).view(np.float32)
    if kind == "bf16":
        bits = [half << 16 for half in struct.unpack(f"<{D}H", record)]
        return np.array(bits, np.uint32).view(np.float32)
    if kind == "f16":
        return np.array(struct.unpack(f"<{D}e", record)).astype(np.float32)
    if kind == "fp8":
        scale = 2.0 ** (record[D] - 127)
        return np.array([e4m3_value(code) * scale for code in record[:D]]).astype(np.float32)
    if kind == "fp8_scaled":
        scale = np.float32(TABLE_SCALE)
        return np.array([np.float32(e4m3_value(code)) * scale for code in record], np.float32)
    (scale,) = struct.unpack("<e", record[-2:])
    if kind == "int8":
        codes = [signed(byte, 8) for byte in record[:D]]
    else:
        nibbles = [nibble for byte in record[: D // 2] for nibble in (byte & 15, byte >> 4)]
        codes = [signed(nibble, 4) for nibble in nibbles]
    return np.array([code * scale for code in codes]).astype(np.float32)


def bf16_bits(values_Nd: np.ndarray) -> np.ndarray:
    """uint16 [N, D], to nearest even; a NaN becomes a quiet one of the same sign."""
    bits = values_Nd.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values_Nd), quiet, rounded).astype(np.uint16)


def write_table(kind: str) -> dict[str, np.ndarray]:
    """Write the table of one kind; returns its arrays of expected.npz."""
    fmt = golden_format(kind)
    expected: dict[str, np.ndarray] = {}
    table = Table.create(
        FOLDER / kind, golden_config(), fmt, Words(), shard_rows=SHARD_ROWS, parent=PARENT
    )
    for layer in table.layers:
        raw_NR = golden_rows(fmt, layer, table.rows(layer))
        table.write_rows(layer, 0, raw_NR)
        values_Nd = np.stack([record_values(kind, record.tobytes()) for record in raw_NR])
        expected[f"{kind}-{layer}-raw"] = raw_NR
        expected[f"{kind}-{layer}-f32"] = values_Nd
        expected[f"{kind}-{layer}-bf16"] = bf16_bits(values_Nd)
    table.seal()
    return expected


def main() -> int:
    missing = [kind for kind in KINDS if not (FOLDER / kind).exists()]
    if not missing:
        print(f"{FOLDER}: expected nothing to be there, found all tables: they stay as they are")
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    expected: dict[str, np.ndarray] = {}
    if EXPECTED.exists():
        expected |= np.load(EXPECTED)
    for kind in missing:
        expected |= write_table(kind)
    np.savez_compressed(EXPECTED, **expected)
    size = sum(file.stat().st_size for file in Path(FOLDER).rglob("*") if file.is_file())
    print(f"{FOLDER}: wrote {', '.join(missing)}; {size / 1000:.0f} kB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
