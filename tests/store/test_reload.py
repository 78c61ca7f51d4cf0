"""A table is exchanged while it is read: every call sees one table whole, and the old one goes when
nobody reads it."""

from __future__ import annotations

import logging
import os
import signal
import threading

import numpy as np
import pytest

from engraphy.errors import ConfigError, DigestMismatch, StoreError
from engraphy.rows import RowFormat, read
from engraphy.store import FileStore, RamStore, RowStore, StoreInfo, open_store
from engraphy.store.cache import CacheStore
from engraphy.store.reload import ReloadableStore, reload_layers
from engraphy.store.testing.tools import fork
from engraphy.table import Table
from tests.tools.store_builders import LAYER, fmt_of, sealed, shards_of

ROWS, WIDTH = 50, 8


class Numbered(RowStore):
    """All of its rows are its number; a call may be held up."""

    def __init__(self, number: int, **info) -> None:
        super().__init__()
        self.number, self.started, self.go_on = number, threading.Event(), threading.Event()
        self.go_on.set()
        self._info = StoreInfo(
            **{
                "kind": "numbered",
                "rows": ROWS,
                "row_bytes": WIDTH,
                "writable": True,
                "table_id": str(number),
                "layer": 1,
                "address_digest": "a",
            }
            | info
        )

    @property
    def info(self) -> StoreInfo:
        return self._info

    @property
    def closed(self) -> bool:
        return self._closed

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        self.started.set()
        assert self.go_on.wait(20)
        if self.closed:
            raise StoreError("it was closed under its reader")
        out_NR[...] = self.number

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        self.number = int(rows_NR[0, 0])


def first_ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


def test_rows_come_from_the_new_table_after_a_reload_and_the_old_one_is_closed():
    old, new = Numbered(1), Numbered(2)
    store = ReloadableStore(old)
    assert (store.gather(first_ids(3)) == 1).all() and store.info.table_id == "1"
    store.reload(new)
    assert (store.gather(first_ids(3)) == 2).all() and store.info.table_id == "2"
    assert old.closed and not new.closed
    assert store.stats.gathers == 2 and new.stats.gathers == 1


def test_the_old_store_is_closed_when_its_last_reader_is_done_and_not_before():
    old = Numbered(1)
    store, found = ReloadableStore(old), []
    old.go_on.clear()
    readers = [
        threading.Thread(target=lambda: found.append(store.gather(first_ids(4)))) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    assert old.started.wait(20)
    while store._readers._count < 3:
        pass
    store.reload(Numbered(2))
    assert (store.gather(first_ids(4)) == 2).all() and not old.closed
    old.go_on.set()
    for reader in readers:
        reader.join()
    assert old.closed and all((rows == 1).all() for rows in found) and len(found) == 3


def test_readers_go_on_through_many_reloads_and_every_call_sees_one_table():
    store, wrong, served, stop = ReloadableStore(Numbered(0)), [], [], threading.Event()

    def read_on() -> None:
        while not stop.is_set():
            try:
                rows = store.gather(first_ids(20))
                if len(np.unique(rows)) != 1:
                    wrong.append(rows)
            except BaseException as error:
                wrong.append(error)

    readers = [threading.Thread(target=read_on) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(1, 100):
        served.append(store.inner)
        store.reload(Numbered(number))
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong and all(old.closed for old in served) and not store.inner.closed


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        ({"address_digest": "b"}, DigestMismatch, "address digest a"),
        ({"address_digest": None}, DigestMismatch, "None"),
        ({"rows": ROWS + 1}, ConfigError, "rows: expected 50"),
        ({"row_bytes": 9}, ConfigError, "row_bytes"),
        ({"layer": 2}, ConfigError, "layer"),
        ({"format": RowFormat("int8", 6)}, ConfigError, "format"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_and_the_old_one_stays(info, error, message):
    old, new = Numbered(1), Numbered(2, **info)
    store = ReloadableStore(old)
    with pytest.raises(error, match=message):
        store.reload(new)
    assert (store.gather(first_ids(3)) == 1).all() and not old.closed and not new.closed


def test_the_store_that_is_served_cannot_replace_itself():
    store = ReloadableStore(Numbered(1))
    for same in (store.inner, store):
        with pytest.raises(ConfigError, match="another store"):
            store.reload(same)
    assert (store.gather(first_ids(3)) == 1).all()


def test_all_layers_are_exchanged_or_none():
    stores = {
        layer: ReloadableStore(Numbered(layer, layer=layer, table_id="x")) for layer in (1, 4)
    }

    def new(**of_second) -> dict[int, RowStore]:
        return {
            1: Numbered(8, layer=1, table_id="y"),
            4: Numbered(9, **{"layer": 4, "table_id": "y"} | of_second),
        }

    for wrong, error in (
        (new(rows=3), ConfigError),
        (new(table_id="z"), DigestMismatch),
        ({1: new()[1]}, ConfigError),
    ):
        with pytest.raises(error):
            reload_layers(stores, wrong)
        assert [int(store.gather(first_ids(1))[0, 0]) for store in stores.values()] == [1, 4]
    reload_layers(stores, new())
    assert [int(store.gather(first_ids(1))[0, 0]) for store in stores.values()] == [8, 9]


def test_closing_closes_what_is_served_and_ends_reloading():
    store, last = ReloadableStore(Numbered(1)), Numbered(2)
    store.close()
    store.close()
    assert store.inner.closed
    with pytest.raises(StoreError, match="closed"):
        store.gather(first_ids(1))
    with pytest.raises(StoreError, match="closed"):
        store.reload(last)
    assert not last.closed


def test_writing_goes_to_the_store_that_is_served():
    store = ReloadableStore(Numbered(1))
    store.reload(Numbered(2))
    store.scatter(first_ids(1), np.full((1, WIDTH), 7, np.uint8))
    assert (store.gather(first_ids(2)) == 7).all()


def test_a_table_in_place_of_another_is_read_through_its_mapped_memory_and_named_in_the_log(
    tmp_path, caplog
):
    before, after = (sealed(tmp_path / name) for name in ("a", "b"))
    store = ReloadableStore(open_store(f"file:{tmp_path / 'a'}", layer=LAYER))
    ids, fmt = first_ids(40), fmt_of("int8")
    kept = shards_of(store)
    with caplog.at_level(logging.INFO, "engraphy"):
        store.reload(open_store(f"file:{tmp_path / 'b'}", layer=LAYER))
    (line,) = caplog.messages
    assert all(Table.open(tmp_path / name).table_id in line for name in "ab")
    found = read(store, ids, fmt, np.full((40, fmt.d), np.nan, np.float32))
    np.testing.assert_array_equal(found, fmt.decode(after[:40]))
    assert store.stats.rows == store.inner.stats.rows == 40
    np.testing.assert_array_equal(
        np.concatenate(kept), before
    )  # a reader that still holds the old memory
    assert isinstance(store.inner, FileStore)


def test_a_cache_inside_is_exchanged_with_its_table():
    def table(value: int) -> CacheStore:
        ram = RamStore(ROWS, WIDTH)
        ram.scatter(first_ids(ROWS), np.full((ROWS, WIDTH), value, np.uint8))
        return CacheStore(ram, 10_000)

    store = ReloadableStore(table(1))
    store.gather(first_ids(30))
    store.reload(table(2))
    assert (store.gather(first_ids(30)) == 2).all()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_read_and_reload_whatever_other_threads_were_doing():
    store = ReloadableStore(Numbered(1))
    store._switch.acquire()
    store._readers._lock.acquire()
    child = fork()
    if not child:
        signal.alarm(20)
        store.reload(Numbered(2))
        os._exit(0 if (store.gather(first_ids(3)) == 2).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
