"""Native updates of rows are those of the plain versions bit for bit, at every level that this CPU
runs and with any number of threads, and nothing else is written."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap, _native
from engraphy.errors import RowOutOfRange
from engraphy.memory import RowGrad
from engraphy.memory.grads import coalesce
from engraphy.memory.summed import SummedGrad
from engraphy.store import CacheStore, RamStore
from engraphy.table import Table
from engraphy.train import RowAdagrad, RowAdam, RowNesterov, clip_together
from engraphy.train.optimizer import RowOptimizer

LEVELS = _native.core.levels() if _native.core else ()
pytestmark = pytest.mark.skipif(not LEVELS, reason=_native.reason)
every_level = pytest.mark.parametrize("level", LEVELS)

LAYER, ROWS = 2, 9001
OPTIMIZERS = {
    "adam": partial(RowAdam, lr=0.1),
    "adam, bf16": partial(RowAdam, lr=0.1, moment_dtype="bf16", seed=5),
    "adam, bf16 to nearest": partial(RowAdam, lr=0.1, moment_dtype="bf16", rounding="nearest"),
    "nesterov": partial(RowNesterov, lr=0.1),
    "nesterov, bf16": partial(RowNesterov, lr=0.1, moment_dtype="bf16"),
    "adagrad": partial(RowAdagrad, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_format = pytest.mark.parametrize("row_format", ["f32", "bf16"])


def new_memory(dim: int, row_format: str, rows: int = ROWS, store: Any = "ram:") -> EngramMemory:
    spec = HashSpec.demo((LAYER,), (2,), 1, rows, vocab_size=50, pad_id=0)
    config = EngramConfig(spec, LayerSpec(8, dim, order=2), dim)
    memory = EngramMemory(config, VocabMap.identity(50), store, row_format)
    memory.init_rows(std=0.5, seed=1)
    return memory


def gradients(dim: int, seed: int, count: int = 6000, rows: int = ROWS) -> list[RowGrad]:
    """Two entries, many duplicates: row 7 has a thousand gradients."""
    rng = np.random.default_rng(seed)
    entries = []
    for size in (count, count // 3):
        ids_N = rng.integers(0, rows, size)
        ids_N[rng.random(size) < 0.15] = 7 % rows
        grad_Nd = rng.standard_normal((size, dim)) * 10.0 ** rng.integers(-12, 3, (size, 1))
        entries.append(RowGrad(LAYER, ids_N, grad_Nd.astype(np.float32)))
    return entries


def records(memory: EngramMemory, optimizer: RowOptimizer) -> list[np.ndarray]:
    """The bytes of all rows and moments."""
    ids_N = np.arange(memory.stores[LAYER].info.rows)
    return [memory.stores[LAYER].gather(ids_N), optimizer.moments[LAYER].gather(ids_N)]


def trained(level: str, optimizer: str, dim: int, row_format: str) -> list[np.ndarray]:
    """Bytes after a plain step and a clipped one."""
    rows, count = (ROWS, 6000) if dim < 1000 else (53, 200)
    memory = new_memory(dim, row_format, rows)
    made = OPTIMIZERS[optimizer](memory)
    with _native.forced(level):
        memory.row_grads += gradients(dim, 0, count, rows)
        made.step()
        _, summed = clip_together([], coalesce(gradients(dim, 1, count, rows)), 5.0)
        made.step(summed)
    return records(memory, made)


plainly_trained = cache(partial(trained, "off"))


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for found_NR, expected_NR in zip(found, expected, strict=True):
        np.testing.assert_array_equal(found_NR, expected_NR)


@every_level
@every_format
@every_optimizer
@pytest.mark.parametrize("dim", [4, 64, 45])
def test_rows_and_moments_are_those_of_the_plain_version(level, optimizer, row_format, dim):
    expected = plainly_trained(optimizer, dim, row_format)
    assert_same(trained(level, optimizer, dim, row_format), expected)


@every_level
@every_optimizer
def test_rows_wider_than_a_panel_are_updated_too(level, optimizer):
    expected = plainly_trained(optimizer, 2050, "bf16")
    assert_same(trained(level, optimizer, 2050, "bf16"), expected)


@every_level
@every_optimizer
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_result_does_not_depend_on_the_number_of_threads(level, optimizer, count, threads):
    threads(count)
    expected = plainly_trained(optimizer, 45, "bf16")
    assert_same(trained(level, optimizer, 45, "bf16"), expected)


@every_level
def test_sums_and_norm_do_not_depend_on_the_number_of_threads(level, threads):
    found = []
    for count in (1, 2, 7):
        threads(count)
        with _native.forced(level):
            summed = coalesce(gradients(20, 3, count=40_000))[LAYER]
            found.append((summed.ids, summed.grad, summed.square_sum()))
    with _native.forced("off"):
        summed = coalesce(gradients(20, 3, count=40_000))[LAYER]
        expected = (summed.ids, summed.grad, summed.square_sum())
    for ids_U, grad_Ud, squares in found:
        np.testing.assert_array_equal(ids_U, expected[0])
        np.testing.assert_array_equal(grad_Ud, expected[1])
        assert squares == expected[2]


@every_level
@settings(max_examples=60)
@given(
    ids=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 40), min_size=1, max_size=80),
    largest=st.sampled_from([1, 2, 2**12, 2**24, 2**40, 2**56, 2**63]),
)
def test_sorting_is_numpy_s_stable_sort(level, ids, largest):
    ids_N = np.array([row % largest for row in ids], np.int64)
    grad_Nd = np.arange(len(ids_N), dtype=np.float32)[:, None]
    with _native.forced("off"):
        expected = SummedGrad.of([ids_N], [grad_Nd])
    with _native.forced(level):
        found = SummedGrad.of([ids_N], [grad_Nd])
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.grad, expected.grad)
    assert found.runs._order is not None and expected.runs._order is not None
    np.testing.assert_array_equal(found.runs._order.positions_N, expected.runs._order.positions_N)


def test_ids_too_large_for_a_key_are_sorted_by_numpy():
    ids_N = np.array([2**63 - 1, 5, 2**63 - 1, -3], np.int64)
    summed = SummedGrad.of([ids_N], [np.ones((4, 3), np.float32)])
    assert summed.ids.tolist() == [-3, 5, 2**63 - 1]
    assert summed.grad[:, 0].tolist() == [1.0, 1.0, 2.0]


@every_level
@every_format
@pytest.mark.parametrize("shard_rows", [100, 9001])
def test_a_table_in_shards_is_updated_as_rows_in_memory(level, row_format, shard_rows, tmp_path):
    in_memory = new_memory(20, row_format)
    table = Table.create(
        tmp_path / "table",
        in_memory.config,
        in_memory.format,
        in_memory.vocab,
        shard_rows=shard_rows,
    )
    on_disk = new_memory(20, row_format, store=table)
    results = []
    for memory in (in_memory, on_disk):
        memory.row_grads += gradients(20, 0)
        optimizer = RowAdam(memory, moment_dtype="bf16")
        with _native.forced(level):
            optimizer.step()
        results.append(records(memory, optimizer))
    assert_same(results[1], results[0])
    table.close()


@every_level
@every_format
def test_a_store_without_mapped_memory_is_gathered_and_scattered(level, row_format):
    direct = new_memory(20, row_format)
    inner = RamStore(ROWS, direct.format.row_bytes)
    cached = new_memory(20, row_format, store={LAYER: CacheStore(inner, 1 << 16)})
    results = []
    for memory in (direct, cached):
        memory.row_grads += gradients(20, 0)
        optimizer = RowAdagrad(memory)
        with _native.forced(level):
            optimizer.step()
        results.append(records(memory, optimizer))
    assert_same(results[1], results[0])


@every_level
@pytest.mark.parametrize("row", [-1, ROWS, 2**62])
def test_an_id_out_of_range_is_an_error_before_anything_is_written(level, row):
    memory = new_memory(4, "f32")
    optimizer = RowAdam(memory)
    before = records(memory, optimizer)
    memory.row_grads += [*gradients(4, 0), RowGrad(LAYER, np.array([row]), np.ones((1, 4), "f4"))]
    with _native.forced(level), pytest.raises(RowOutOfRange):
        optimizer.step()
    assert_same(records(memory, optimizer), before)


@every_level
def test_subnormal_numbers_are_kept_whatever_torch_is_told(level):
    expected = plainly_trained("adam", 45, "f32")
    torch.set_flush_denormal(True)
    try:
        found = trained(level, "adam", 45, "f32")
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, expected)


class Louder(RowAdam):
    """A user's own update on top of RowAdam: it has no native twin."""

    def update(self, rows_Ud, grad_Ud, moments_Um):
        super().update(rows_Ud, 2 * grad_Ud, moments_Um)


class Renamed(RowAdam):
    name = "renamed"


def test_an_update_that_is_overridden_is_used():
    results = []
    for kind, factor in ((Louder, 1), (RowAdam, 2), (Renamed, 2)):
        memory = new_memory(4, "f32")
        optimizer = kind(memory)
        memory.row_grads += [
            RowGrad(layer, ids_N, factor * grad_Nd) for layer, ids_N, grad_Nd in gradients(4, 0)
        ]
        optimizer.step()
        results.append(records(memory, optimizer))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_only_the_native_road_is_taken_by_our_own_optimizers(monkeypatch):
    def refuse(*_):
        raise AssertionError("the plain version was used")

    for make in OPTIMIZERS.values():
        memory = new_memory(4, "f32")
        optimizer = make(memory)
        monkeypatch.setattr(type(optimizer), "_step_plain", refuse, raising=False)
        memory.row_grads += gradients(4, 0)
        optimizer.step()
        with _native.forced("off"), pytest.raises(AssertionError, match="plain version"):
            memory.row_grads += gradients(4, 0)
            optimizer.step()


GRADS, NO_GRADS = (8, 8, 1, 0, 0, 0, 4), (0, 0, 1, 0, 0, 1, 4)
PLACE, BF16 = (8, 1, 1, False, False), (8, 1, 1, True, False)
NUMBERS = (0, 0, 0, 0)


def updated(core, rule="adam", runs=GRADS, sums=8, ids=8, rows=PLACE, moments=PLACE):
    core.update_rows(rule, NUMBERS, runs, sums, 1.0, ids, rows, moments, False, 0)


CALLS = {
    "no gradients": lambda core: core.survey(NO_GRADS, 8, False),
    "an order without starts": lambda core: core.survey((8, 8, 1, 8, 0, 1, 4), 8, False),
    "no place for sums": lambda core: core.survey((8, 8, 1, 8, 8, 1, 4), 0, False),
    "no ids to sort": lambda core: core.sort_rows(0, 3, 8, 8, 8),
    "nothing to sort": lambda core: core.sort_rows(8, 0, 8, 8, 8),
    "an unknown rule": lambda core: updated(core, rule="sgd"),
    "bf16 moments of adagrad": lambda core: updated(core, rule="adagrad", moments=BF16),
    "no ids": lambda core: updated(core, runs=(8, 8, 1, 0, 0, 3, 4), ids=0),
    "no sums": lambda core: updated(core, runs=(8, 8, 1, 8, 8, 3, 4), sums=0),
    "too few copies": lambda core: updated(
        core, runs=(8, 8, 1, 0, 0, 3, 4), rows=(8, 2, 2, False, True)
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_sizes_that_cannot_be_are_errors(call):
    with pytest.raises(ValueError):
        CALLS[call](_native.core)
