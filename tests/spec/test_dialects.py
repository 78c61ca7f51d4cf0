"""A dialect is one record: a made-up one works everywhere once record and preset are entered."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from engraphy import Addresser, EngramConfig, EngramLayer, HashSpec, LayerSpec, RowFormat, VocabMap
from engraphy.errors import ConfigError, DigestMismatch
from engraphy.fusion.presets import PRESETS, Preset
from engraphy.released.check import check_config
from engraphy.released.checkpoint import Checkpoint
from engraphy.spec.dialects import DIALECTS, Dialect, Release, named
from engraphy.table import Table
from tests.tools.releases import write_release

PRIMES = (11, 13, 17, 19)
CONFIG = {"toy_at": [1, 2], "toy_ids": 50, "toy_end": 7, "hidden_size": 6, "toy_rows": [60, 60]}


def toy_hash(fields: Any) -> dict[str, Any]:
    return {
        "layer_ids": fields["toy_at"],
        "orders": (1, 2),
        "heads": 2,
        "rows_per_head": 11,
        "vocab_size": fields["toy_ids"],
        "filler_id": fields["toy_end"],
    }


def toy_layer(hidden_size: int, width: int, order: int = 2, streams: int = 1) -> LayerSpec:
    return LayerSpec(hidden_size, width, streams, order, kernel=0, unit_offset=True)


TOY = Dialect(
    "toy",
    multipliers=lambda spec, index: (2 * index + 3, 2 * index + 5),
    primes=lambda spec: (PRIMES,) * len(spec.layer_ids),
    layer=toy_layer,
    one_size=True,
    stops_at_filler=True,
    raw_ids=True,
    release=Release(
        title="Toy-1",
        marker="toy_at",
        hash_arguments=toy_hash,
        layer_arguments=lambda fields, columns: (3, {"hidden_size": fields["hidden_size"]}),
        field_names={"layer_ids": "toy_at", "vocab_size": "toy_ids", "filler_id": "toy_end"},
        dim_name="three",
        table="toy.rows",
        hash_tensors={"heads": "primes"},
        row_counts="toy_rows",
    ),
)
TOY_PRESET = Preset(
    TOY,
    form=(False, True, False),
    read_sizes=lambda tensors, shape: dict(
        zip(("hidden_size", "width", "kernel"), (*shape("v", 2), 0), strict=True)
    ),
    parameters=lambda layer: {
        "k": [layer.key.weight],
        "v": [layer.value.weight],
        "norms": [layer.key_norm, layer.query_norm],
    },
)


@pytest.fixture
def toy(monkeypatch) -> EngramConfig:
    """The memory of CONFIG, with the dialect and its preset entered."""
    monkeypatch.setitem(DIALECTS, "toy", TOY)
    monkeypatch.setitem(PRESETS, "toy", TOY_PRESET)
    return EngramConfig.from_hf(CONFIG)


def test_records_are_found_by_name():
    assert list(DIALECTS) == ["demo", "deepseek_v41", "qwen4"] and "qwen4" in DIALECTS
    assert all(named(name).name == name for name in DIALECTS) and set(DIALECTS) == set(PRESETS)
    with pytest.raises(ConfigError, match="dialect: expected one of .*demo.*found 'toy'"):
        named("toy")
    with pytest.raises(ConfigError, match="demo.*no release"):
        DIALECTS["demo"].released  # noqa: B018


def test_a_new_dialect_has_specs_and_configs(toy):
    expected = HashSpec("toy", (1, 2), (1, 2), 2, (11, 11), 50, 7)
    assert toy == EngramConfig(expected, toy_layer(6, 12), 3)
    assert EngramConfig.from_json(json.loads(json.dumps(toy.to_json()))) == toy
    assert expected.primes(2) == PRIMES and expected.row_count(1) == sum(PRIMES)
    with pytest.raises(ConfigError, match=r"toy_rows.*\[60, 60\].*\[60, 61\]"):
        HashSpec.from_hf(CONFIG | {"toy_rows": [60, 61]})
    with pytest.raises(ConfigError, match=r"one size for all orders \(dialect toy\)"):
        HashSpec("toy", (1,), (1, 2), 2, (11, 12), 50, 7)
    with pytest.raises(ConfigError, match=r"toy_at \(Toy-1\) or ple_layer_ids.*among 0 fields"):
        EngramConfig.from_hf({})


def test_a_new_dialect_has_addresses(toy):
    addresser = Addresser(toy.hash, VocabMap.identity(50))
    ids, filler = [4, 9, 7, 8], 7
    before = [filler, 4, 9, filler]  # what a token sees; nothing beyond 7, which ends a text
    for index, layer in enumerate((1, 2)):
        first, second = 2 * index + 3, 2 * index + 5
        rows = addresser.rows([ids], layer=layer)[0]
        for found, token, past in zip(rows, ids, before, strict=True):
            one, two = token * first, token * first ^ past * second
            assert found.tolist() == [one % 11, 11 + one % 13, 24 + two % 17, 41 + two % 19]


def test_a_new_dialect_has_a_layer(toy):
    layer = EngramLayer(toy.layer)
    state = layer.to_state("toy")
    assert set(state) == {"k", "v", "norms"} and state["norms"].shape == (2, 6)
    other = EngramLayer.from_state(state, "toy")
    x, rows = torch.randn(1, 3, 1, 6), torch.randn(1, 3, 12)
    assert torch.equal(other(x, rows)[0], layer(x, rows)[0])
    with pytest.raises(ConfigError, match=r"missing tensors \['k'\]"):
        EngramLayer.from_state({"v": state["v"], "norms": state["norms"]}, "toy")


def test_a_new_dialect_is_checked(toy, tmp_path):
    vocab = VocabMap.identity(50)
    table = Table.create(tmp_path / "t", toy, RowFormat("f32", 3), vocab)
    table.seal()
    assert check_config(CONFIG, vocab, table) == toy
    shuffled = VocabMap(np.random.default_rng(0).permutation(50))
    with pytest.raises(DigestMismatch, match="Toy-1 hashes raw ids"):
        check_config(CONFIG, shuffled)
    with pytest.raises(DigestMismatch, match=r"filler_id \(toy_end\): expected 8, found 7"):
        check_config(CONFIG | {"toy_end": 8}, table=table)


def test_a_new_dialect_has_checkpoints(toy, tmp_path):
    raw = np.random.default_rng(0).integers(0, 100, (60, 6), np.uint8)
    heads = "I64", np.array(PRIMES, np.int64).view(np.uint8)
    tensors = {f"layers.{layer}.toy.rows.weight": ("BF16", raw) for layer in (1, 2)}
    tensors["layers.1.toy.heads"] = heads
    path = write_release(tmp_path / "c", CONFIG, tensors, [list(tensors)])
    checkpoint = Checkpoint.open(path)
    out = np.empty_like(raw)
    checkpoint.read_rows(2, 0, out)
    assert checkpoint.fmt == RowFormat("bf16", 3) and np.array_equal(out, raw)
    assert checkpoint.vocab().digest == VocabMap.identity(50).digest
    tensors["layers.1.toy.heads"] = heads[0], heads[1][::-1].copy()
    with pytest.raises(DigestMismatch, match="toy.heads"):
        Checkpoint.open(write_release(tmp_path / "other", CONFIG, tensors, [list(tensors)]))
