"""The suite for every store (`engraphy.store.testing`) on ours, and what only ours have."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from engraphy.errors import (
    ConfigError,
    EngraphyError,
    InputError,
    StoreError,
    TableError,
    TableUnsealed,
)
from engraphy.rows import read
from engraphy.store import (
    CacheStore,
    FileStore,
    PreadStore,
    StoreInfo,
    StoreStats,
    copy_rows,
    open_store,
)
from engraphy.store.testing import ReadOnlyStoreTests, StoreTests, WritableStoreTests
from engraphy.table import Table
from tests.tools.store_builders import (
    LAYER,
    MAPPED,
    NOT_MAPPED,
    STORES,
    TO_WRITE,
    D,
    build,
    create,
    fmt_of,
    kinds_of,
    make,
    records,
    shards_of,
    some_ids,
    usual,
)

UPDATABLE = ("ram", "file open for writing", "reloadable file open for writing")
BY_URL = (
    "file",
    "file in shards",
    "pread",
    "pread in shards",
    "pread direct",
    "pool",
    "pool file",
    "checkpoint in parts",
    "checkpoint with scales",
)


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    """What is synced, and when, is tested with the table."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


class Built(StoreTests):
    """The suite on the stores of store_builders; `name` says which one."""

    name: str

    @property
    def mapped(self) -> bool:
        return self.name in MAPPED

    @property
    def updatable(self) -> bool:
        return self.name in UPDATABLE

    def make_filled(self, folder):
        return build(self.name, folder)

    def format_of(self, store):
        """Memory does not know its own format."""
        return store.info.format or usual(store.info.kind)


class TestReadOnlyStores(Built, ReadOnlyStoreTests):
    @pytest.fixture(autouse=True, params=[name for name in STORES if name not in TO_WRITE])
    def named(self, request):
        self.name = request.param


class TestWritableStores(Built, WritableStoreTests):
    @pytest.fixture(autouse=True, params=TO_WRITE)
    def named(self, request):
        self.name = request.param


@pytest.fixture(params=[name for name in STORES if "pread" in name or "cache" in name])
def counting(request, tmp_path):
    """A store that counts more than calls."""
    store, expected = build(request.param, tmp_path)
    yield store, expected
    store.close()


# Reading.


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


def test_stats_count_what_was_read_from_the_system_and_from_a_cache(counting):
    store, _ = counting
    cache = isinstance(store, CacheStore)
    nothing = 0 if cache else None
    assert store.stats == StoreStats(0, 0, 0, hits=nothing, misses=nothing)
    store.gather(np.array([1, 2, 3]))
    store.gather(np.array([4, 5]))
    stats = store.stats
    assert bool(stats.reads) == bool(stats.read_bytes) == isinstance(store, PreadStore)
    assert (stats.hits, stats.misses) == ((0, 5) if cache else (None, None))


# Writing.


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ram", "<ram store in memory: {rows}, writable>"),
        ("file", "<file store of {table}: {rows} {int8}, mmap, read-only>"),
        ("file open for writing", "<file store of {table}: {rows} {int8}, mmap, writable>"),
        (
            "pread direct",
            "<file store of {table}: {rows} {int8}, pread, 128 threads, direct, read-only>",
        ),
        ("pool", "<pool store of {path}/pool, layer 3: {rows} {int8}, mmap, populated, read-only>"),
        (
            "checkpoint with scales",
            "<checkpoint store of {path}/release, layer 3: {rows} (fp8, d = 32), mmap, read-only>",
        ),
        (
            "tiny cache around ram",
            "<cache of 32 rows around <ram store in memory: {rows}, writable>>",
        ),
        (
            "reloadable file",
            "<reloadable store around <file store of {table}: {rows} {int8}, mmap, read-only>>",
        ),
    ],
)
def test_repr_says_kind_place_layer_sizes_format_and_whether_it_is_writable(
    name, expected, tmp_path
):
    store, rows_NR = build(name, tmp_path)
    rows, row_bytes = rows_NR.shape
    words = {
        "rows": f"{rows} rows of {row_bytes} bytes",
        "int8": "(int8, d = 32)",
        "table": f"{tmp_path / 'table'}, layer 3",
        "path": tmp_path,
    }
    assert repr(store) == expected.format(**words)
    store.close()
    assert repr(store).rstrip(">").endswith(", closed")


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
