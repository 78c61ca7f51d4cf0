"""Row gradients that wait: bounded by the distinct rows, and their sum is what it would be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap
from engraphy.memory.grads import RowGrad, Waiting, coalesce

LAYERS, HIDDEN, DIM, VOCAB = (1, 3), 12, 4, 40
WEIGHT = torch.zeros(3)


def make_memory() -> EngramMemory:
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=VOCAB, pad_id=0)
    config = EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM), DIM)
    memory = EngramMemory(config, VocabMap.identity(VOCAB))
    memory.init_rows(std=1.0, seed=0)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    return memory.train()


def entries(count: int, rows: int, seed: int = 0, size: int = 50):
    rng = np.random.default_rng(seed)
    for index in range(count):
        grad_Nd = rng.standard_normal((size, DIM)).astype(np.float32)
        yield RowGrad(LAYERS[index % 2], rng.integers(0, rows, size), grad_Nd)


def joined(given, rows: int, most: int | None = None) -> list[RowGrad]:
    waiting, pending = Waiting(), []
    for entry in given:
        waiting.join(pending, entry, WEIGHT, rows)
        held = max(sum(len(e.ids) for e in pending if e.layer == layer) for layer in LAYERS)
        assert most is None or held <= most
    return pending


def test_what_waits_is_bounded_by_the_distinct_rows_whatever_is_accumulated():
    assert len(joined(entries(1000, rows=30), rows=30, most=60 + 50)) <= 6
    assert (
        len(joined(entries(600, rows=90), rows=10**9, most=16_384)) == 600
    )  # few rows in a large table
    large = entries(40, rows=3_000, size=5_000)
    assert len(joined(large, rows=10**9, most=16_384 + 5_000)) <= 10


def test_sums_made_early_equal_the_one_at_the_end_bit_for_bit():
    given = list(entries(200, rows=30))
    expected, found = coalesce(given), coalesce(joined(given, rows=30))
    for layer in LAYERS:
        np.testing.assert_array_equal(found[layer].ids, expected[layer].ids)
        np.testing.assert_array_equal(found[layer].grad, expected[layer].grad)


def test_one_batch_is_handed_over_as_it_came():
    (entry,) = entries(1, rows=30)
    assert joined([entry], rows=30)[0] is entry


def test_layers_keep_their_order_and_their_own_gradients():
    pending = joined(entries(41, rows=30), rows=30)
    assert [entry.layer for entry in pending][:2] == list(LAYERS)
    assert {entry.layer for entry in pending} == set(LAYERS)


def test_a_gradient_that_is_not_finite_stays_so():
    given = list(entries(20, rows=30))
    given[4].grad[7] = np.inf
    given[6].grad[:] = -np.inf
    total = coalesce(joined(given, rows=30))[LAYERS[0]]
    assert not np.isfinite(total.grad).all()


def test_accumulation_through_a_memory_is_bounded_and_equal():
    memory, bytes_, all_of_them = make_memory(), [], []
    rng = torch.Generator().manual_seed(3)
    for _ in range(64):
        ids_BT = torch.randint(0, VOCAB, (4, 16), generator=rng)
        x_BTSD = torch.randn(4, 16, 1, HIDDEN, generator=rng)
        for learner in (memory, alone := make_memory()):
            lookup = learner.lookup(ids_BT)
            y_BTSD = x_BTSD
            for layer in LAYERS:
                y_BTSD = learner.fuse(layer, torch.tanh(y_BTSD), lookup)
            y_BTSD.square().mean().backward()
        all_of_them += alone.drain_row_grads()
        bytes_.append(sum(entry.ids.nbytes + entry.grad.nbytes for entry in memory.row_grads))
    one_batch = sum(entry.ids.nbytes + entry.grad.nbytes for entry in all_of_them[:2])
    table = sum(store.info.rows for store in memory.stores.values()) * (8 + 4 * DIM)
    assert max(bytes_) <= 2 * table + one_batch < sum(e.grad.nbytes for e in all_of_them) / 4
    expected, found = coalesce(all_of_them), coalesce(memory.drain_row_grads())
    for layer in LAYERS:
        np.testing.assert_array_equal(found[layer].ids, expected[layer].ids)
        np.testing.assert_array_equal(found[layer].grad, expected[layer].grad)
    assert memory.row_grads == []


def test_that_nobody_drains_is_noticed_though_few_entries_wait(monkeypatch):
    monkeypatch.setattr("engraphy.memory.grads._MANY_PENDING", 100)
    with pytest.warns(UserWarning, match="100 row gradients wait") as told:
        assert len(joined(entries(300, rows=30), rows=30)) < 100
    assert len(told) == 1
