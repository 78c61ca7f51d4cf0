"""The native part makes the same reads as the plain version, and gets the same rows."""

from __future__ import annotations

import errno
import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import _native
from engraphy.errors import ShardTruncated, StoreError
from engraphy.rows import read
from engraphy.store import PreadStore, open_store
from tests.native.test_rows import Guarded
from tests.tools.store_builders import LAYER, check_in_child, fmt_of, open_fds, sealed

pytestmark = pytest.mark.skipif(_native.core is None, reason=_native.reason)
READS = (
    "read=pread&threads=1",
    "read=pread&threads=4",
    "read=pread",
    "direct=1",
    "direct=1&threads=1",
)
every_read = pytest.mark.parametrize("how", READS)
U8 = np.dtype(np.uint8)
WIDTHS = {"int4": 30, "int8": 62, "fp8": 256, "f32": 1500}  # 17, 64, 264 and 6000 bytes


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A path and its records for each row format, in shards of 33 rows."""
    folder = tmp_path_factory.mktemp("tables")
    return {
        kind: (folder / kind, sealed(folder / kind, fmt_of(kind, d), shard_rows=33))
        for kind, d in WIDTHS.items()
    }


def opened(path, how: str) -> PreadStore:
    store = open_store(f"file:{path}?{how}", layer=LAYER)
    assert isinstance(store, PreadStore)
    return store


def threads_of_process() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def ended(threads: set[str]) -> bool:
    """Whether they end. The kernel lists a thread a moment longer than a join takes."""
    for _ in range(500):
        if not threads & threads_of_process():
            return True
        time.sleep(0.01)
    return False


@every_read
@settings(max_examples=100)
@given(
    kind=st.sampled_from(list(WIDTHS)),
    ids=st.lists(st.integers(0, 83), max_size=150),
    skip=st.integers(0, 3),
)
def test_reads_and_rows_are_those_of_the_plain_version(tables, how, kind, ids, skip):
    path, expected = tables[kind]
    given_ids = Guarded((len(ids),), np.dtype(np.int64), skip)
    given_ids.array[...] = ids
    asked = []
    for engine in ("off", "auto"):
        store, out = opened(path, how), Guarded((len(ids), expected.shape[1]), U8, skip)
        with _native.forced(engine):
            assert store.gather(given_ids.array, out=out.array) is out.array
        assert out.intact()
        np.testing.assert_array_equal(out.array, expected[ids])
        asked.append((store.stats.reads, store.stats.read_bytes))
        store.close()
    assert asked[0] == asked[1]


def test_a_large_batch_asks_for_the_same_reads(tmp_path):
    """Runs that are longer than a read, in several shards and chunks."""
    expected = sealed(tmp_path / "t", fmt_of("fp8", 256), shard_rows=10_000, rows=8000)
    rng = np.random.default_rng(0)
    for ids in (
        np.arange(len(expected)),
        rng.integers(0, len(expected), 20_000),
        rng.permutation(len(expected))[::2],
    ):
        asked = []
        for engine in ("off", "auto"):
            store, out = (
                opened(tmp_path / "t", "read=pread&threads=8"),
                np.full((len(ids), 264), 0xA5, np.uint8),
            )
            with _native.forced(engine):
                store.gather(ids, out=out)
            np.testing.assert_array_equal(out, expected[ids])
            asked.append((store.stats.reads, store.stats.read_bytes))
        assert asked[0] == asked[1] and asked[0][0] > 50


@every_read
def test_rows_are_read_as_numbers(tables, how):
    path, expected = tables["fp8"]
    fmt, ids = fmt_of("fp8", 256), np.array([[3, 80], [3, 41]])
    out = np.full((2, 2, 256), np.nan, np.float32)
    read(opened(path, how), ids, fmt, out)
    np.testing.assert_array_equal(out.reshape(-1, 256), fmt.decode(expected[ids.reshape(-1)]))


# What goes wrong.


@every_read
def test_rows_that_are_left_of_a_truncated_shard_are_read_and_the_others_are_an_error(
    tmp_path, how
):
    expected = sealed(tmp_path / "t", fmt_of("f32", 64), rows=500)  # 16 rows a page
    store = opened(tmp_path / "t", how)
    store.gather(np.array([0]))
    os.truncate(next((tmp_path / "t").glob("layer-00003-*")), 4096 * 3 + 10)
    np.testing.assert_array_equal(store.gather(np.array([5, 31])), expected[[5, 31]])
    for ids in ([32], [1000], list(range(1000))):
        with pytest.raises(ShardTruncated, match=r"layer-00003-.*expected \d+ bytes, found 12298"):
            store.gather(np.array(ids))
    assert store.stats.rows == 3


def test_shards_truncated_while_many_threads_read_are_errors_and_no_row_is_wrong(tmp_path):
    expected = sealed(tmp_path / "t", fmt_of("f32", 64), shard_rows=4000, rows=5000)
    store, wrong, ended = opened(tmp_path / "t", "read=pread&threads=6"), [], []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while True:
            ids = rng.integers(0, len(expected), int(rng.integers(1, 3000)))
            try:
                if not np.array_equal(store.gather(ids), expected[ids]):
                    return wrong.append(seed)
            except ShardTruncated:
                return ended.append(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for shard in (tmp_path / "t").glob("layer-00003-*"):
        os.truncate(shard, 4096)
    for caller in callers:
        caller.join()
    assert not wrong and len(ended) == 4


def test_what_the_system_refuses_is_reported_with_the_file_and_the_reason(tables, tmp_path):
    core, folder = _native.core, os.open(tmp_path, os.O_RDONLY)
    good = os.open(next(tables["int8"][0].glob("layer-00003-00001*")), os.O_RDONLY)
    out, ids = Guarded((2, 64), U8), np.array([33, 34])
    reader = core.RowReader([good, folder], [10**6, 10**6], 33, 64, 4096, 4, False)
    assert reader.read(core.address(ids), 2, core.address(out.array))[2:] == (1, errno.EISDIR)
    assert out.untouched()
    os.close(folder)
    os.close(good)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.EIO, StoreError, "cannot be read .Input/output error"),
        (errno.EINVAL, StoreError, "refuses direct reads"),
        (0, StoreError, "the file ends before its size"),
    ],
)
def test_a_failed_read_is_an_error_that_names_the_file(tables, monkeypatch, code, error, message):
    store = opened(tables["int8"][0], "direct=1")
    store.gather(np.array([0]))
    monkeypatch.setattr(
        store._files, "reader", type("Failing", (), {"read": lambda *_: (1, 64, 2, code)})()
    )
    with pytest.raises(error, match=f"layer-00003-00003.*{message}"):
        store.gather(np.array([0]))
    assert store.stats.gathers == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"files": []},
        {"sizes": [1, 2]},
        {"file_rows": 0},
        {"row_bytes": 0},
        {"offset": -1},
        {"threads": 0},
    ],
)
def test_the_reader_refuses_what_cannot_be_meant(wrong):
    sound = {"files": [0], "sizes": [1], "file_rows": 1, "row_bytes": 1, "offset": 0, "threads": 1}
    with pytest.raises(ValueError, match="must"):
        _native.core.RowReader(**sound | wrong, whole_pages=False)


# Threads and processes.


def test_no_more_threads_are_started_than_are_allowed_and_they_end_with_the_store(tmp_path):
    expected = sealed(tmp_path / "t", fmt_of("f32", 64), rows=2000)
    ids, before, fds = np.arange(0, len(expected), 40), threads_of_process(), open_fds()
    for threads in (1, 2, 9):
        store = opened(tmp_path / "t", f"read=pread&threads={threads}")
        for _ in range(5):
            np.testing.assert_array_equal(store.gather(ids), expected[ids])
        own = threads_of_process() - before
        assert len(own) == threads - 1  # the caller reads too
        store.close()
        assert ended(own)
    assert open_fds() == fds


@pytest.mark.slow
def test_a_child_forked_while_others_read_has_threads_of_its_own(tmp_path):
    expected = sealed(tmp_path / "t", fmt_of("f32", 64), rows=2000)
    store, stop, ids = (
        opened(tmp_path / "t", "read=pread&threads=5"),
        threading.Event(),
        np.arange(0, len(expected), 7),
    )

    def keep_busy() -> None:
        while not stop.is_set():
            store.gather(ids)

    busy = [threading.Thread(target=keep_busy) for _ in range(2)]
    for each in busy:
        each.start()
    try:
        for _ in range(20):
            check_in_child(
                lambda: all(np.array_equal(store.gather(ids), expected[ids]) for _ in range(2))
            )
    finally:
        stop.set()
        for each in busy:
            each.join()
    np.testing.assert_array_equal(store.gather(ids), expected[ids])


def test_a_store_closed_while_others_read_lets_them_finish(tmp_path):
    expected = sealed(tmp_path / "t", fmt_of("f32", 64), rows=2000)
    ids, found, fds = np.random.default_rng(0).integers(0, len(expected), 20_000), [], open_fds()
    for _ in range(10):
        store = opened(tmp_path / "t", "read=pread&threads=3")
        started = threading.Event()

        def work(store=store, started=started) -> None:
            files = store._files  # what a reader holds
            started.set()
            out = np.empty((len(ids), 256), np.uint8)
            store._read_native(_native.core, files, ids, out)
            found.append(np.array_equal(out, expected[ids]))

        reader = threading.Thread(target=work)
        reader.start()
        started.wait()
        store.close()
        reader.join()
    assert found == [True] * 10
    del store, reader
    assert open_fds() == fds
