"""GGUF headers are read as the `gguf` package reads them, and every damage has its name."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engraphy.errors import (
    ShardCorrupt,
    ShardForeign,
    ShardMissing,
    ShardTruncated,
    TableError,
)
from engraphy.table.gguf import Gguf, Strings
from engraphy.table.gguf_types import BLOCK_TYPES

gguf = pytest.importorskip("gguf")
from tests.tools.gguf_files import rows_of, write_gguf  # noqa: E402
from tests.tools.releases import V41  # noqa: E402


@pytest.fixture
def file(tmp_path) -> Path:
    return write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")


@pytest.fixture
def split(tmp_path) -> Path:
    return write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0", split_tensors=2)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    *tensors: tuple[str, tuple[int, ...], int, int],
    entries: bytes = b"",
    count: int = 0,
    version: int = 3,
    data: bytes = b"",
) -> bytes:
    """A file of these tensors (name, dimensions, type, offset) and `count` metadata entries."""
    raw = b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + entries
    for name, dimensions, kind, offset in tensors:
        raw += text(name) + struct.pack("<I", len(dimensions))
        raw += struct.pack(f"<{len(dimensions)}QIQ", *dimensions, kind, offset)
    return raw.ljust(-(-len(raw) // 32) * 32, b"\0") + data


def test_types_are_those_of_the_package():
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert dict(BLOCK_TYPES) == sizes


def test_metadata_and_tensors_are_those_that_the_package_reads(file):
    ours, theirs = Gguf.open(file), gguf.GGUFReader(file)
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.type == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert found.offset == tensor.data_offset
        assert found.rows * found.row_bytes == tensor.n_bytes
    fields = {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == fields
    for key in fields:
        expected = theirs.fields[key].contents()
        value = ours.metadata[key]
        if isinstance(value, Strings):
            assert value.count == len(expected)
        elif isinstance(value, np.ndarray):
            assert value.tolist() == expected
        else:
            assert value == expected


def test_every_type_of_metadata_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "x")
    values = {
        "uint8": 200,
        "int8": -3,
        "uint16": 60000,
        "int16": -300,
        "uint32": 2**31,
        "int32": -(2**31),
        "float32": 0.5,
        "uint64": 2**63,
        "int64": -(2**62),
        "float64": 1e-300,
        "bool": True,
        "string": "ä",
    }
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.words", ["a", "", "bc"])
    array = gguf.GGUFValueType.ARRAY
    writer.add_key_value("x.numbers", [1, 2**60], array, gguf.GGUFValueType.UINT64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf.open(tmp_path / "m.gguf").metadata
    assert {kind: found[f"x.{kind}"] for kind in values} == values
    assert found["x.words"] == Strings(3)
    assert found["x.numbers"].tolist() == [1, 2**60]


def test_version_2_and_another_alignment_are_read(tmp_path):
    entries = text("general.alignment") + struct.pack("<II", 4, 64)
    raw = header(("a", (4, 2), 0, 64), entries=entries, count=1, version=2)
    raw = raw.ljust(-(-len(raw) // 64) * 64, b"\0")
    (tmp_path / "m.gguf").write_bytes(raw + bytes(96))
    tensor = Gguf.open(tmp_path / "m.gguf").tensors["a"]
    assert (tensor.shape, tensor.row_bytes, tensor.offset % 64) == ((2, 4), 16, 0)
    assert tensor.offset == len(raw) + 64


def test_a_type_that_is_not_known_is_read_over(tmp_path):
    (tmp_path / "m.gguf").write_bytes(
        header(("a", (4, 2), 143, 0), ("b", (4,), 0, 32), data=bytes(48))
    )
    found = Gguf.open(tmp_path / "m.gguf").tensors
    assert (found["a"].type, found["a"].row_bytes) == ("type 143", 0)
    assert found["b"].row_bytes == 16


def test_a_split_model_is_read_as_one(split, file):
    whole, parts = Gguf.open(file), Gguf.open(split)
    assert parts.tensors.keys() == whole.tensors.keys()
    assert len(parts.files) == 3 and {tensor.path for tensor in parts.tensors.values()} == set(
        parts.files
    )
    assert parts.metadata["deepseek41.engram.layer_ids"].tolist() == [1, 3]


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("size", [0, 3, 4, 10, 23, 100, 700])
def test_a_file_cut_in_its_header_is_truncated(file, size):
    os.truncate(file, size)
    with pytest.raises(
        ShardTruncated, match=rf"m.gguf: expected at least \d+ bytes.* found {size}"
    ):
        Gguf.open(file)


def test_a_file_cut_in_its_data_is_truncated(file):
    whole = Gguf.open(file)
    end = max(tensor.offset + tensor.rows * tensor.row_bytes for tensor in whole.tensors.values())
    os.truncate(file, end - 1)
    with pytest.raises(ShardTruncated, match=f"expected at least {end} bytes.* found {end - 1}"):
        Gguf.open(file)
    os.truncate(file, end)
    assert Gguf.open(file).tensors == whole.tensors


BAD = {
    "another magic": (b"GGML" + bytes(40), ShardCorrupt, r"begins with b'GGUF', found b'GGML'"),
    "version 1": (header(version=1), TableError, "expected GGUF of version 2 or 3, found 1"),
    "big-endian": (
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        TableError,
        "expected little-endian numbers, found a big-endian file",
    ),
    "a tensor twice": (
        header(("a", (4,), 0, 0), ("a", (4,), 0, 32), data=bytes(64)),
        ShardCorrupt,
        "each tensor once, found a again",
    ),
    "a key twice": (
        header(entries=(text("k") + struct.pack("<II", 4, 1)) * 2, count=2),
        ShardCorrupt,
        "each key once, found k again",
    ),
    "an unknown type of metadata": (
        header(entries=text("k") + struct.pack("<II", 99, 1), count=1),
        ShardCorrupt,
        "known type of metadata, found number 99",
    ),
    "text that is no UTF-8": (
        header(entries=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1), count=1),
        ShardCorrupt,
        "expected text in UTF-8",
    ),
    "an offset between alignments": (
        header(("a", (4,), 0, 16), data=bytes(64)),
        ShardCorrupt,
        "a: expected an offset of a multiple of 32, found 16",
    ),
    "tensors that overlap": (
        header(("a", (16,), 0, 0), ("b", (4,), 0, 32), data=bytes(64)),
        ShardCorrupt,
        "b: expected it from byte .* behind a, found it at",
    ),
    "rows that are no whole blocks": (
        header(("a", (40, 2), 8, 0), data=bytes(128)),
        ShardCorrupt,
        "a: expected rows of a multiple of 32 values for Q8_0, found 40",
    ),
    "no dimensions": (header(("a", (), 0, 0)), ShardCorrupt, "1 to 4 dimensions, found 0"),
    "a dimension of zero": (header(("a", (0, 4), 0, 0)), ShardCorrupt, "expected a size"),
    "dimensions beyond any file": (
        header(("a", (2**40, 2**40), 0, 0)),
        ShardCorrupt,
        "expected a size",
    ),
    "an alignment of zero": (
        header(entries=text("general.alignment") + struct.pack("<II", 4, 0), count=1),
        ShardCorrupt,
        "expected a power of two, found 0",
    ),
    "arrays without an end": (
        header(entries=text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, count=1),
        ShardCorrupt,
        "arrays at most 4 deep",
    ),
    "an array longer than the file": (
        header(entries=text("k") + struct.pack("<IIQ", 9, 4, 2**50), count=1),
        ShardTruncated,
        "expected at least",
    ),
}


@pytest.mark.parametrize("damage", BAD)
def test_a_header_that_contradicts_itself_is_named(tmp_path, damage):
    raw, error, message = BAD[damage]
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(error, match=message):
        Gguf.open(tmp_path / "m.gguf")


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(ShardMissing, match="expected a GGUF file, found none"):
        Gguf.open(tmp_path / "none.gguf")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(TableError, match="cannot be read"):
        Gguf.open(tmp_path / "d.gguf")
    (tmp_path / "p.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(TableError, match="found a Git LFS pointer"):
        Gguf.open(tmp_path / "p.gguf")


@given(at=st.integers(0, 1500), value=st.integers(0, 255))
def test_a_changed_byte_of_the_header_is_read_or_named(tmp_path_factory, at, value):
    folder = tmp_path_factory.getbasetemp() / "changed"
    file = folder / "m.gguf"
    if not file.exists():
        folder.mkdir()
        write_gguf(file, rows_of("q4_0", V41), "q4_0")
    raw = bytearray(file.read_bytes())
    raw[at] = value
    (folder / "c.gguf").write_bytes(raw)
    try:
        Gguf.open(folder / "c.gguf")
    except TableError as error:
        assert "c.gguf" in str(error)


# Split models.


def part(first: Path, number: int) -> Path:
    return first.with_name(first.name.replace("00001-of", f"{number:05d}-of"))


def test_a_missing_file_of_a_split_model_is_named(split):
    part(split, 3).unlink()
    with pytest.raises(ShardMissing, match="m-00003-of-00003.gguf: expected this file"):
        Gguf.open(split)


def test_another_file_than_the_first_names_the_first(split):
    with pytest.raises(TableError, match="expected the first file .*, m-00001-of-00003.gguf"):
        Gguf.open(part(split, 2))


def test_a_file_in_the_place_of_another_is_foreign(split):
    part(split, 3).write_bytes(part(split, 2).read_bytes())
    with pytest.raises(ShardForeign, match=r"00003.*expected file 2 of 3.*found 1 of 3"):
        Gguf.open(split)


def test_a_file_of_another_split_is_foreign(split, tmp_path):
    (tmp_path / "o").mkdir()
    other = write_gguf(tmp_path / "o/m.gguf", rows_of("q8_0", V41), "q8_0", split_tensors=5)
    part(split, 2).write_bytes(part(other, 2).read_bytes())
    with pytest.raises(ShardForeign, match=r"expected file 1 of 3.*found 1 of 2"):
        Gguf.open(split)


def test_a_model_of_another_number_of_tensors_is_foreign(split):
    key = b"split.tensors.count"
    overwrite(split, split.read_bytes().index(key) + len(key) + 4, struct.pack("<i", 7))
    with pytest.raises(ShardForeign, match=r"expected 7 tensors \(split.tensors.count\).* found 6"):
        Gguf.open(split)


def test_a_renamed_file_of_a_split_model_is_named(split, tmp_path):
    renamed = split.rename(tmp_path / "model.gguf")
    with pytest.raises(ShardForeign, match=r"expected the name NAME-00001-of-00003.gguf"):
        Gguf.open(renamed)
