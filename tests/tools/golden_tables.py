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
BLOCKS = {  # kinds of GGUF files: bytes of a block, and where its f16 scales lie
    "q8_0": (34, (0,)),
    "q4_0": (18, (0,)),
    "iq4_nl": (18, (0,)),
    "mxfp4": (17, ()),
    "q2_k": (84, (80, 82)),
    "q3_k": (110, (108,)),
    "q4_k": (144, (0, 2)),
    "q5_k": (176, (0, 2)),
}
KINDS = ("f32", "f16", "bf16", "fp8", "fp8_scaled", "int8", "int4", *BLOCKS)
LAYERS = (1, 3)
D = 32  # one block of fp8
WIDE = 256  # one block of the kinds whose names end in _k
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


def width(kind: str) -> int:
    return WIDE if kind.endswith("_k") else D


def golden_config(kind: str = "f32") -> EngramConfig:
    spec = HashSpec.demo(LAYERS, (2, 3), 1, 10, VOCAB_SIZE, 0, seed=7)
    d = width(kind)
    return EngramConfig(spec, LayerSpec(8, spec.columns * d, order=3), d)


def golden_format(kind: str) -> RowFormat:
    return RowFormat(kind, width(kind), scale=TABLE_SCALE if kind == "fp8_scaled" else None)


def golden_blocks(kind: str, layer: int, count: int) -> np.ndarray:
    """uint8 [count, row_bytes]: zeros, all bytes, and any bytes under ordinary scales."""
    size, scales_at = BLOCKS[kind]
    rng = np.random.default_rng((layer, KINDS.index(kind)))
    raw_NR = rng.integers(0, 256, (count, size), np.uint8)
    raw_NR[3] = (np.arange(size) * 8 + 3 * layer) % 256
    if kind == "mxfp4":
        raw_NR[:, 0] = rng.integers(100, 130, count)
    for at in scales_at:
        scales_N = rng.choice([-1, 1], count) * 2.0 ** rng.integers(-20, 8, count) * 1.25
        raw_NR[:, at : at + 2] = scales_N.astype(np.float16).view(np.uint8).reshape(-1, 2)
    raw_NR[0] = 0
    return raw_NR


def golden_rows(fmt: RowFormat, layer: int, count: int) -> np.ndarray:
    """uint8 [count, row_bytes]: zeros, large and small values, all bytes, and ordinary rows."""
    if fmt.kind in BLOCKS:
        return golden_blocks(fmt.kind, layer, count)
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


NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def nibbles_of(data: bytes) -> list[int]:
    """Of 16 bytes the low nibbles, then the high ones."""
    return [byte & 15 for byte in data] + [byte >> 4 for byte in data]


def small_block_values(kind: str, block: bytes) -> list[float]:
    """The 32 values of a block."""
    if kind == "mxfp4":
        sizes = [(-1 if code & 8 else 1) * E2M1[code & 7] for code in nibbles_of(block[1:])]
        return [size * 2.0 ** (block[0] - 127) for size in sizes]
    (scale,) = struct.unpack("<e", block[:2])
    if kind == "q8_0":
        codes = [signed(byte, 8) for byte in block[2:]]
    elif kind == "q4_0":
        codes = [nibble - 8 for nibble in nibbles_of(block[2:])]
    else:
        codes = [NONLINEAR[nibble] for nibble in nibbles_of(block[2:])]
    return [code * scale for code in codes]


def six_bits(packed: bytes, signed_ones: bool) -> tuple[list[int], list[int]]:
    """Scales and offsets of q4_k and q5_k; or the 16 scales of q3_k, 32 too large, and nothing."""
    if signed_ones:
        low = [packed[i] & 15 for i in range(8)] + [packed[i] >> 4 for i in range(8)]
        return [low[i] + (packed[8 + i % 4] >> i // 4 * 2 & 3) * 16 for i in range(16)], []
    scales = [packed[i] & 63 for i in range(4)]
    scales += [(packed[8 + i] & 15) + (packed[i] >> 6) * 16 for i in range(4)]
    lows = [packed[4 + i] & 63 for i in range(4)]
    lows += [(packed[8 + i] >> 4) + (packed[4 + i] >> 6) * 16 for i in range(4)]
    return scales, lows


def large_block_values(kind: str, block: bytes) -> list[float]:
    """The 256 values of a block."""
    values: list[float] = []
    if kind in ("q4_k", "q5_k"):
        scale, low = struct.unpack("<ee", block[:4])
        scales, lows = six_bits(block[4:16], False)
        codes = block[16:] if kind == "q4_k" else block[48:]
        for i in range(WIDE):
            code = codes[i // 64 * 32 + i % 32] >> i // 32 % 2 * 4 & 15
            if kind == "q5_k":
                code += (block[16 + i % 32] >> i // 32 & 1) * 16
            values.append(scale * scales[i // 32] * code - low * lows[i // 32])
        return values
    if kind == "q2_k":
        scale, low = struct.unpack("<ee", block[80:])
        for i in range(WIDE):
            code = block[16 + i // 128 * 32 + i % 32] >> i // 32 % 4 * 2 & 3
            part = block[i // 16]
            values.append(scale * (part & 15) * code - low * (part >> 4))
        return values
    (scale,) = struct.unpack("<e", block[108:])
    scales, _ = six_bits(block[96:108], True)
    for i in range(WIDE):
        code = block[32 + i // 128 * 32 + i % 32] >> i // 32 % 4 * 2 & 3
        high = block[i % 32] >> i // 32 & 1
        values.append(scale * (scales[i // 16] - 32) * (code + 4 * high - 4))
    return values


def record_values(kind: str, record: bytes) -> np.ndarray:
    """float32 [d] of one record, as docs/guide/table-format.md has it.

    Python's numbers are of 53 bits, so a value is rounded once, to float32.
    """
    if kind.endswith("_k"):
        return np.array(large_block_values(kind, record)).astype(np.float32)
    if kind in BLOCKS:
        return np.array(small_block_values(kind, record)).astype(np.float32)
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
        FOLDER / kind, golden_config(kind), fmt, Words(), shard_rows=SHARD_ROWS, parent=PARENT
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
