"""A table with a hot index: the file lies in its folder, and is checked as the shards are."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from engraphy.addresses import Addresser, HotIndex, VocabMap
from engraphy.cli import app
from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    ShardCorrupt,
    ShardForeign,
    ShardMissing,
    ShardTruncated,
    TableError,
)
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, HotSpec, LayerSpec
from engraphy.table import Table, inspection
from engraphy.table.usage import usage
from tests.tools.hot import some_index, some_ngrams

VOCAB = VocabMap.identity(40)
SPEC = HashSpec.demo((1, 3), (2, 3), 2, 53, vocab_size=40, pad_id=0)
ADDRESSER = Addresser(SPEC, VOCAB)


def config_of(hot: HotIndex | None) -> EngramConfig:
    return EngramConfig(SPEC, LayerSpec(8, SPEC.columns * 4), 4, None if hot is None else hot.spec)


def make(path, hot: HotIndex | None) -> Table:
    table = Table.create(path, config_of(hot), RowFormat("f32", 4), VOCAB, shard_rows=100, hot=hot)
    for layer in table.layers:
        values = np.random.default_rng(layer).normal(size=(table.rows(layer), 4))
        table.write_rows(layer, 0, table.fmt.encode(values.astype(np.float32)))
    table.seal()
    return table


@pytest.fixture
def table(tmp_path):
    return make(tmp_path / "table", some_index(ADDRESSER))


def test_a_table_says_how_many_rows_are_hot(table):
    about = json.loads((table.path / "engram.json").read_text())
    slots = some_index(ADDRESSER).spec.slots
    assert about["hot_rows"] == 2 * slots == table.config.hot_rows
    assert about["config"]["hot"] == {"digest": some_index(ADDRESSER).digest, "slots": slots}
    for layer in (1, 3):
        assert table.rows(layer) == SPEC.row_count(layer) + 2 * slots
    again = Table.open(table.path)
    assert again.hot is not None and again.hot.spec == table.config.hot
    assert inspection.verify(table.path).sound
    assert EngramConfig.from_json(table.config.to_json()) == table.config


def test_a_config_without_an_index_is_what_it_was():
    """Golden: the digest and the JSON of memories that were made before there were indexes."""
    config = config_of(None)
    assert set(config.to_json()) == {"hash", "layer", "dim"}
    assert (
        config.address_digest("v")
        == "77bc29e1d55608b693c5caf897f0e5024bdfe6cf04d2425898556a645641d4bb"
    )
    assert EngramConfig.from_json(config.to_json() | {"hot": None}) == config


@pytest.mark.parametrize(
    "fields", [{"digest": "0" * 63}, {"slots": 0}, {"slots": 2**31}, {"digest": 5}, {"slots": "1"}]
)
def test_a_hot_spec_that_cannot_be_meant_is_refused_by_name(fields):
    with pytest.raises(ConfigError, match=f"hot.{next(iter(fields))}"):
        HotSpec(**{"digest": "0" * 64, "slots": 1} | fields)


def test_a_table_is_created_with_the_index_that_its_config_names(tmp_path):
    hot, other = some_index(ADDRESSER), some_index(ADDRESSER, seed=3)
    fmt = RowFormat("f32", 4)
    for config, index in ((config_of(hot), None), (config_of(None), hot)):
        with pytest.raises(ConfigError, match="hot: expected the index that the config names"):
            Table.create(tmp_path / "t", config, fmt, VOCAB, hot=index)
    with pytest.raises(DigestMismatch, match="hot: expected an index of HotSpec"):
        Table.create(tmp_path / "t", config_of(hot), fmt, VOCAB, hot=other)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_table_without_its_index_is_refused_by_name(table, tmp_path, mode):
    path = table.path / "hot.index"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(ShardMissing, match="hot.index: expected the table's hot index"):
        Table.open(table.path, mode)
    some_index(ADDRESSER, seed=3).save(path)
    with pytest.raises(ShardForeign, match="hot.index: hot: expected an index of"):
        Table.open(table.path, mode)
    for size in (0, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardTruncated, match="hot.index: expected a file of engraphy-hot-1"):
            Table.open(table.path, mode)
    changed = bytearray(whole)
    changed[-3] ^= 1
    path.write_bytes(changed)
    for use in (Table.verify, lambda opened: opened.hot):
        with pytest.raises(ShardCorrupt, match="hot.index: hot index: expected content of digest"):
            use(Table.open(table.path))


def test_an_index_that_is_cut_while_it_is_used_still_finds_its_ngrams(table):
    index = table.hot
    ids = np.random.default_rng(5).zipf(1.3, (1, 500)) % 40
    expected = Addresser(SPEC, VOCAB, some_index(ADDRESSER)).rows(ids, 1)
    os.truncate(table.path / "hot.index", 100)
    assert np.array_equal(Addresser(SPEC, VOCAB, index).rows(ids, 1), expected)


def test_engram_json_must_agree_with_itself(table):
    path = table.path / "engram.json"
    body = json.loads(path.read_text())
    for change in ({"hot_rows": 0}, {"config": body["config"] | {"hot": None}}):
        path.write_text(json.dumps(body | change))
        with pytest.raises((TableError, DigestMismatch), match="engram.json"):
            Table.open(table.path)


def test_usage_counts_the_rows_of_hot_ngrams(table):
    ids = np.random.default_rng(5).zipf(1.3, 500) % 40
    addresser = Addresser(SPEC, VOCAB, table.hot)
    for layer in usage(table, VOCAB, ids):
        read, counts = np.unique(addresser.rows(ids[None], layer.layer), return_counts=True)
        assert layer.used == len(read)
        assert layer.hottest[0].reads == counts.max()
        assert read[-1] >= SPEC.row_count(layer.layer)


def test_the_command_makes_a_table_that_reads_as_the_old_one(tmp_path):
    plain = make(tmp_path / "plain", None)
    VOCAB.save(tmp_path / "vocab.json")
    some_ngrams(ADDRESSER).save(tmp_path / "counts")
    arguments = ["table", "hot", str(plain.path), str(tmp_path / "counts"), str(tmp_path / "hot")]
    done = CliRunner().invoke(
        app, [*arguments, "--vocab", str(tmp_path / "vocab.json"), "--top", "9"]
    )
    assert done.exit_code == 0, done.output
    assert "18 n-grams, 36 rows in each layer" in done.output
    made = Table.open(tmp_path / "hot")
    assert made.parent == plain.table_id and made.config.hot is not None
    made.verify()
    ids = np.random.default_rng(5).zipf(1.3, (1, 500)) % 40
    addresser = Addresser(SPEC, VOCAB, made.hot)
    for layer in (1, 3):
        old = np.concatenate(plain.shard_arrays(layer))[ADDRESSER.rows(ids, layer)]
        new = np.concatenate(made.shard_arrays(layer))[addresser.rows(ids, layer)]
        assert np.array_equal(old, new)
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 1 and "taken" in " ".join(done.output.split())
    counts = [str(plain.path / "engram.json"), str(tmp_path / "third")]
    done = CliRunner().invoke(app, ["table", "hot", str(plain.path), *counts])
    assert done.exit_code == 1 and "expected a file of engraphy-ngrams-1" in done.output
