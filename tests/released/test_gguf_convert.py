"""Tables of GGUF files: converted as they are or to another format, and compared with releases."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from engraphy.cli import app
from engraphy.errors import ConfigError, InputError, TableError
from engraphy.released import Checkpoint, open_rows
from engraphy.released import convert as module
from engraphy.released.convert import convert
from engraphy.released.rows import is_release
from engraphy.released.sample import V41 as SAMPLE_V41
from engraphy.released.sample import write_sample
from engraphy.rows import RowFormat
from engraphy.store import open_store
from engraphy.table import Table
from engraphy.table.inspection import verify
from engraphy.table.quantize import compare, quantize

gguf = pytest.importorskip("gguf")
from tests.tools.gguf_files import (  # noqa: E402
    QWEN4,
    QWEN_WIDE,
    V41_WIDE,
    oracle,
    rows_of,
    write_gguf,
)
from tests.tools.releases import V41, v41_tensors, write_v41  # noqa: E402

FIRST = "model-00001-of-00002.gguf"


def rows(table: Table, layer: int) -> np.ndarray:
    return np.concatenate(table.shard_arrays(layer))


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "mxfp4", "q2_k", "q3_k", "q4_k"])
def test_a_table_has_the_records_of_the_file(tmp_path, kind):
    records = rows_of(kind, V41_WIDE)
    path = write_gguf(tmp_path / "m.gguf", records, kind, V41_WIDE, split_tensors=2)
    made = convert(path, tmp_path / "t")
    table = Table.open(tmp_path / "t")
    assert (made.kind, table.fmt) == (kind, RowFormat(kind, 256))
    assert table.parent == made.source_id == Checkpoint.open(path).source_id
    for layer, raw_NR in records.items():
        np.testing.assert_array_equal(rows(table, layer), raw_NR)
        store = open_store(f"file:{tmp_path / 't'}", layer=layer)
        np.testing.assert_array_equal(store.gather(np.arange(9)), raw_NR[:9])
        assert store.info.format == table.fmt
    assert table.verify().shards == 2 and verify(tmp_path / "t").sound


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "iq4_nl", "bf16"])
def test_a_qwen_file_is_converted_too(tmp_path, kind):
    records = rows_of(kind, QWEN_WIDE)
    path = write_gguf(tmp_path / "m.gguf", records, kind, QWEN_WIDE, QWEN4)
    convert(path, tmp_path / "t")
    np.testing.assert_array_equal(rows(Table.open(tmp_path / "t"), 1), records[1])


@pytest.mark.parametrize(("kind", "new"), [("q4_k", "q8_0"), ("q2_k", "int4"), ("q3_k", "bf16")])
def test_a_table_in_another_format_is_what_the_format_makes_of_the_values(tmp_path, kind, new):
    records = rows_of(kind, V41_WIDE)
    path = write_gguf(tmp_path / "m.gguf", records, kind, V41_WIDE)
    made = convert(path, tmp_path / "t", kind=new)
    fmt = RowFormat(new, 256)
    assert made.kind == new and made.bytes == made.rows * fmt.row_bytes
    for layer, raw_NR in records.items():
        expected = fmt.encode(oracle(kind, raw_NR))
        np.testing.assert_array_equal(rows(Table.open(tmp_path / "t"), layer), expected)


def test_a_conversion_to_another_format_that_was_stopped_goes_on(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", rows_of("q4_k", V41_WIDE), "q4_k", V41_WIDE)
    monkeypatch.setattr(module, "SYNC_BYTES", 5000)
    monkeypatch.setattr(module, "CHUNK_BYTES", 5000)
    calls = []

    def stop(stage, done, total):
        calls.append(done)
        if len(calls) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "t", kind="int8", progress=stop)
    with pytest.raises(TableError, match=r"rows of RowFormat\(kind='q8_0'.*rows of .*'int8'"):
        convert(path, tmp_path / "t", kind="q8_0")
    made = convert(path, tmp_path / "t", kind="int8")
    assert made.resumed_at > 0
    whole = convert(path, tmp_path / "u", kind="int8")
    assert whole.resumed_at == 0
    assert compare(tmp_path / "t", tmp_path / "u").equal


def test_kinds_that_cannot_be_made_and_values_that_do_not_fit_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")
    for kind, message in (("q4_k", "multiple of 256"), ("iq4_nl", "only read"), ("x", "one of")):
        with pytest.raises(ConfigError, match=message):
            convert(path, tmp_path / "t", kind=kind)
    assert sorted(os.listdir(tmp_path)) == ["m.gguf"]
    records = rows_of("f32", V41)
    records[1][7] = np.full(64, 1e30, np.float32).view(np.uint8)
    path = write_gguf(
        tmp_path / "n.gguf", {layer: raw.view(np.float32) for layer, raw in records.items()}, "f32"
    )
    with pytest.raises(InputError, match="layer 1, rows from 0 on: .* in row 7, column 0"):
        convert(path, tmp_path / "t", kind="q8_0")


# Comparing.


def test_a_file_is_compared_with_the_release_it_was_made_of(tmp_path):
    release = write_v41(tmp_path / "c")
    tensors = v41_tensors()
    fmt, new = RowFormat("fp8", 64), RowFormat("q8_0", 64)
    values = {
        layer: fmt.decode(
            np.concatenate(
                [tensors[f"layers.{layer}.engram.embed.{part}"][1] for part in ("weight", "scale")],
                axis=1,
            )
        )
        for layer in (1, 3)
    }
    records = {layer: new.encode(rows_Nd) for layer, rows_Nd in values.items()}
    path = write_gguf(tmp_path / "m.gguf", records, "q8_0")
    found = compare(open_rows(release), open_rows(path))
    assert found.kinds == ("fp8", "q8_0") and found.address_digests[0] == found.address_digests[1]
    assert found.difference is not None and not found.equal
    for layer, rows_Nd in values.items():
        error = np.abs(oracle("q8_0", records[layer]) - rows_Nd)
        assert found.difference[layer].max_abs == pytest.approx(float(error.max()))
        assert found.difference[layer].relative_rms < 0.01
    assert compare(open_rows(path), path_of(convert(path, tmp_path / "t"))).equal


def path_of(made: module.Converted) -> str:
    return made.path


def test_rows_of_other_addresses_are_not_compared(tmp_path):
    first = write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")
    config = V41 | {"engram_vocab_size": 60}
    second = write_gguf(tmp_path / "n.gguf", rows_of("q8_0", config), "q8_0", config)
    assert compare(open_rows(first), open_rows(second)).difference is None


def test_a_table_is_no_release(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")
    convert(path, tmp_path / "t")
    assert is_release(path) and is_release(write_v41(tmp_path / "c"))
    assert not is_release(tmp_path / "t") and not is_release(tmp_path / "none")


# The sample, and the commands.


@pytest.mark.parametrize("release", ["deepseek_v41", "qwen4"])
def test_a_sample_is_read_by_the_package_and_has_the_rows_of_the_other_sample(tmp_path, release):
    plain = write_sample(tmp_path / "c", release, rows_per_head=50)
    folder = write_sample(tmp_path / "g", f"{release}_gguf", rows_per_head=50)
    here, there = open_rows(folder / FIRST), open_rows(plain)
    assert here.config == there.config and here.address_digest == there.address_digest
    fmt = RowFormat("q8_0", here.config.dim)
    for layer in here.layers:
        old = np.empty((there.rows(layer), there.fmt.row_bytes), np.uint8)
        new = np.empty((here.rows(layer), fmt.row_bytes), np.uint8)
        there.read_rows(layer, 0, old)
        here.read_rows(layer, 0, new)
        np.testing.assert_array_equal(new, fmt.encode(there.fmt.decode(old)))
    tensors = {
        tensor.name: tensor
        for number in (1, 2)
        for tensor in gguf.GGUFReader(folder / f"model-0000{number}-of-00002.gguf").tensors
    }
    name = "per_layer_token_embd.weight" if release == "qwen4" else "blk.1.engram_embd.weight"
    assert tensors[name].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert tensors[name].shape.tolist() == [here.config.dim, here.rows(1)]
    assert SAMPLE_V41["engram_head_dim"] == 64


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_commands_take_gguf_files(tmp_path):
    write_sample(tmp_path / "g", "deepseek_v41_gguf", rows_per_head=50)
    write_sample(tmp_path / "c", "deepseek_v41", rows_per_head=50)
    path = tmp_path / "g" / FIRST
    code, text = run("table", "stat", path)
    assert code == 0 and "DeepSeek-V4.1 in" in text
    assert "240 rows of 68 bytes (q8_0, d = 64) in blk.1.engram_embd.weight" in text
    assert "assumed rows of a head: engram_vocab_size = 50" in text
    code, text = run("table", "stat", path, "--json")
    facts = json.loads(text)
    assert facts["row_format"] == {"kind": "q8_0", "d": 64} and facts["assumed"]
    code, text = run("table", "compare", tmp_path / "c", path, "--json")
    assert code == 1 and json.loads(text)["kinds"] == ["fp8", "q8_0"]
    code, text = run("table", "convert", path, tmp_path / "t", "--format", "int8", "--json")
    assert code == 0 and json.loads(text)["kind"] == "int8"
    code, text = run("table", "stat", path, "--ids", tmp_path / "ids.txt")
    assert code == 1 and "expected a table with --ids or --text" in text
    code, text = run("table", "stat", tmp_path / "none.gguf")
    assert code == 1 and "expected a GGUF file, found none" in text


def test_a_table_of_q8_0_is_quantised_on(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")
    convert(path, tmp_path / "t")
    made = quantize(tmp_path / "t", tmp_path / "q", "q4_0")
    assert made.kind == "q4_0" and made.bytes == 546 * 36
