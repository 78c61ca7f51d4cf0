"""Reading rows with pread: no page is asked for twice, and what a disk does wrong is said."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import _native
from engraphy.errors import EngraphyError, StoreError
from engraphy.store import PreadStore, open_store, pread_plain
from engraphy.table import Table
from engraphy.table.shards import HEADER_BYTES
from tests.tools.store_builders import (
    LAYER,
    check_in_child,
    create,
    fmt_of,
    open_fds,
    records,
    sealed,
)

PAGE = 4096


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The plain version is meant here; the native one is compared with it elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    with _native.forced("off"):
        yield


def opened(path, how: str = "read=pread", mode: str = "r") -> PreadStore:
    store = open_store(f"file:{path}?{how}", layer=LAYER, mode=mode)
    assert isinstance(store, PreadStore)
    return store


# What is asked of the system.


@settings(max_examples=200)
@given(
    ids=st.lists(st.integers(0, 30_000), min_size=1, max_size=60, unique=True).map(sorted),
    whole=st.booleans(),
    row_bytes=st.sampled_from([1, 34, 128, 264, 4096, 4097, 10_000, 300_000]),
    shard_rows=st.integers(1, 40_000),
)
def test_every_row_lies_in_a_read_and_no_page_is_read_twice(ids, whole, row_bytes, shard_rows):
    reads = pread_plain.plan(np.array(ids), shard_rows, row_bytes, whole)
    which = np.searchsorted(reads.first, np.arange(len(ids)), side="right") - 1
    assert reads.first[0] == 0 and reads.first[-1] == len(ids) and (np.diff(reads.first) > 0).all()
    begin = reads.begin[which] + reads.at - reads.place[which]
    np.testing.assert_array_equal(reads.shard[which], np.array(ids) // shard_rows)
    np.testing.assert_array_equal(begin, HEADER_BYTES + np.array(ids) % shard_rows * row_bytes)
    assert (begin >= reads.begin[which]).all() and (
        begin + row_bytes <= (reads.begin + reads.length)[which]
    ).all()
    assert (np.diff(reads.place) == reads.length[:-1]).all() and reads.place[0] == 0
    if whole:
        assert not (reads.begin % PAGE).any() and not (reads.length % PAGE).any()
    pages = [
        (shard, page)
        for shard, begin, length in zip(reads.shard, reads.begin, reads.length, strict=True)
        for page in range(begin // PAGE, (begin + length - 1) // PAGE + 1)
    ]
    windows = {
        (shard, begin // 2**17) for shard, begin in zip(reads.shard, reads.begin, strict=True)
    }
    assert len(pages) - len(set(pages)) <= len(
        windows
    )  # only where a row reaches into the next window


def test_what_repeats_is_read_once_and_neighbours_come_together(tmp_path):
    expected = sealed(tmp_path / "t", fmt_of("f32", 64), rows=2000)  # 256 bytes: 16 rows a page
    store = opened(tmp_path / "t")
    for ids, reads, read_bytes in (
        ([5] * 100, 1, 256),
        ([0, 15], 1, 4096),
        ([0, 31], 1, 8192),
        ([0, 47], 2, 512),
        ([15, 3, 3, 9], 1, 13 * 256),
        (list(range(512)), 2, 2**17),
    ):
        before = store.stats
        np.testing.assert_array_equal(store.gather(np.array(ids)), expected[ids])
        now = store.stats
        assert (now.reads - before.reads, now.read_bytes - before.read_bytes) == (
            reads,
            read_bytes,
        ), ids


def test_direct_reads_are_of_whole_pages(tmp_path):
    expected = sealed(
        tmp_path / "t", fmt_of("int8", 62), rows=2000
    )  # 64 bytes; the file ends within a page
    store = opened(tmp_path / "t", "direct=1")
    ids = np.array([0, 63, 63, len(expected) - 1, 640])
    np.testing.assert_array_equal(store.gather(ids), expected[ids])
    assert store.stats.reads == 3 and store.stats.read_bytes == 3 * PAGE


@pytest.mark.parametrize("how", ["read=pread&threads=3", "direct=1"])
@pytest.mark.parametrize(("kind", "d"), [("f32", 1024), ("f32", 1500), ("int8", 31)])
def test_a_batch_of_many_chunks_is_read_whole(tmp_path, monkeypatch, how, kind, d):
    monkeypatch.setattr(pread_plain, "_CHUNK", 20_000)
    expected = sealed(tmp_path / "t", fmt_of(kind, d), shard_rows=33)
    ids = np.random.default_rng(0).integers(0, len(expected), 1000)
    out = np.full((1000, expected.shape[1]), 0xA5, np.uint8)
    np.testing.assert_array_equal(opened(tmp_path / "t", how).gather(ids, out=out), expected[ids])


@pytest.mark.parametrize("threads", [1, 4])
def test_no_more_threads_read_than_are_allowed(tmp_path, monkeypatch, threads):
    expected, lock, under_way, most = (
        sealed(tmp_path / "t", fmt_of("f32", 1024), rows=60),
        threading.Lock(),
        0,
        0,
    )
    real, release = os.preadv, threading.Event()

    def counted(*arguments):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            if most == threads:
                release.set()
        assert release.wait(10)
        found = real(*arguments)
        with lock:
            under_way -= 1
        return found

    store = opened(tmp_path / "t", f"read=pread&threads={threads}")
    monkeypatch.setattr(os, "preadv", counted)
    ids = np.arange(0, len(expected), 3)
    np.testing.assert_array_equal(store.gather(ids), expected[ids])
    assert most == threads


@pytest.mark.parametrize("given", [0, 1, 3])
def test_threads_that_the_system_does_not_start_are_done_without(tmp_path, monkeypatch, given):
    expected, started = sealed(tmp_path / "t", shard_rows=7), []
    start = threading.Thread.start

    def refuse(thread):
        if len(started) >= given:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    store = opened(tmp_path / "t", mode="w")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    order = np.random.default_rng(0).permutation(len(expected))
    for _ in range(3):
        np.testing.assert_array_equal(store.gather(order), expected[order])
        store.scatter(order, expected[order][::-1])
        np.testing.assert_array_equal(store.gather(order), expected[order][::-1])
        store.scatter(order, expected[order])
    assert len(started) <= given
    store.close()


# What goes wrong.


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    expected = sealed(tmp_path / "t", shard_rows=50)
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    store = opened(tmp_path / "t", mode="w")
    store.scatter(np.array([3, 60, 4]), expected[[1, 2, 0]])
    np.testing.assert_array_equal(store.gather(np.array([3, 4, 60, 5])), expected[[1, 0, 2, 5]])
    store.close()


@pytest.mark.parametrize("threads", [1, 8])
def test_a_disk_that_fails_is_a_store_error_with_the_file_and_the_reason(
    tmp_path, monkeypatch, threads
):
    expected = sealed(tmp_path / "t", shard_rows=7)
    store = opened(tmp_path / "t", f"read=pread&threads={threads}", "w")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(
        StoreError, match=r"layer-00003-00002.*cannot be read \(Input/output error\)"
    ):
        store.gather(np.array([8, 9]))
    with pytest.raises(StoreError, match=r"layer-00003-.*cannot be read"):
        store.gather(np.arange(len(expected)))
    with pytest.raises(
        StoreError, match=r"layer-00003-00002.*cannot be written .*Input/output error"
    ):
        store.scatter(np.array([8, 9]), expected[:2])
    assert store.stats.gathers == store.stats.reads == 0
    store.close()


def test_a_disk_that_refuses_direct_reads_at_the_first_one_is_a_store_error(tmp_path, monkeypatch):
    sealed(tmp_path / "t")
    store = opened(tmp_path / "t", "direct=1")

    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(StoreError, match="refuses direct reads; open it with direct=0"):
        store.gather(np.array([0]))


def test_a_damaged_shard_among_many_leaves_no_file_open(tmp_path):
    sealed(tmp_path / "t", shard_rows=7)
    (sorted((tmp_path / "t").glob("layer-00003-*"))[5]).unlink()
    before = open_fds()
    with pytest.raises(EngraphyError):
        opened(tmp_path / "t")
    assert open_fds() == before


# Processes and threads.


def test_a_forked_child_reads_with_threads_of_its_own(tmp_path):
    expected = sealed(tmp_path / "t", shard_rows=7)
    store = opened(tmp_path / "t")
    ids = np.arange(len(expected))
    store.gather(ids)  # the threads are there, and are not in the child
    check_in_child(lambda: np.array_equal(store.gather(ids), expected))
    np.testing.assert_array_equal(store.gather(ids), expected)


def test_files_stay_open_until_a_reader_in_another_thread_is_done(tmp_path, monkeypatch):
    expected = sealed(tmp_path / "t", shard_rows=7)
    store, reading, closed, found = opened(tmp_path / "t"), threading.Event(), threading.Event(), []
    real = os.preadv

    def slow(*arguments):
        reading.set()
        assert closed.wait(10)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    before = open_fds()
    reader = threading.Thread(target=lambda: found.append(store.gather(np.array([30]))))
    reader.start()
    assert reading.wait(10)
    store.close()
    closed.set()
    reader.join()
    np.testing.assert_array_equal(found[0], expected[[30]])
    assert open_fds() < before


def test_rows_written_by_pread_stores_of_two_layers_are_in_the_sealed_table(tmp_path):
    table = create(tmp_path / "t", fmt_of("int8"), 7)
    rows = {layer: records(table.fmt, table.rows(layer), seed=layer) for layer in table.layers}
    for layer, new in rows.items():
        store = PreadStore(table, layer, threads=4)
        order = np.random.default_rng(layer).permutation(len(new))
        store.scatter(order, new[order])
        store.close()
    table.seal()
    for layer, new in rows.items():
        np.testing.assert_array_equal(
            np.concatenate(Table.open(tmp_path / "t").shard_arrays(layer)), new
        )
    assert Table.open(tmp_path / "t").verify()
