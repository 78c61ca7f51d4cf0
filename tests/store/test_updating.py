"""Updating rows of a table in place: disk space first, only what may change is marked, one store.

What holds for every store is in `engraphy.store.testing`.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from engraphy.errors import ShardTruncated, StoreError
from engraphy.store import FileStore, ReloadableStore, mapping
from engraphy.table import Table
from tests.store.test_reading import cut
from tests.tools.store_builders import LAYER, build, create, fmt_of, records, sealed

SHARD_ROWS = 400  # of 34 bytes: some pages


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(mapping, "_LOOK_EVERY", 1000)  # no size is looked at by chance


@pytest.fixture
def new(tmp_path):
    """A store over a new, sparse table of four shards."""
    table = create(tmp_path / "table", fmt_of("int8"), SHARD_ROWS, rows=350)
    store = FileStore(table, LAYER, close_table=True)
    yield store
    store.close()


def space(store: FileStore) -> list[int]:
    """Bytes of disk space that each shard takes."""
    return [shard.path.stat().st_blocks * 512 for shard in store.table.shards(LAYER)]


def marked(store: FileStore) -> list[int]:
    """Numbers of the shards that a seal would hash."""
    shards = store.table.shards(LAYER)
    return [number for number, shard in enumerate(shards) if shard.name in store.table._dirty]


def fill(store: FileStore) -> np.ndarray:
    rows = records(fmt_of("int8"), store.info.rows)
    store.scatter(np.arange(len(rows)), rows)
    return rows


def test_rows_of_a_sparse_file_are_updated_where_the_ids_are_known_and_get_their_space(new):
    before = space(new)
    with new.updating() as shards:
        assert shards is None
    assert space(new) == before
    ids = np.array([2 * SHARD_ROWS, 2 * SHARD_ROWS + 399, 0])
    with new.updating(3, ids) as shards:
        grown = [after > size for after, size in zip(space(new), before, strict=True)]
        assert grown == [True, False, True, False]
        shards[0][0] = 1
        shards[2][[0, 399]] = 2
    np.testing.assert_array_equal(new.gather(ids)[:, 0], [2, 2, 1])
    assert not new.gather(np.array([1, SHARD_ROWS])).any()


def test_any_row_is_updated_once_all_have_their_space(new):
    rows = fill(new)
    with new.updating(len(rows)) as shards:
        for shard in shards:
            shard ^= 0xFF
    np.testing.assert_array_equal(new.gather(np.arange(len(rows))), rows ^ 0xFF)


def test_a_full_disk_is_an_error_before_the_scope_and_the_next_writer_does_not_wait(
    new, monkeypatch
):
    def full(fd, begin, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="no space for bytes"):
            new.updating(1, np.array([5])).__enter__()
    writer = threading.Thread(target=fill, args=(new,), daemon=True)
    writer.start()
    writer.join(20)
    assert not writer.is_alive() and new.stats.gathers == 0


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], []), ([SHARD_ROWS], [1]), ([0, 2 * SHARD_ROWS], [0, 2]), (None, [0, 1, 2, 3])],
    ids=str,
)
def test_only_shards_that_may_have_changed_are_marked(tmp_path, ids, expected):
    sealed(tmp_path / "table", shard_rows=SHARD_ROWS, rows=350)
    store = FileStore(Table.open(tmp_path / "table", "w"), LAYER)
    with store.updating(0, None if ids is None else np.array(ids, np.int64)) as shards:
        assert shards is not None
    assert marked(store) == expected
    store.table.close()


def test_rows_updated_in_a_file_are_in_the_sealed_table_under_a_new_id(tmp_path):
    rows = sealed(tmp_path / "table", shard_rows=SHARD_ROWS, rows=350)
    store = FileStore(Table.open(tmp_path / "table", "w"), LAYER, close_table=True)
    before = store.info.table_id
    with store.updating(1, np.array([401])) as shards:
        shards[1][1] = 7
    assert store.table.seal() != before
    store.close()
    table = Table.open(tmp_path / "table")
    assert table.verify()
    rows[401] = 7
    np.testing.assert_array_equal(np.concatenate(table.shard_arrays(LAYER)), rows)


def test_an_update_of_a_sealed_table_is_refused(new):
    fill(new)
    new.table.seal()
    with pytest.raises(StoreError, match="read-only"):
        new.updating().__enter__()


def test_a_table_that_is_cut_within_an_update_is_an_error_on_leaving(new):
    rows = fill(new)
    with pytest.raises(ShardTruncated):
        with new.updating(len(rows), np.array([3])) as shards:
            shards[0][3] = 0
            cut(new)
    assert new.stats.gathers == 0


def test_an_update_keeps_the_store_that_was_served_and_is_counted_there(tmp_path):
    old, expected = build("file open for writing", tmp_path / "old")
    other, _ = build("file open for writing", tmp_path / "other")
    store = ReloadableStore(old)
    with store.updating(2, np.array([3, 4])) as shards:
        store.reload(other)
        assert not old._closed
        shards[0][[3, 4]] = 9
    assert old._closed
    assert (old.stats.rows, other.stats.rows, store.stats.rows) == (2, 0, 2)
    np.testing.assert_array_equal(store.gather(np.array([3])), expected[3:4])
    store.close()
    Table.open(Path(old.info.path or ""), "w").seal()
    again = Table.open(Path(old.info.path or ""))
    assert (again.shard_arrays(LAYER)[0][[3, 4]] == 9).all()


def test_other_writers_wait_until_the_scope_is_left(new):
    fill(new)
    written = threading.Event()

    def write() -> None:
        new.scatter(np.array([0]), np.full((1, 34), 5, np.uint8))
        written.set()

    with new.updating(1, np.array([0])) as shards:
        thread = threading.Thread(target=write)
        thread.start()
        assert not written.wait(0.1)
        shards[0][0] = 4
    thread.join()
    assert (new.gather(np.array([0])) == 5).all()


def test_layers_of_one_table_are_updated_by_one_thread_at_once(tmp_path):
    table = create(tmp_path / "table", fmt_of("int8"), SHARD_ROWS)
    first, second = (FileStore(table, layer) for layer in table.layers)
    ids = np.array([1])
    with first.updating(1, ids) as one, second.updating(1, ids) as other:
        one[0][1] = 1
        other[0][1] = 2
    assert first.gather(ids)[0, 0] == 1 and second.gather(ids)[0, 0] == 2
    table.close()
