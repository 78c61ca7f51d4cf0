"""What a text touches is counted as going through it token by token would count it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engraphy.addresses.addresser import Addresser
from engraphy.addresses.vocab import VocabMap
from engraphy.errors import ConfigError, DigestMismatch, InputError
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.table import Table
from engraphy.table import usage as module
from engraphy.table.usage import find_vocab, usage
from tests.tools.releases import WORDS, tokenizer

MAP = VocabMap.from_tokenizer(tokenizer(), 64)  # 64 raw ids, the last four dead; 40 compressed ones
EOS = 5
SPECS = {
    "demo": HashSpec.demo((1, 3), (2, 3), 2, (30, 90), 40, 2),
    "deepseek": HashSpec.deepseek_v41((1, 3), (2, 3, 4), 2, 60, 40, 2),
    "qwen": HashSpec.qwen4((1,), (2, 3), 2, 60, 64, EOS, pad_to=16),
}


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def make(path: Path, spec: HashSpec, vocab: VocabMap) -> Table:
    config = EngramConfig(spec, LayerSpec(8, spec.columns * 4, order=spec.order), 4)
    table = Table.create(path, config, RowFormat("f32", 4), vocab)
    table.seal()
    return table


def a_text(tokens: int = 700) -> np.ndarray:
    return (np.random.default_rng(0).zipf(1.4, tokens) % len(WORDS)).astype(np.int64)


def ngrams(spec: HashSpec, vocab: VocabMap, ids_T: np.ndarray, order: int) -> list[tuple[int, ...]]:
    """The n-grams that are hashed, oldest token last: filler where look-back may not go."""
    filler, found = int(vocab.table[spec.filler_id]), []
    for t in range(len(ids_T)):
        gram: list[int] = []
        for i in range(order):
            dead = t - i < 0 or vocab.table[ids_T[t - i]] < 0
            stopped = i > 0 and spec.dialect == "qwen4" and not dead and ids_T[t - i] == EOS
            if dead or stopped:
                gram += [filler] * (order - i)
                break
            gram.append(int(vocab.table[ids_T[t - i]]))
        found.append(tuple(gram))
    return found


@pytest.mark.parametrize(
    ("dialect", "dead"),
    [("demo", False), ("demo", True), ("deepseek", False), ("deepseek", True), ("qwen", False)],
)
def test_counts_are_those_of_a_walk_through_the_text(tmp_path, dialect, dead, monkeypatch):
    monkeypatch.setattr(module, "_STEP", 97)
    spec = SPECS[dialect]
    vocab = VocabMap.identity(64) if dialect == "qwen" else MAP
    ids_T = a_text()
    if dead:
        ids_T[[13, 40, 41, 96, 97, 194]] = 61
    found = usage(make(tmp_path / "t", spec, vocab), vocab, ids_T, hottest=7)
    rows_LTC = Addresser(spec, vocab).all_rows(ids_T[None])[:, 0]
    assert [layer.layer for layer in found] == list(spec.layer_ids)
    for index, layer in enumerate(found):
        assert (layer.tokens, layer.rows) == (700, spec.row_count(layer.layer))
        assert layer.used == len(np.unique(rows_LTC[index]))
        columns = [(order, head) for order in spec.orders for head in range(spec.heads)]
        everything: Counter[tuple[int, int, int, int]] = Counter()
        for column, ((order, head), told) in enumerate(zip(columns, layer.heads, strict=True)):
            grams, rows = ngrams(spec, vocab, ids_T, order), rows_LTC[index, :, column].tolist()
            behind: dict[int, set[tuple[int, ...]]] = {}
            for row, gram in zip(rows, grams, strict=True):
                behind.setdefault(row, set()).add(gram)
            sharing = sum(len(those) for those in behind.values() if len(those) > 1)
            assert (told.order, told.head, told.rows) == (
                order,
                head,
                spec.primes(layer.layer)[column],
            )
            assert (told.ngrams, told.used, told.sharing) == (len(set(grams)), len(behind), sharing)
            everything |= Counter(
                {(row, order, head, len(behind[row])): n for row, n in Counter(rows).items()}
            )
        expected = sorted(everything.items(), key=lambda item: (-item[1], item[0][0]))[:7]
        assert [
            ((hot.row, hot.order, hot.head, hot.ngrams), hot.reads) for hot in layer.hottest
        ] == expected
    assert any(0 < head.sharing < head.ngrams for layer in found for head in layer.heads)


def test_where_a_chunk_ends_makes_no_difference(tmp_path, monkeypatch):
    table = make(tmp_path / "t", SPECS["deepseek"], MAP)
    whole = usage(table, MAP, a_text())
    for step in (1, 2, 3, 699, 700):
        monkeypatch.setattr(module, "_STEP", step)
        assert usage(table, MAP, a_text()) == whole


def test_without_a_shared_row_nothing_shares(tmp_path):
    spec = HashSpec.demo((0,), (2,), 1, 100_003, 40, 2)
    (found,) = usage(make(tmp_path / "t", spec, MAP), MAP, np.arange(10, dtype=np.int32))
    assert (found.used, found.heads[0].ngrams, found.heads[0].sharing) == (10, 10, 0)
    assert [hot.reads for hot in found.hottest] == [1] * 5


def test_ids_and_maps_that_are_not_the_tables_are_refused(tmp_path):
    table = make(tmp_path / "t", SPECS["demo"], MAP)
    for ids in (
        np.zeros((2, 3), np.int64),
        np.zeros(0, np.int64),
        np.zeros(3),
        np.array([0, 64]),
        np.array([-1, 0]),
    ):
        with pytest.raises(InputError, match="id"):
            usage(table, MAP, ids)
    with pytest.raises(DigestMismatch):
        usage(table, VocabMap.from_tokenizer(tokenizer()), a_text())


def test_the_map_is_a_saved_one_the_tokenizers_or_none(tmp_path):
    plain = VocabMap.from_tokenizer(tokenizer())
    table = make(tmp_path / "t", SPECS["demo"], plain)
    assert find_vocab(table, None, tokenizer()).digest == plain.digest
    plain.save(tmp_path / "v.json")
    assert find_vocab(table, tmp_path / "v.json", None).digest == plain.digest
    with pytest.raises(DigestMismatch, match="expected a table of address digest"):
        find_vocab(table, None, None)
    with pytest.raises(ConfigError, match="saved vocabulary map"):
        find_vocab(table, tmp_path / "none", None)
    released = make(tmp_path / "q", SPECS["qwen"], VocabMap.identity(64))
    for model in (None, tokenizer()):
        assert find_vocab(released, None, model).digest == VocabMap.identity(64).digest
