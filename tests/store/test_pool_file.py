"""A pool in one region: whole or refused by name, one copy that outlives its publisher, and never a
row of another epoch."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    ShardCorrupt,
    ShardForeign,
    ShardTruncated,
    StoreError,
    TableError,
    TableUnsealed,
)
from engraphy.rows import read
from engraphy.store import (
    PoolFileStore,
    ReloadableStore,
    open_store,
    publish,
    publish_pool,
    read_header,
    verify_pool,
)
from engraphy.store.pool_header import BYTES
from engraphy.table import Table
from tests.tools.store_builders import (
    LAYER,
    fmt_of,
    in_own_namespace,
    mappings_of,
    memfd,
    open_fds,
    sealed,
)

F32 = fmt_of("f32", 64)


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    """What is synced, and when, is tested with the table."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("tables") / "first"
    return path, sealed(path, F32, shard_rows=300, rows=300)


@pytest.fixture(scope="module")
def second(tmp_path_factory, source) -> tuple[Path, np.ndarray]:
    """The table after one more seal, with other rows."""
    path = tmp_path_factory.mktemp("tables") / "second"
    shutil.copytree(source[0], path)
    table = Table.open(path, "w")
    rows = 255 - source[1]
    table.write_rows(LAYER, 0, rows)
    table.seal()
    return path, rows


@pytest.fixture(params=["a file", "/dev/shm", "a memfd"])
def region(request, tmp_path):
    """A place for a pool."""
    if request.param == "a file":
        yield str(tmp_path / "pool")
    elif request.param == "a memfd":
        yield f"/proc/self/fd/{memfd()}"
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield f"{folder}/pool"


def opened(path, options: str = "", layer: int = LAYER):
    return open_store(f"pool:{path}{options}", layer=layer)


def all_ids(rows: np.ndarray) -> np.ndarray:
    return np.arange(len(rows))


# Whole.


def test_every_layer_is_read_and_described_as_the_table_has_it(region, source):
    path, rows = source
    header = publish_pool(path, region)
    table = Table.open(path)
    for layer in table.layers:
        store = opened(region, layer=layer)
        ids = np.arange(store.info.rows)
        np.testing.assert_array_equal(
            store.gather(ids), np.concatenate(table.shard_arrays(layer))[ids]
        )
        info = dataclasses.replace(store.info, reads=None)
        assert info == dataclasses.replace(
            open_store(f"file:{path}", layer=layer).info, kind="pool", path=region, reads=None
        )
        store.close()
    np.testing.assert_array_equal(opened(region).gather(all_ids(rows)), rows)
    assert header == read_header(region) and header.epoch == 1
    assert verify_pool(region).shards == len(table.shards(1)) + len(table.shards(LAYER))


def test_populate_says_what_it_did_and_who_may_wait(tmp_path, source):
    publish_pool(source[0], tmp_path / "pool")
    assert opened(tmp_path / "pool").info.reads == "mmap, populated"
    assert opened(tmp_path / "pool").in_memory
    lazy = opened(tmp_path / "pool", "?populate=0")
    assert lazy.info.reads == "mmap" and not lazy.in_memory


def test_a_cache_by_url_stands_before_the_pool_and_each_counts_its_own(region, source):
    path, rows = source
    publish_pool(path, region)
    store = opened(region, "?cache=1MiB")
    for _ in range(2):
        np.testing.assert_array_equal(store.gather(all_ids(rows)[:500]), rows[:500])
    assert isinstance(store.inner, PoolFileStore)
    assert (store.stats.rows, store.stats.hits, store.stats.misses) == (1000, 500, 500)
    assert store.inner.stats.rows == 500


def test_a_cache_by_url_is_warmed_with_the_rows_of_a_file(tmp_path, source):
    pool, hot = tmp_path / "pool", np.random.default_rng(0).permutation(len(source[1]))
    publish_pool(source[0], pool)
    np.savez(tmp_path / "hot.npz", **{str(LAYER): hot})
    store = opened(pool, f"?cache=64KiB&warm={tmp_path / 'hot.npz'}")
    assert store.inner.stats.rows == store.capacity < len(hot)
    assert np.isin(store.kept(), hot[: store.capacity]).all() and len(store.kept()) > 100
    np.save(tmp_path / "plain.npy", hot)
    np.savez(tmp_path / "real.npz", **{str(LAYER): hot / 2})
    for name in ("none.npz", "plain.npy", "real.npz"):
        with pytest.raises(ConfigError, match=f"the row ids of layer 3 in .*{name}"):
            opened(pool, f"?cache=64KiB&warm={tmp_path / name}")
    with pytest.raises(ConfigError, match="the row ids of layer 1 in"):
        opened(pool, f"?cache=64KiB&warm={tmp_path / 'hot.npz'}", layer=1)
    with pytest.raises(ConfigError, match="expected cache= with warm="):
        opened(pool, f"?warm={tmp_path / 'hot.npz'}")


def test_rows_are_pinned_in_the_cache_before_a_pool(tmp_path, source):
    publish_pool(source[0], tmp_path / "pool")
    wanted = np.random.default_rng(0).permutation(len(source[1]))
    np.savez(tmp_path / "hot.npz", **{str(LAYER): wanted})
    store = opened(tmp_path / "pool", f"?cache=32KiB&pin={tmp_path / 'hot.npz'}")
    kept = set(store.kept().tolist())
    assert store.pinned and 0.9 * store.capacity < len(kept) <= store.capacity < len(wanted)
    np.testing.assert_array_equal(store.gather(all_ids(source[1])), source[1])
    assert set(store.kept().tolist()) == kept
    with pytest.raises(ConfigError, match="expected cache= with pin="):
        opened(tmp_path / "pool", f"?pin={tmp_path / 'hot.npz'}")
    with pytest.raises(ConfigError, match="expected warm= or pin=, found both"):
        opened(tmp_path / "pool", f"?cache=32KiB&warm=a&pin={tmp_path / 'hot.npz'}")
    with pytest.raises(ConfigError, match="pin: expected the row ids"):
        opened(tmp_path / "pool", "?cache=32KiB&pin=none")


def test_closing_gives_everything_back(tmp_path, source):
    publish_pool(source[0], tmp_path / "pool")
    before = open_fds()
    for _ in range(20):
        opened(tmp_path / "pool", "?cache=64KiB").close()
        with pytest.raises(ConfigError, match="expected one of the layers"):
            opened(tmp_path / "pool", layer=2)
    assert open_fds() == before and mappings_of(tmp_path) == 0


PUBLISH = """
import os, signal, sys
from engraphy.store import publish
real = publish._copy_shard
def copy(table, shard, memory, at):
    if shard.name.startswith("layer-00003-00002"):
        print("half", flush=True)
        if sys.argv[3] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[3] == "wait":
            sys.stdin.readline()
    return real(table, shard, memory, at)
publish._copy_shard = copy
publish.publish_pool(sys.argv[1], sys.argv[2])
"""


def publisher(table: Path, region: str, then: str) -> subprocess.Popen[str]:
    """A process that publishes a table; after half of it, it may die or wait for a line."""
    number = [int(region.rpartition("/")[2])] if region.startswith("/proc") else []
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISH, str(table), region, then],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=number,
    )


def test_readers_outlive_the_process_that_published(region, source):
    path, rows = source
    done = publisher(path, region, "go on")
    assert done.communicate()[0] and done.returncode == 0
    np.testing.assert_array_equal(opened(region).gather(all_ids(rows)), rows)


def test_a_publisher_that_dies_halfway_leaves_no_pool_and_the_next_one_publishes(region, source):
    path, rows = source
    killed = publisher(path, region, "die")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    if region.startswith("/proc"):
        with pytest.raises(TableUnsealed, match="process [0-9]+ on .* did not finish .* epoch 1"):
            opened(region)
    else:
        with pytest.raises(StoreError, match="found none; from=DIR .* engraphy table publish"):
            opened(region)
    publish_pool(path, region)
    np.testing.assert_array_equal(opened(region).gather(all_ids(rows)), rows)
    folder = Path(region).parent
    left = {name for name in os.listdir(folder) if "part" in name}
    assert region.startswith("/proc") or not left


@pytest.mark.slow
def test_a_region_that_is_being_published_is_not_served_and_has_one_publisher(source):
    region = f"/proc/self/fd/{memfd()}"
    busy = publisher(source[0], region, "wait")
    assert busy.stdout and busy.stdout.readline() == "half\n"
    with pytest.raises(TableUnsealed, match="process [0-9]+ on .* is publishing it"):
        opened(region)
    with pytest.raises(StoreError, match="expected no process that reads or writes it"):
        publish_pool(source[0], region)
    busy.communicate("go\n")
    assert opened(region).info.table_id == Table.open(source[0]).table_id


# A new epoch.


def test_who_reads_a_named_pool_ends_on_the_old_epoch(tmp_path, source, second):
    pool = tmp_path / "pool"
    publish_pool(source[0], pool)
    old = opened(pool)
    publish_pool(second[0], pool)
    new = opened(pool)
    for store, rows in ((old, source[1]), (new, second[1])):
        np.testing.assert_array_equal(store.gather(all_ids(rows)), rows)
    assert old.header.epoch == 1 and new.header.epoch == read_header(pool).epoch == 2
    assert old.info.table_id != new.info.table_id


def test_threads_read_one_epoch_in_each_call_while_it_is_reloaded(tmp_path, source, second):
    pool = tmp_path / "pool"
    publish_pool(source[0], pool)
    store = ReloadableStore(opened(pool, "?cache=1MiB"))
    ids = all_ids(source[1])[:200]
    seen, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            rows = store.gather(ids)
            seen.append([np.array_equal(rows, table[1][ids]) for table in (source, second)])

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for table in (second, source, second):
        publish_pool(table[0], pool)
        store.reload(opened(pool, "?cache=1MiB"))
    stop.set()
    for reader in readers:
        reader.join()
    assert seen and all(sum(pair) == 1 for pair in seen)
    np.testing.assert_array_equal(store.gather(ids), second[1][ids])


def test_a_region_without_a_name_is_written_anew_only_when_nobody_reads_it(source, second):
    region = f"/proc/self/fd/{memfd()}"
    publish_pool(source[0], region)
    store = opened(region)
    with pytest.raises(StoreError, match="written in place, found one; close its readers"):
        publish_pool(second[0], region)
    np.testing.assert_array_equal(store.gather(all_ids(source[1])), source[1])
    store.close()
    del store
    assert publish_pool(second[0], region).epoch == 2
    np.testing.assert_array_equal(opened(region).gather(all_ids(second[1])), second[1])


@pytest.mark.parametrize("way", ["gather", "read", "reading"])
def test_what_another_host_writes_in_place_is_never_served_as_rows(
    source, second, monkeypatch, way
):
    """A lock does not reach another host, so the region itself has to tell."""
    region = f"/proc/self/fd/{memfd()}"
    publish_pool(source[0], region)
    store = opened(region)
    monkeypatch.setattr(publish, "lock_to_write", lambda *_: None)
    ids = all_ids(source[1])[:50]

    def use() -> None:
        if way == "gather":
            store.gather(ids)
        elif way == "read":
            read(store, ids, F32, np.empty((len(ids), 64), np.float32))
        else:
            with store.reading(len(ids)) as shards:
                shards[0][ids].copy()

    use()
    copied = publish._copy_shard

    def copy(*arguments):
        with pytest.raises(ShardForeign, match="written anew while it was served"):
            use()
        return copied(*arguments)

    monkeypatch.setattr(publish, "_copy_shard", copy)
    publish_pool(second[0], region)
    store._watch._next_look = 0.0
    with pytest.raises(ShardForeign, match="expected epoch 1 of the pool"):
        use()


# Damage.


def test_another_table_than_the_one_that_is_wanted_is_refused(tmp_path, source, second):
    publish_pool(source[0], tmp_path / "pool")
    opened(tmp_path / "pool", f"?from={source[0]}").close()
    with pytest.raises(DigestMismatch, match="expected table [0-9a-f]{32} of .*second, found"):
        opened(tmp_path / "pool", f"?from={second[0]}")
    assert mappings_of(tmp_path) == 0


def damaged(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data", "error", "message"),
    [
        (0, b"GGUF", TableError, "expected a pool, which begins with"),
        (8, b"\2", TableError, "expected a pool of version 1, found 2"),
        (16, b"\7", ShardCorrupt, "header is damaged"),
        (24, bytes(8), TableUnsealed, "did not finish publishing epoch 1"),
        (100, b"?", ShardCorrupt, "header is damaged"),
    ],
)
def test_a_header_that_is_foreign_or_damaged_is_refused(tmp_path, source, at, data, error, message):
    pool = tmp_path / "pool"
    publish_pool(source[0], pool)
    damaged(pool, at, data)
    with pytest.raises(error, match=message):
        opened(pool)


def test_what_is_no_pool_is_refused(tmp_path, source):
    (tmp_path / "empty").touch()
    with pytest.raises(TableError, match="expected a pool"):
        opened(tmp_path / "empty")
    with pytest.raises(StoreError, match="expected a file, a memfd or a device"):
        publish_pool(source[0], tmp_path)
    with pytest.raises(TableError, match="expected a table's engram.json"):
        publish_pool(tmp_path / "none", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_a_pool_that_is_cut_is_refused_and_also_while_it_is_served(tmp_path, source):
    pool = tmp_path / "pool"
    size = publish_pool(source[0], pool).size
    store = opened(pool)
    store.gather(all_ids(source[1]))
    os.truncate(pool, size - 4096)
    with pytest.raises(ShardTruncated, match=f"expected {size} bytes"):
        store.gather(all_ids(source[1]))
    with pytest.raises(ShardTruncated, match=f"expected {size} bytes"):
        opened(pool)


def test_a_damaged_table_is_not_published_and_a_damaged_pool_is_found(tmp_path, source):
    pool = tmp_path / "pool"
    place = publish_pool(source[0], pool).layers[LAYER]
    damaged(pool, place.offset + 10, b"\xff\xff\xff")
    with pytest.raises(ShardCorrupt, match="pool, layer-00003-00001-.*: expected rows of SHA-256"):
        verify_pool(pool)
    shutil.copytree(source[0], tmp_path / "table")
    damaged(next((tmp_path / "table").glob("layer-00003-00002*")), 5000, b"\xff\xff\xff")
    with pytest.raises(ShardCorrupt, match="layer-00003-00002.*it is not published"):
        publish_pool(tmp_path / "table", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_table_that_is_written_meanwhile_is_not_published(tmp_path, source, monkeypatch):
    shutil.copytree(source[0], tmp_path / "table")
    copied = publish._copy_shard

    def copy(table, shard, *arguments):
        if shard.name.startswith("layer-00001-00001"):
            Table.open(tmp_path / "table", "w").close()
        return copied(table, shard, *arguments)

    monkeypatch.setattr(publish, "_copy_shard", copy)
    with pytest.raises(TableError, match="to stay unchanged while it is published"):
        publish_pool(tmp_path / "table", tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_a_header_that_describes_too_many_layers_is_refused(tmp_path, source):
    header = publish_pool(source[0], tmp_path / "pool")
    place = header.layers[LAYER]
    many = dataclasses.replace(header, layers=dict.fromkeys(range(48), place))
    assert len(many.to_bytes()) == BYTES
    with pytest.raises(ConfigError, match="for 400 layers"):
        dataclasses.replace(header, layers=dict.fromkeys(range(400), place)).to_bytes()


FULL = """
import os, subprocess, sys
from engraphy.errors import WriteFailed
from engraphy.store import open_store, publish_pool
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", sys.argv[2]], check=True)
try:
    publish_pool(sys.argv[1], sys.argv[2] + "/pool")
except WriteFailed as error:
    print(error)
print(os.listdir(sys.argv[2]))
"""


def test_a_pool_without_room_is_an_error_and_leaves_nothing(tmp_path, source):
    (tmp_path / "memory").mkdir()
    run = in_own_namespace(FULL, str(source[0]), str(tmp_path / "memory"))
    assert run.returncode == 0, run.stderr
    error, left = run.stdout.splitlines()
    assert "No space left on device" in error and left == "['.pool.lock']"


# Huge pages.

HUGE = """
import subprocess, sys
import numpy as np
from engraphy.store import open_store, publish_pool, read_header
table, folder, rows = sys.argv[1], sys.argv[2], np.load(sys.argv[3])
subprocess.run(["mount", "-t", "hugetlbfs", "none", folder], check=True)
for _ in range(2):
    publish_pool(table, folder + "/pool")
store = open_store(f"pool:{folder}/pool", layer=3)
assert np.array_equal(store.gather(np.arange(len(rows))), rows)
header = read_header(folder + "/pool")
print(header.epoch, header.size % (1 << 21), store.info.reads)
"""
RESERVED = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def huge_pages():
    """Eight huge pages, given back afterwards; skips if the system gives none."""
    before = RESERVED.read_text()
    try:
        RESERVED.write_text(str(int(before) + 8))
    except OSError as error:
        pytest.skip(f"huge pages cannot be reserved here ({error})")
    try:
        if int(RESERVED.read_text()) < int(before) + 8:
            pytest.skip("the system has no eight huge pages free")
        yield
    finally:
        RESERVED.write_text(before)


def test_a_pool_lies_in_huge_pages(huge_pages, tmp_path, source):
    (tmp_path / "huge").mkdir()
    np.save(tmp_path / "rows.npy", source[1])
    command = [sys.executable, "-c", HUGE, source[0], tmp_path / "huge", tmp_path / "rows.npy"]
    run = subprocess.run(["unshare", "-m", *command], capture_output=True, text=True)
    if "mount" in run.stderr:
        pytest.skip(f"hugetlbfs cannot be mounted here: {run.stderr}")
    assert run.stdout == "2 0 mmap, populated\n", run.stderr
