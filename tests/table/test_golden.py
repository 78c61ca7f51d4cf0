"""Tables of format 1 that were written once are read the same for good, by every way of reading.

The tables and what is expected of them are in tests/data/tables/format-1, written by
tests/tools/golden_tables.py. A test that fails here means that users' tables would be read wrongly,
or not at all: mend the code, never the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engraphy import _native
from engraphy.errors import DigestMismatch
from engraphy.rows import RowFormat, read
from engraphy.rows.codecs import CODECS
from engraphy.store import open_store
from engraphy.table import Table
from engraphy.table.chunks import row_chunks
from engraphy.table.inspection import verify
from tests.tools.golden_tables import EXPECTED, FOLDER, KINDS, LAYERS, main

HEADER_BYTES = 4096


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(EXPECTED) as arrays:
        return dict(arrays)


@pytest.fixture(params=["off", "auto"])
def engine(request):
    with _native.forced(request.param):
        yield request.param


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "engram.json").read_text())


def same_bits(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.dtype == wanted.dtype and np.array_equal(found.view("u1"), wanted.view("u1"))


def test_every_kind_of_row_has_a_golden_table():
    assert set(KINDS) == set(CODECS)
    assert {folder.name for folder in FOLDER.iterdir() if folder.is_dir()} == set(KINDS)


def test_the_script_leaves_what_is_there_alone(capsys):
    before = {kind: digests(FOLDER / kind) for kind in KINDS}
    assert main() == 1
    assert "they stay as they are" in capsys.readouterr().out
    assert {kind: digests(FOLDER / kind) for kind in KINDS} == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_table_is_what_its_files_say(kind):
    folder = FOLDER / kind
    says = manifest(folder)
    table = Table.open(folder)
    assert (table.mode, says["format"], says["version"]) == ("r", "engraphy-table", 1)
    assert (table.table_id, table.parent) == (says["table_id"], says["parent"])
    assert table.address_digest == says["address_digest"]
    assert table.config.address_digest(says["vocab_digest"]) == says["address_digest"]
    assert table.config.to_json() == says["config"]
    assert table.fmt == RowFormat.from_json(says["row_format"])
    assert (table.row_bytes, table.shard_rows) == (says["row_bytes"], says["shard_rows"])
    assert table.layers == tuple(layer["layer"] for layer in says["layers"]) == LAYERS
    for layer in says["layers"]:
        shards = table.shards(layer["layer"])
        assert [shard.name for shard in shards] == [shard["name"] for shard in layer["shards"]]
        assert table.rows(layer["layer"]) == layer["rows"]
        for shard in layer["shards"]:
            data = (folder / shard["name"]).read_bytes()
            assert len(data) == shard["bytes"]
            assert hashlib.sha256(data[HEADER_BYTES:]).hexdigest() == shard["sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_table_is_sound(kind, expected):
    checked = Table.open(FOLDER / kind).verify()
    assert checked.shards == checked.of == 5  # 2 of layer 1, 3 of layer 3
    for layer in verify(FOLDER / kind).layers:
        finite_N = np.isfinite(expected[f"{kind}-{layer.layer}-f32"]).all(axis=1)
        assert layer.not_finite == tuple(np.flatnonzero(~finite_N).tolist())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_table_is_read_without_engraphy(kind, layer, expected):
    files = sorted((FOLDER / kind).glob(f"layer-{layer:05d}-*.safetensors"))
    parts = []
    for file in files:
        with safe_open(file, "numpy") as shard:
            parts.append(shard.get_tensor("rows"))
    assert len(parts) > 1
    assert same_bits(np.concatenate(parts), expected[f"{kind}-{layer}-raw"])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_table_has_its_rows_and_values_bit_for_bit(kind, layer, expected, engine):
    table = Table.open(FOLDER / kind)
    raw_NR = expected[f"{kind}-{layer}-raw"]
    values_Nd = expected[f"{kind}-{layer}-f32"]
    bits_Nd = expected[f"{kind}-{layer}-bf16"]
    assert same_bits(np.concatenate(table.shard_arrays(layer)), raw_NR)
    assert same_bits(np.concatenate([rows.copy() for _, rows in row_chunks(table, layer)]), raw_NR)
    assert same_bits(table.fmt.decode(raw_NR), values_Nd)
    assert same_bits(table.fmt.decode(raw_NR, np.zeros(bits_Nd.shape, np.uint16)), bits_Nd)


@pytest.mark.parametrize("options", ["read=mmap", "read=pread"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_golden_table_is_served_bit_for_bit(kind, layer, options, expected, engine):
    before = digests(FOLDER / kind)
    raw_NR = expected[f"{kind}-{layer}-raw"]
    ids_N = np.random.default_rng(0).permutation(len(raw_NR))
    store = open_store(f"file:{FOLDER / kind}?{options}", layer=layer)
    try:
        for suffix, dtype in (("f32", np.float32), ("bf16", np.uint16)):
            wanted_Nd = expected[f"{kind}-{layer}-{suffix}"][ids_N]
            out_Nd = np.zeros(wanted_Nd.shape, dtype)
            assert same_bits(read(store, ids_N, store.info.format, out_Nd), wanted_Nd)
        assert same_bits(store.gather(ids_N), raw_NR[ids_N])
    finally:
        store.close()
    assert digests(FOLDER / kind) == before  # reading leaves no trace


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_times_of_the_files_do_not_matter(kind, tmp_path):
    shutil.copytree(FOLDER / kind, tmp_path / kind)
    for file in (tmp_path / kind).iterdir():
        os.utime(file, (0, 0))
        file.chmod(0o400)
    assert Table.open(tmp_path / kind).verify().shards == 5


def test_a_golden_table_is_carried_on_with_its_id_as_the_parent(tmp_path):
    shutil.copytree(FOLDER / "bf16", tmp_path / "t")
    before = manifest(tmp_path / "t")["table_id"]
    table = Table.open(tmp_path / "t", "w")
    table.write_rows(1, 5, np.full((1, table.row_bytes), 9, np.uint8))
    assert table.seal() != before
    assert Table.open(tmp_path / "t").parent == before
    with pytest.raises(DigestMismatch):
        table.check_address("0" * 64)
