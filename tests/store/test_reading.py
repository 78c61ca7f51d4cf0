"""The scope of one read of mapped memory: it pins one store, and on leaving says whether that one
was whole."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engraphy
from engraphy import _native
from engraphy.errors import ShardTruncated, StoreError
from engraphy.memory.state import SequenceState
from engraphy.rows import read
from engraphy.store import (
    CacheStore,
    RamStore,
    ReloadableStore,
    RowStore,
    mapped,
    mapping,
    open_store,
)
from engraphy.store.base import ReadingAll
from tests.memory.test_token_reader import LAYERS, SPECS, make_memory
from tests.tools.store_builders import build, fmt_of, shards_of, usual

ON_DISK = ("file", "file in shards", "pool", "checkpoint in parts")
ENGINES = ("off", "auto") if _native.core else ("off",)
on_disk = pytest.mark.parametrize("name", ON_DISK)


@pytest.fixture(autouse=True)
def no_look_by_chance(monkeypatch):
    """Sizes are looked at once; what is found after that is found by the check of the read."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(mapping, "_LOOK_EVERY", 1000)


@pytest.fixture(params=ENGINES)
def engine(request):
    with _native.forced(request.param):
        yield request.param


def cut(store: RowStore, by: int = 1) -> None:
    """Shorten every file of the table behind a store, by less than a page: no read of it is a
    fault."""
    folder = Path(store.info.path or "")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
        os.truncate(path, path.stat().st_size - by)


def two(name: str, tmp_path: Path) -> tuple[RowStore, RowStore, np.ndarray]:
    """Two stores of equal rows, and these."""
    tmp_path.mkdir(exist_ok=True)
    first, expected = build(name, tmp_path / "first")
    second, _ = build(name, tmp_path / "second")
    first.gather(np.array([0]))
    return first, second, expected


def last_row(store: RowStore) -> np.ndarray:
    return np.array([store.info.rows - 1])


def number(store: RowStore, name: str) -> np.ndarray:
    """The last row as numbers."""
    fmt = usual(name)
    return read(store, last_row(store), fmt, np.full((1, fmt.d), np.nan, np.float32))


def call_after(monkeypatch, module, name: str, act: Callable[[], None]) -> None:
    """`act()` once, before the next call of a function."""
    whole, acts = getattr(module, name), [act]

    def late(*arguments, **keywords):
        if acts:
            acts.pop()()
        return whole(*arguments, **keywords)

    monkeypatch.setattr(module, name, late)


# One store, whole.


@on_disk
def test_a_table_that_is_cut_and_exchanged_while_it_is_read_is_an_error_of_that_read(
    name, tmp_path, engine
):
    old, new, expected = two(name, tmp_path)
    store = ReloadableStore(old)
    with pytest.raises(ShardTruncated):
        with store.reading(1) as shards:
            cut(old)
            store.reload(new)
            assert shards is not None and len(shards[-1])
    assert store.stats.gathers == new.stats.gathers == 0 and old.stats.gathers == 1
    np.testing.assert_array_equal(store.gather(last_row(store))[0], expected[-1])


@on_disk
def test_reading_rows_as_numbers_from_a_table_that_is_cut_and_exchanged_meanwhile_is_an_error(
    name, tmp_path, engine, monkeypatch
):
    old, new, expected = two(name, tmp_path)
    store = ReloadableStore(old)
    call_after(
        monkeypatch,
        sys.modules["engraphy.rows.read"],
        "_read_mapped",
        lambda: (cut(old), store.reload(new)) and None,
    )
    with pytest.raises(ShardTruncated):
        number(store, name)
    np.testing.assert_array_equal(number(store, name)[0], usual(name).decode(expected[-1:])[0])


@on_disk
def test_gathering_from_a_table_that_is_cut_and_exchanged_meanwhile_is_an_error(
    name, tmp_path, engine, monkeypatch
):
    old, new, expected = two(name, tmp_path)
    store = ReloadableStore(old)
    call_after(monkeypatch, mapped, "gather_mapped", lambda: (cut(old), store.reload(new)) and None)
    with pytest.raises(ShardTruncated):
        store.gather(last_row(store))
    np.testing.assert_array_equal(store.gather(last_row(store))[0], expected[-1])


@on_disk
def test_a_store_that_is_cut_within_the_scope_is_an_error_on_leaving(
    name, tmp_path, engine, monkeypatch
):
    store, _, _ = two(name, tmp_path)
    with pytest.raises(ShardTruncated):
        with store.reading(1):
            cut(store)
    assert store.stats.gathers == 1
    other, _, _ = two(name, tmp_path / "other")
    call_after(monkeypatch, sys.modules["engraphy.rows.read"], "_read_mapped", lambda: cut(other))
    with pytest.raises(ShardTruncated):
        number(other, name)


@on_disk
def test_a_cache_keeps_no_row_of_a_table_that_was_cut_while_it_was_read(
    name, tmp_path, engine, monkeypatch
):
    behind, _, _ = two(name, tmp_path)
    cache = CacheStore(behind, 1 << 20)
    call_after(monkeypatch, mapped, "gather_mapped", lambda: cut(behind))
    with pytest.raises(ShardTruncated):
        number(cache, name)
    assert not len(cache.kept()) and cache.stats.gathers == 0
    assert shards_of(cache) is None


@pytest.mark.skipif(_native.core is None, reason="without the native part the process ends")
@on_disk
def test_pages_that_are_gone_are_an_error_on_leaving_though_another_table_is_served(name, tmp_path):
    old, new, _ = two(name, tmp_path)
    store = ReloadableStore(old)
    with pytest.raises((ShardTruncated, StoreError)):
        with store.reading(1) as shards:
            for path in Path(old.info.path or "").glob("*.safetensors"):
                path.chmod(0o644)
                os.truncate(path, 0)
            store.reload(new)
            assert shards is not None and not shards[-1][-1].any()


@torch.no_grad()
@pytest.mark.skipif(_native.core is None, reason=_native.reason)
def test_a_decoded_token_is_read_anew_where_its_table_was_cut_and_exchanged_meanwhile(
    tmp_path, monkeypatch
):
    memories = [make_memory(SPECS["demo"], seed=seed) for seed in range(2)]
    for memory, name in zip(memories, "ab", strict=True):
        memory.write_table(tmp_path / name)
    old, new = (
        {layer: open_store(f"file:{tmp_path / name}?populate=1", layer=layer) for layer in LAYERS}
        for name in "ab"
    )
    stores = {layer: ReloadableStore(old[layer]) for layer in LAYERS}
    served, expected = make_memory(SPECS["demo"], store=stores), memories[1]
    states = served.state(1), expected.state(1)
    for memory, state in zip((served, expected), states, strict=True):
        memory.lookup(torch.tensor([[3, 4, 5]]), state)

    def exchange() -> None:
        cut(old[LAYERS[0]])
        for layer in LAYERS:
            stores[layer].reload(new[layer])

    call_after(monkeypatch, SequenceState, "cursor", exchange)
    found = served.lookup(torch.tensor([[6]]), states[0]).rows
    for layer, rows_B1E in expected.lookup(torch.tensor([[6]]), states[1]).rows.items():
        assert torch.equal(found[layer], rows_B1E)
    assert all(store._closed for store in old.values())


# What the scope does besides.


def test_a_call_is_counted_with_its_rows_by_the_store_that_was_read(tmp_path):
    old, new, _ = two("file", tmp_path)
    store, before = ReloadableStore(old), old.stats.rows
    with store.reading(7):
        store.reload(new)
        assert not old._closed
    assert old._closed and (old.stats.rows - before, store.stats.rows, new.stats.rows) == (7, 7, 0)
    assert store.stats.latency.calls == 1
    with store.reading():
        pass
    assert (store.stats.gathers, store.stats.rows) == (2, 7)


@pytest.mark.parametrize("wrap", [lambda store: store, ReloadableStore])
def test_an_error_within_the_scope_is_not_hidden_by_the_check_and_nothing_is_counted(
    wrap, tmp_path
):
    old, new, _ = two("file", tmp_path)
    store = wrap(old)
    with pytest.raises(KeyError, match="mine"):
        with store.reading(3):
            cut(old)
            raise KeyError("mine")
    assert old.stats.gathers == 1
    if isinstance(store, ReloadableStore):
        store.reload(new)
        assert old._closed  # nobody holds it any more


@pytest.mark.parametrize("name", ["ram", *ON_DISK, "reloadable file"])
def test_memory_stays_within_the_scope_when_the_store_is_closed(name, tmp_path):
    store, expected = build(name, tmp_path)
    with store.reading(len(expected)) as shards:
        store.close()
        assert shards is not None
        np.testing.assert_array_equal(np.concatenate(shards), expected)
    assert store.stats.rows == len(expected)
    with pytest.raises(StoreError, match="closed"):
        with store.reading(1):
            pass


def test_of_several_scopes_all_are_left_when_one_cannot_be_entered_or_was_damaged(tmp_path):
    olds, news = (
        [build("file", tmp_path / f"{when} {i}")[0] for i in range(3)] for when in ("old", "new")
    )
    stores = [ReloadableStore(store) for store in olds]
    with pytest.raises(ShardTruncated):
        with ReadingAll(stores, 2) as shards:
            assert [len(shard[0]) for shard in shards if shard] == [olds[0].info.rows] * 3
            cut(olds[0])
            for store, new in zip(stores, news, strict=True):
                store.reload(new)
    assert all(old._closed for old in olds) and [store.stats.rows for store in stores] == [0, 2, 2]
    stores[2].close()
    with pytest.raises(StoreError, match="closed"):
        with ReadingAll(stores, 2):
            pass
    assert [store._readers._count for store in stores] == [0, 0, 0]


# The older ways.


@pytest.mark.parametrize(
    "wrap", [lambda store: store, ReloadableStore, lambda store: CacheStore(store, 10_000)]
)
def test_shards_is_deprecated_and_says_what_to_use(wrap):
    store = wrap(RamStore(10, 4))
    with pytest.warns(DeprecationWarning, match=r"store\.reading\(rows\)") as caught:
        shards = store.shards
    assert caught[0].filename == __file__ and store.stats.gathers == 0
    assert (shards is None) == isinstance(store, CacheStore)


def test_nothing_inside_uses_what_is_deprecated():
    for path in Path(engraphy.__file__).parent.rglob("*.py"):
        found = re.findall(
            r"(?<!_)count_read\b|\bstores?(?:\[\w+\])?\.shards\b(?!\()", path.read_text()
        )
        assert not [
            use for use in found if not (path.name == "base.py" and use == "store.shards")
        ], path


def test_a_store_without_the_scope_is_refused_by_name():
    class Older:
        info = RamStore(4, 8).info
        shards = None

    with pytest.raises(StoreError, match=r"Older.*RowStore"):
        older: Any = Older()
        read(older, np.array([0]), fmt_of("f32", 2), np.empty((1, 2), np.float32))
