"""A wrapper is the store behind it, but for what it overrides."""

from __future__ import annotations

import os

import numpy as np
import pytest

from engraphy.store import FileStore, RamStore, ReloadableStore
from engraphy.store.testing import ReadOnlyStoreTests, WritableStoreTests
from engraphy.store.wrapper import WrapperStore
from engraphy.table import Table
from tests.tools.store_builders import LAYER, build, fmt_of, sealed


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


class Trivial(WrapperStore):
    """Overrides nothing."""


class Upside(WrapperStore):
    """Rows come with their bits inverted; writes are left as they are."""

    def _gather(self, ids_N, out_NR):
        super()._gather(ids_N, out_NR)
        np.invert(out_NR, out=out_NR)


class Noted(WrapperStore):
    """Notes what is written."""

    def __init__(self, store):
        super().__init__(store)
        self.written = []

    def _scatter(self, ids_N, rows_NR):
        self.written += ids_N.tolist()
        super()._scatter(ids_N, rows_NR)


def ram_with(rows_NR: np.ndarray) -> RamStore:
    store = RamStore(*rows_NR.shape)
    store.scatter(np.arange(len(rows_NR)), rows_NR)
    return store


class TestTrivialWrapperOfMemory(WritableStoreTests):
    mapped = updatable = True

    def make_store(self, rows_NR, folder):
        return Trivial(ram_with(rows_NR))


class TestWrapperOfAWrapper(WritableStoreTests):
    mapped = updatable = True

    def make_store(self, rows_NR, folder):
        return Trivial(ReloadableStore(WrapperStore(ram_with(rows_NR))))


class TestTrivialWrapperOfATable(WritableStoreTests):
    mapped = updatable = True

    def make_filled(self, folder):
        rows = sealed(folder / "table", fmt_of("int8"), 7)
        table = Table.open(folder / "table", "w")
        return Trivial(FileStore(table, LAYER, close_table=True)), rows


class TestTrivialWrapperOfAReader(ReadOnlyStoreTests):
    def make_filled(self, folder):
        store, rows = build("pread in shards", folder, fmt_of("int8"))
        return Trivial(store), rows


class TestWrapperThatChangesRows(WritableStoreTests):
    """Its gather is not that of the memory behind it, so it gives none."""

    def make_store(self, rows_NR, folder):
        return Upside(Upside(ram_with(rows_NR)))


class TestWrapperThatNotesWrites(WritableStoreTests):
    mapped = True

    def make_store(self, rows_NR, folder):
        return Noted(ram_with(rows_NR))


def test_a_wrapper_that_changes_rows_changes_them_however_they_are_read():
    store = Upside(RamStore(4, 8))
    assert (store.gather(np.array([1])) == 0xFF).all()
    with store.reading() as shards:
        assert shards is None
    assert not store.in_memory and Trivial(RamStore(4, 8)).in_memory


def test_no_write_goes_past_a_wrapper_that_notes_them():
    store = Noted(RamStore(4, 8))
    with store.updating(1, np.array([2])) as shards:
        assert shards is None
    store.scatter(np.array([2]), np.ones((1, 8), np.uint8))
    assert store.written == [2]


def test_a_wrapper_says_what_is_behind_it_now(tmp_path):
    ram = RamStore(4, 8)
    reloadable = ReloadableStore(ram)
    store = Trivial(reloadable)
    assert repr(store) == f"<Trivial around <reloadable store around {ram!r}>>"
    other = RamStore(4, 8)
    other.in_memory = False
    assert store.in_memory
    reloadable.reload(other)
    assert not store.in_memory and store.info is other.info


def test_calls_are_counted_by_the_wrapper_and_by_the_store_behind_it():
    store = Trivial(RamStore(4, 8))
    store.gather(np.array([1, 2]))
    with store.reading(5):
        pass
    with store.updating(3):
        pass
    assert (store.stats.gathers, store.stats.rows) == (3, 10)
    assert (store.wrapped.stats.gathers, store.wrapped.stats.rows) == (3, 10)


@pytest.mark.parametrize("kind", [Trivial, Upside])
def test_closing_a_wrapper_closes_the_store_behind_it(kind):
    ram = RamStore(4, 8)
    kind(ram).close()
    assert ram._closed
