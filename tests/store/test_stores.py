"""One suite for every store: rows come back as written, are counted, and nothing is touched before
the checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from engraphy.errors import (
    ConfigError,
    EngraphyError,
    InputError,
    RowOutOfRange,
    StoreError,
    TableError,
    TableUnsealed,
)
from engraphy.rows import RowFormat, read
from engraphy.store import (
    CacheStore,
    FileStore,
    PreadStore,
    RamStore,
    RowStore,
    StoreInfo,
    StoreStats,
    copy_rows,
    open_store,
)
from engraphy.table import Table
from tests.tools.store_builders import (
    LAYER,
    NOT_MAPPED,
    STORES,
    TO_WRITE,
    D,
    build,
    check_in_child,
    check_in_children,
    create,
    fmt_of,
    kinds_of,
    make,
    records,
    shards_of,
    some_ids,
    usual,
)

BY_URL = (
    "file",
    "file in shards",
    "pread",
    "pread in shards",
    "pread direct",
    "pool",
    "checkpoint in parts",
    "checkpoint with scales",
)


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    """What is synced, and when, is tested with the table."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(params=STORES)
def filled(request, tmp_path):
    store, expected = build(request.param, tmp_path)
    yield store, expected
    store.close()


@pytest.fixture(params=TO_WRITE)
def writable(request, tmp_path):
    store, expected = build(request.param, tmp_path)
    yield store, expected
    store.close()


def format_of(store: RowStore) -> RowFormat:
    """Of a store that `filled` gave; memory does not know its own."""
    return store.info.format or usual(store.info.kind)


def good_in_any_order(store: RowStore, expected: np.ndarray, seed: int, times: int = 5) -> bool:
    """Whether every row, bytes and numbers, is the right one each time."""
    fmt, rng = format_of(store), np.random.default_rng(seed)
    for _ in range(times):
        ids = rng.permutation(len(expected))
        values = read(store, ids, fmt, np.full((len(ids), fmt.d), np.nan, np.float32))
        if not (
            np.array_equal(store.gather(ids), expected[ids])
            and np.array_equal(values, fmt.decode(expected[ids]))
        ):
            return False
    return True


# Reading.


@pytest.mark.parametrize("count", [0, 1, 500])
def test_gather_gives_the_rows_in_the_order_of_the_ids_and_fills_a_poisoned_buffer(filled, count):
    store, expected = filled
    ids = some_ids(len(expected), count)
    out = np.full((count, store.info.row_bytes), 0xA5, np.uint8)
    assert store.gather(ids, out=out) is out
    np.testing.assert_array_equal(out, expected[ids])
    np.testing.assert_array_equal(store.gather(ids), expected[ids])


def test_gather_takes_ids_that_are_not_contiguous(filled):
    store, expected = filled
    ids = some_ids(len(expected))[::-3]
    np.testing.assert_array_equal(store.gather(ids), expected[ids])


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in STORES for kind in kinds_of(name)]
)
def test_reading_mapped_rows_and_gathering_then_decoding_give_the_same_bytes(tmp_path, name, kind):
    fmt = fmt_of(kind)
    store, expected = build(name, tmp_path, fmt)
    ids = some_ids(len(expected), 2 * 9 * 5).reshape(2, 9, 5)
    for dtype in (np.float32, np.uint16):
        decoded = fmt.decode(expected[ids.reshape(-1)], out=np.empty((ids.size, D), dtype))
        poisoned = np.frombuffer(b"\xff" * decoded.nbytes, dtype).reshape(2, 9, 5 * D).copy()
        read(store, ids, fmt, poisoned)
        assert poisoned.tobytes() == decoded.tobytes()
    assert (shards_of(store) is None) == (name in NOT_MAPPED)
    store.close()


def test_a_batch_of_more_than_a_chunk_is_read_whole(filled):
    store, expected = filled
    ids = some_ids(len(expected), 20_011)
    out = np.full((len(ids), D), np.nan, np.float32)
    read(store, ids, format_of(store), out)
    np.testing.assert_array_equal(out, format_of(store).decode(expected[ids]))


def test_eight_threads_read_every_row_at_once(filled):
    store, expected = filled
    good: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda seed=seed: good.append(good_in_any_order(store, expected, seed))
        )
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 8
    assert store.stats.gathers == 8 * 5 * 2 and store.stats.rows == 8 * 5 * 2 * len(expected)


def test_a_forked_child_reads_the_same_rows(filled):
    store, expected = filled
    store.gather(some_ids(len(expected)))
    check_in_child(lambda: good_in_any_order(store, expected, 0))
    assert good_in_any_order(store, expected, 1)


def test_four_forked_children_and_their_parent_read_every_row_at_once(filled):
    store, expected = filled
    store.gather(some_ids(len(expected)))
    parent = threading.Thread(
        target=lambda: good.append(good_in_any_order(store, expected, 9, times=10))
    )
    good: list[bool] = []
    parent.start()
    check_in_children(
        [lambda seed=seed: good_in_any_order(store, expected, seed) for seed in range(4)]
    )
    parent.join()
    assert good == [True]


SPAWNED = """
import json, sys
import numpy as np
from engraphy.rows import read
from engraphy.store import CacheStore, open_store
for name, url in json.loads(sys.argv[1]).items():
    for cached in (False, True):
        store = open_store(url, layer=3)
        expected = np.load(f"{sys.argv[2]}/{name}.npy")
        fmt = store.info.format
        store = CacheStore(store, 5000) if cached else store
        for seed in range(5):
            ids = np.random.default_rng((int(sys.argv[3]), seed)).permutation(len(expected))
            assert np.array_equal(store.gather(ids), expected[ids]), url
            values = read(store, ids, fmt, np.full((len(ids), fmt.d), np.nan, np.float32))
            assert np.array_equal(values, fmt.decode(expected[ids])), url
        store.close()
"""


@pytest.mark.slow
def test_four_spawned_processes_read_every_row_of_every_store_that_has_a_url(tmp_path):
    urls = {}
    for name in BY_URL:
        (tmp_path / name).mkdir()
        urls[name], expected = make(name, tmp_path / name, usual(name))
        np.save(tmp_path / f"{name}.npy", expected)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SPAWNED, json.dumps(urls), str(tmp_path), str(seed)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    assert [worker.communicate(timeout=100)[1] for worker in workers] == [""] * 4
    assert [worker.returncode for worker in workers] == [0] * 4


def test_stats_count_gathers_and_reads_alike(filled):
    store, _ = filled
    cache = isinstance(store, CacheStore)
    assert store.stats == StoreStats(
        0, 0, 0, hits=0 if cache else None, misses=0 if cache else None
    )
    store.gather(np.array([1, 2, 3]))
    read(store, np.array([[4, 5]]), format_of(store), np.empty((1, 2 * D), np.float32))
    stats = store.stats
    assert (stats.gathers, stats.rows, stats.bytes) == (2, 5, 5 * store.info.row_bytes)
    assert bool(stats.reads) == bool(stats.read_bytes) == isinstance(store, PreadStore)
    assert (stats.hits, stats.misses) == ((0, 5) if cache else (None, None))


def test_shards_are_the_rows_in_equal_parts_but_the_last_and_cannot_be_written(filled):
    store, expected = filled
    if (shards := shards_of(store)) is None:
        return
    np.testing.assert_array_equal(np.concatenate(shards), expected)
    sizes = [len(shard) for shard in shards]
    assert set(sizes[:-1]) <= {sizes[0]} and 0 < sizes[-1] <= sizes[0]
    for shard in shards:
        with pytest.raises(ValueError, match="read-only"):
            shard[0, 0] = 1


# What is refused, before anything is written.


WRONG_IDS = [
    (np.array([3, 10**6, 4]), RowOutOfRange, "row id 1000000 at position 1: expected 0 to {last}"),
    (np.array([-1]), RowOutOfRange, "row id -1 at position 0: expected 0 to {last}"),
    (np.array([2**63 - 1, -(2**63)]), RowOutOfRange, "at position 0"),
    (np.array([1, 2], np.int32), InputError, r"row ids: expected int64 \[N\], found int32 \[2\]"),
    (np.array([1.0]), InputError, "float64"),
    (np.array([True]), InputError, "bool"),
    (np.array([[1, 2]]), InputError, r"found int64 \[1, 2\]"),
    (np.array(1), InputError, r"found int64 \[\]"),
    ([1, 2], InputError, "found list"),
    (None, InputError, "found NoneType"),
]


def test_wrong_ids_are_refused(filled):
    store, expected = filled
    for ids, error, message in WRONG_IDS:
        out = np.full((np.size(ids), store.info.row_bytes), 0xA5, np.uint8)
        with pytest.raises(error, match=message.format(last=len(expected) - 1)):
            store.gather(ids, out=out)
        assert (out == 0xA5).all() and store.stats.gathers == 0


def test_the_last_row_is_read_and_the_next_is_not(filled):
    store, expected = filled
    np.testing.assert_array_equal(store.gather(np.array([len(expected) - 1]))[0], expected[-1])
    with pytest.raises(RowOutOfRange):
        store.gather(np.array([len(expected)]))


def test_a_buffer_that_does_not_fit_is_refused(filled):
    store, _ = filled
    width = store.info.row_bytes
    read_only = np.zeros((2, width), np.uint8)
    read_only.flags.writeable = False
    for out in (
        np.zeros((3, width), np.uint8),
        np.zeros((2, width + 1), np.uint8),
        np.zeros((2, width), np.int8),
        np.zeros(2 * width, np.uint8),
        np.zeros((width, 2), np.uint8).T,
        read_only,
        b"x",
    ):
        with pytest.raises(InputError, match="out: expected"):
            store.gather(np.array([0, 1]), out=out)  # type: ignore[arg-type]


def test_a_closed_store_says_so(filled):
    store, expected = filled
    kept = shards_of(store)
    store.close()
    store.close()
    for use in (
        lambda: store.gather(np.array([0])),
        lambda: store.scatter(np.array([0]), expected[:1]),
        lambda: shards_of(store),
    ):
        with pytest.raises(StoreError, match="closed"):
            use()
    assert store.info.rows == len(expected) and store.stats.gathers == (kept is not None)
    if kept is not None:  # memory that a reader still holds stays mapped
        np.testing.assert_array_equal(np.concatenate(kept), expected)


# Writing.


def test_scattered_rows_are_gathered_and_the_others_stay(writable):
    store, expected = writable
    ids = np.random.default_rng(0).permutation(len(expected))[:40]
    new = records(fmt_of("int8"), 40, seed=1)
    store.scatter(ids, new)
    expected = expected.copy()
    expected[ids] = new
    np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)


def test_of_an_id_given_twice_the_last_row_stays(writable):
    store, _ = writable
    new = records(fmt_of("int8"), 5, seed=1)
    store.scatter(np.array([9, 30, 9, 2, 9]), new)
    np.testing.assert_array_equal(store.gather(np.array([9, 30, 2])), new[[4, 1, 3]])


def test_a_wrong_scatter_writes_nothing(writable):
    store, expected = writable
    new = records(fmt_of("int8"), 2, seed=1)
    good = np.array([0, 1])
    for ids, rows, error in (
        (np.array([0, len(expected)]), new, RowOutOfRange),
        (np.array([0, -1]), new, RowOutOfRange),
        (np.array([0]), new, InputError),
        (good.astype(np.int32), new, InputError),
        (good, new[:, 1:], InputError),
        (good, new.view(np.int8), InputError),
        (good, new.tolist(), InputError),
    ):
        with pytest.raises(error):
            store.scatter(ids, rows)
    np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)


@pytest.mark.parametrize("name", ["file", "file in shards"])
def test_a_store_opened_for_reading_is_not_written(tmp_path, name):
    store, expected = build(name, tmp_path, fmt_of("int8"))
    with pytest.raises(StoreError, match="read-only"):
        store.scatter(np.array([0]), expected[1:2])
    assert not store.info.writable


def test_rows_scattered_into_a_file_are_in_the_sealed_table_under_a_new_id(tmp_path):
    store, expected = build("file open for writing", tmp_path, fmt_of("int8"))
    assert isinstance(store, FileStore)
    before, new = store.info.table_id, records(fmt_of("int8"), 1, seed=1)
    store.scatter(np.array([11]), new)
    with pytest.raises(TableUnsealed):
        open_store(f"file:{tmp_path / 'table'}", layer=LAYER)
    store.table.seal()
    assert store.info.table_id != before and not store.info.writable
    with pytest.raises(StoreError, match="read-only"):
        store.scatter(np.array([11]), new)
    again = open_store(f"file:{tmp_path / 'table'}", layer=LAYER)
    assert again.info.table_id == store.info.table_id
    np.testing.assert_array_equal(
        again.gather(np.array([11, 12])), np.stack([new[0], expected[12]])
    )
    assert Table.open(tmp_path / "table").verify()


def test_stores_of_several_layers_share_one_open_table(tmp_path):
    table = create(tmp_path / "table", fmt_of("int8"), 7)
    stores = [FileStore(table, layer) for layer in table.layers]
    rows = [records(table.fmt, table.rows(layer), seed=layer) for layer in table.layers]
    for store, new in zip(stores, rows, strict=True):
        store.scatter(np.arange(len(new)), new)
        store.close()
    table.seal()
    for layer, new in zip(table.layers, rows, strict=True):
        np.testing.assert_array_equal(
            np.concatenate(Table.open(tmp_path / "table").shard_arrays(layer)), new
        )


def test_closing_a_store_opened_by_url_lets_the_next_writer_in(tmp_path):
    store, _ = build("file open for writing", tmp_path, fmt_of("int8"))
    with pytest.raises(TableError, match="another|elsewhere"):
        open_store(f"file:{tmp_path / 'table'}", layer=LAYER, mode="w")
    store.close()
    open_store(f"file:{tmp_path / 'table'}", layer=LAYER, mode="w").close()


def test_rows_are_copied_between_stores_whatever_the_chunk(filled):
    source, expected = filled
    for chunk in (7, 13, 10**6):
        target = RamStore(*expected.shape)
        copy_rows(source, target, chunk=chunk)
        np.testing.assert_array_equal(target.gather(np.arange(len(expected))), expected)


def test_rows_are_not_copied_between_stores_of_different_sizes(filled):
    source, expected = filled
    rows, row_bytes = expected.shape
    for target in (RamStore(rows + 1, row_bytes), RamStore(rows, row_bytes + 1)):
        with pytest.raises(InputError, match="copy_rows"):
            copy_rows(source, target)


def test_rows_of_one_format_are_not_taken_for_another_of_the_same_width(tmp_path):
    half, _ = build("file", tmp_path / "f16", fmt_of("f16"))
    brain, _ = build("file open for writing", tmp_path / "bf16", fmt_of("bf16"))
    with pytest.raises(InputError, match="copy_rows.*f16.*bf16"):
        copy_rows(half, brain)
    out = np.full((1, D), 7, np.float32)
    with pytest.raises(InputError, match="kind='f16'.*kind='bf16'"):
        read(half, np.array([0]), fmt_of("bf16"), out)
    assert (out == 7).all()
    brain.close()


# Opening.


def test_info_says_what_is_held(tmp_path):
    ram = open_store("ram:", layer=1, rows=5, row_bytes=16)
    assert ram.info == StoreInfo("ram", 5, 16, writable=True, layer=1) and ram.info.bytes == 80
    store, expected = build("file", tmp_path, fmt_of("int8"))
    table = Table.open(tmp_path / "table")
    assert store.info == StoreInfo(
        "file",
        *expected.shape,
        False,
        table.table_id,
        LAYER,
        str(tmp_path / "table"),
        table.fmt,
        table.address_digest,
        "mmap",
    )


def test_new_ram_is_zero():
    store = open_store("ram:", rows=10**8, row_bytes=8)
    assert not store.gather(np.array([0, 10**8 - 1])).any()
    store.close()


@pytest.mark.parametrize(
    "arguments",
    [
        dict(url="ram:"),
        dict(url="ram:", rows=5),
        dict(url="ram:", row_bytes=5),
        dict(url="ram:", rows=0, row_bytes=4),
        dict(url="ram:", rows=5, row_bytes=-4),
        dict(url="ram:", rows=5.0, row_bytes=4),
        dict(url=""),
        dict(url=None),
        dict(url="ram:x", rows=5, row_bytes=4),
        dict(url="ram:", rows=5, row_bytes=4, mode="x"),
        dict(url="ram", rows=5, row_bytes=4),
        dict(url="file:", layer=LAYER),
        dict(url="file"),
        dict(url="file:{path}"),
        dict(url="file:{path}", layer=2),
        dict(url="file:{path}?cache=2GB", layer=LAYER),
        dict(url="file:{path}?x", layer=LAYER),
        dict(url="file:{path}", layer=LAYER, rows=5),
        dict(url="file:{path}", layer=LAYER, row_bytes=5),
        dict(url="file:{path}", layer=LAYER, mode="a"),
        dict(url="checkpoint:{path}", layer=LAYER),
        dict(url="pool:{path}"),
        dict(url="{path}", layer=LAYER),
    ],
    ids=str,
)
def test_urls_and_arguments_that_cannot_be_meant_are_refused(tmp_path, arguments):
    create(tmp_path / "table", fmt_of("int8")).seal()
    url = arguments["url"] and arguments["url"].format(path=tmp_path / "table")
    with pytest.raises(ConfigError, match="expected|no memory|tells"):
        open_store(**{**arguments, "url": url})
    Table.open(tmp_path / "table", "w").close()  # no lock is left behind


def test_more_memory_than_there_are_addresses_is_a_store_error():
    for rows in (2**52, 2**62):
        with pytest.raises(StoreError, match="refuses to map"):
            open_store("ram:", rows=rows, row_bytes=64)


def test_a_directory_without_a_table_is_one_of_our_errors(tmp_path):
    with pytest.raises(EngraphyError, match="found no file"):
        open_store(f"file:{tmp_path}", layer=LAYER)
