"""Statistics are those of the rows; a table that is not what it says is found out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from engraphy.addresses.vocab import VocabMap
from engraphy.errors import ConfigError, ShardCorrupt, ShardMissing, TableError, TableUnsealed
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.table import Table
from engraphy.table import inspection as module
from engraphy.table import table as table_module
from engraphy.table.inspection import QUANTILES, statistics, verify

LAYERS, FMT = (1, 3), RowFormat("bf16", 32)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(table_module, "MAX_SHARD_BYTES", 8192)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def make(path: Path, rows: dict[int, np.ndarray] | None = None, per_head: int = 50) -> Table:
    spec = HashSpec.demo(LAYERS, (2, 3), 2, per_head, 50, 0)
    table = Table.create(
        path,
        EngramConfig(spec, LayerSpec(8, spec.columns * 32, order=3), 32),
        FMT,
        VocabMap.identity(50),
    )
    for layer in LAYERS:
        values_Nd = (
            np.random.default_rng(layer).standard_normal((table.rows(layer), 32)).astype(np.float32)
        )
        values_Nd[::4] = 0
        table.write_rows(layer, 0, FMT.encode(values_Nd if rows is None else rows[layer]))
    table.seal()
    return table


def numbers(table: Table, layer: int) -> np.ndarray:
    return FMT.decode(np.concatenate(table.shard_arrays(layer)))


# Statistics.


def test_of_all_rows_the_statistics_are_theirs(tmp_path):
    table = make(tmp_path / "t")
    for found in statistics(tmp_path / "t", None):
        norms = np.linalg.norm(numbers(table, found.layer).astype(np.float64), axis=1)
        rows = table.rows(found.layer)
        assert (found.rows, found.bytes, found.scanned) == (rows, rows * 64, rows)
        assert found.zero == (norms == 0).sum() == -(-rows // 4)
        for quantile in QUANTILES:
            assert found.norms[quantile] == pytest.approx(
                np.quantile(norms[norms > 0], quantile), rel=1e-5
            )


def test_a_sample_is_spread_over_the_layer_and_depends_on_the_seed_alone(tmp_path, monkeypatch):
    table = make(tmp_path / "t", per_head=500)
    looked = []
    take = module.take
    monkeypatch.setattr(
        module, "take", lambda shards, ids, out: (looked.append(ids), take(shards, ids, out))
    )
    monkeypatch.setattr(module, "_STEP", 32)
    first = statistics(tmp_path / "t", 100, seed=3)
    ids = np.concatenate(looked[:4])
    bounds = np.arange(101) * table.rows(1) // 100
    assert (
        len(ids) == 100
        and len(looked) == 8
        and (bounds[:-1] <= ids).all()
        and (ids < bounds[1:]).all()
    )
    assert (
        statistics(tmp_path / "t", 100, seed=3) == first != statistics(tmp_path / "t", 100, seed=4)
    )
    norms = np.linalg.norm(numbers(table, 1)[ids], axis=1)
    assert first[0].zero == (norms == 0).sum() and first[0].scanned == 100
    assert first[0].norms[1.0] == pytest.approx(norms.max(), rel=1e-5)


def test_a_sample_as_large_as_the_layer_is_all_of_it(tmp_path):
    make(tmp_path / "t")
    assert statistics(tmp_path / "t", 10_000) == statistics(tmp_path / "t", None)


def test_rows_that_were_never_written_take_no_disk_and_have_no_norms(tmp_path):
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 10_000, 50, 0)
    Table.create(
        tmp_path / "t",
        EngramConfig(spec, LayerSpec(8, spec.columns * 32, order=3), 32),
        FMT,
        VocabMap.identity(50),
        shard_rows=10**6,
    ).seal()
    for found in statistics(tmp_path / "t", None):
        assert found.zero == found.scanned == found.rows and found.norms == {}
        assert found.disk_bytes < 10_000 < 1_000_000 < found.bytes


def test_a_sample_of_nothing_is_refused(tmp_path):
    make(tmp_path / "t")
    for sample in (0, -1):
        with pytest.raises(ConfigError, match="sample: expected at least 1, found"):
            statistics(tmp_path / "t", sample)


# Verification.


def test_a_sound_table_is_sound(tmp_path):
    table = make(tmp_path / "t")
    found = verify(tmp_path / "t")
    assert found.sound and found.table_id == table.table_id and found.shards == found.of > 2
    assert found.bytes == table.config.row_count() * 64
    for layer in found.layers:
        primes = table.config.hash.primes(layer.layer)
        assert (layer.rows, layer.columns, layer.primes) == (
            sum(primes),
            4,
            (min(primes), max(primes)),
        )
        assert (layer.decoded, layer.not_finite) == (layer.rows, ())
    assert verify(tmp_path / "t", shards=1).shards == 1


def shard(path: Path) -> Path:
    return sorted(path.glob("layer-00001-*"))[0]


def flip(path: Path) -> None:
    raw = bytearray(shard(path).read_bytes())
    raw[5000] ^= 1
    shard(path).write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (flip, ShardCorrupt),
        (lambda path: shard(path).unlink(), ShardMissing),
        (lambda path: Table.open(path, "w").close(), TableUnsealed),
    ],
)
def test_damage_is_raised(tmp_path, damage, error):
    make(tmp_path / "t")
    damage(tmp_path / "t")
    with pytest.raises(error):
        verify(tmp_path / "t")


@pytest.mark.parametrize("shards", [0, -1, 10_000])
def test_a_number_of_shards_that_there_is_not_is_refused(tmp_path, shards):
    make(tmp_path / "t")
    with pytest.raises(ConfigError, match="sample: expected 1 to"):
        verify(tmp_path / "t", shards)


def test_rows_that_are_no_numbers_are_named(tmp_path):
    spec = make(tmp_path / "first").config.hash
    rows = {layer: np.ones((spec.row_count(layer), 32), np.float32) for layer in LAYERS}
    rows[3][7, 1], rows[3][11, 31] = np.nan, -np.inf
    make(tmp_path / "t", rows)
    found = verify(tmp_path / "t")
    assert not found.sound and [layer.not_finite for layer in found.layers] == [(), (7, 11)]
    rows[3][:] = np.nan
    make(tmp_path / "u", rows)
    assert verify(tmp_path / "u").layers[1].not_finite == tuple(range(10))


@pytest.mark.parametrize(
    "change",
    [
        lambda primes: (primes[0] + 1, *primes[1:]),
        lambda primes: (*primes[:-1], primes[-1] - 2),
        lambda primes: primes[:1] * 4,
        lambda primes: (primes[0] - 8, *primes[1:]),
    ],
)
def test_counts_that_do_not_come_from_distinct_primes_are_found(tmp_path, monkeypatch, change):
    """As if the rule that makes primes were another one than when the table was made."""
    table = make(tmp_path / "t")
    wrong = change(table.config.hash.primes(1))
    monkeypatch.setattr(HashSpec, "primes", lambda spec, layer: wrong)
    with pytest.raises(TableError, match="distinct primes, found"):
        module._check_counts(table, 1)
