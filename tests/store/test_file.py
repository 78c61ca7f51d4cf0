"""file: stores: how they choose to read, and what becomes of a shard that changes while it is
served."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from engraphy import _native
from engraphy.errors import ConfigError, EngraphyError, ShardTruncated, StoreError
from engraphy.rows import read
from engraphy.store import FileStore, PreadStore, mapping, open_store, options
from engraphy.table import Table
from tests.native.test_gather import others_ran
from tests.tools.paths import ROOT
from tests.tools.store_builders import (
    LAYER,
    create,
    fmt_of,
    in_own_namespace,
    mappings_of,
    open_fds,
    resident,
    sealed,
)

ENGINES = ("off", "auto") if _native.core else ("off",)
READS = ("read=mmap", "read=pread", "read=pread&direct=1")
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_read = pytest.mark.parametrize("reads", READS)


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    """What is synced, and when, is tested with the table."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def table(tmp_path):
    """A table of 5 MiB a layer in five shards: larger than what a read brings by the way."""
    return tmp_path / "table", sealed(
        tmp_path / "table", fmt_of("f32", 64), shard_rows=4096, rows=5000
    )


def opened(path: Path, how: str = "", mode: str = "r"):
    return open_store(f"file:{path}{'?' if how else ''}{how}", layer=LAYER, mode=mode)


# How it reads.


def test_what_fits_into_free_memory_is_mapped_and_what_does_not_is_read(table, monkeypatch):
    path, expected = table
    size = 2 * expected.nbytes  # of both layers
    for free, kind, how in (
        (size * 10, FileStore, "mmap"),
        (size, PreadStore, "pread, 128 threads"),
    ):
        monkeypatch.setattr(options, "free_memory", lambda free=free: free)
        store = opened(path)
        assert type(store) is kind and store.info.reads == how and how in repr(store)
        np.testing.assert_array_equal(store.gather(np.array([7, 20_001])), expected[[7, 20_001]])
        store.close()


@pytest.mark.parametrize(
    ("how", "reads"),
    [
        ("read=mmap", "mmap"),
        ("populate=1", "mmap, populated"),
        ("read=mmap&populate=1", "mmap, populated"),
        ("read=pread", "pread, 128 threads"),
        ("read=pread&threads=1", "pread, 1 thread"),
        ("direct=1&threads=2", "pread, 2 threads, direct"),
        ("read=auto&threads=5&direct=0&populate=0", "mmap"),
    ],
)
def test_what_is_said_by_hand_counts_and_the_store_tells_it(table, how, reads, monkeypatch):
    if "auto" not in how and "populate" not in how:
        monkeypatch.setattr(options, "free_memory", lambda: 0 if "mmap" in how else 1 << 60)
    path, expected = table
    store = opened(path, how)
    assert store.info.reads == reads
    facts = f": {len(expected)} rows of 256 bytes (f32, d = 64), {reads}, read-only>"
    assert repr(store).endswith(facts)
    store.close()


def test_a_table_that_is_written_is_mapped_unless_told_otherwise(table, monkeypatch):
    monkeypatch.setattr(options, "free_memory", lambda: 0)
    for how, reads in (("", "mmap"), ("read=pread", "pread, 128 threads")):
        store = opened(table[0], how, "w")
        assert store.info.reads == reads and repr(store).endswith(", writable>")
        store.close()


@pytest.mark.parametrize(
    "how",
    [
        "raed=mmap",
        "read=",
        "read",
        "read=MMAP",
        "read=io_uring",
        "threads=0",
        "threads=-1",
        "threads=1025",
        "threads=x",
        "threads=1.5",
        "threads=",
        "threads=٣",
        "direct=yes",
        "direct=2",
        "populate=",
        "populate=true",
        "read=mmap&",
        "read=mmap&read=mmap",
        "read=mmap&threads=4",
        "populate=1&threads=4",
        "read=mmap&direct=1",
        "direct=1&populate=1",
        "read=pread&populate=1",
        "cache =1",
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_name(table, how):
    with pytest.raises(
        ConfigError,
        match=r"expected (options read=, |one of auto, mmap, pread|an integer from 1 to|"
        r"0 or 1|read= once|direct=1 with|populate=1 with)",
    ):
        opened(table[0], how)


def test_direct_reading_beside_writing_is_refused(table):
    with pytest.raises(ConfigError, match="direct=1"):
        opened(table[0], "direct=1", "w")
    Table.open(table[0], "w").close()  # no lock is left behind


def test_a_file_system_that_refuses_direct_reads_is_a_store_error(table, monkeypatch):
    def refuse(fd, command, *rest):
        if command == 4:  # F_SETFL
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    monkeypatch.setattr("engraphy.store.pread_files.fcntl.fcntl", refuse)
    before = open_fds()
    with pytest.raises(
        StoreError, match=r"layer-00003-00001.*refuses direct reads; open it with direct=0"
    ):
        opened(table[0], "direct=1")
    assert open_fds() == before


def test_populating_brings_every_page_in_and_what_does_not_fit_is_refused(table, monkeypatch):
    path, expected = table
    plain, populated = opened(path, "read=mmap"), opened(path, "populate=1")
    assert resident(path) >= expected.nbytes
    populated.close()
    assert resident(path) < expected.nbytes / 2
    plain.close()
    monkeypatch.setattr(options, "free_memory", lambda: expected.nbytes)
    with pytest.raises(
        StoreError,
        match=rf"populate=1: expected \d{{8}} bytes to fit into 90% of the free memory, "
        f"found {expected.nbytes} bytes free",
    ):
        opened(path, "populate=1")


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
def test_few_rows_of_a_populated_file_are_read_at_once_and_those_of_another_while_others_run(
    table, monkeypatch
):
    monkeypatch.setattr(mapping, "_LOOK_EVERY", 60)  # others may run at each look
    few = np.arange(20)
    for how, expected, seconds in (("populate=1", False, 0.3), ("read=mmap", True, 20)):
        store = opened(table[0], how)
        store.gather(few)
        assert others_ran(lambda store=store: store.gather(few), seconds) is expected


def test_a_kernel_that_cannot_populate_has_each_page_touched_and_the_store_says_so(
    table, monkeypatch
):
    monkeypatch.setattr(mapping, "_POPULATE_READ", 10_000)  # what no kernel knows
    store = opened(table[0], "populate=1")
    assert "populated by touching each page, since this kernel has no MADV_POPULATE_READ" in repr(
        store
    )
    assert resident(table[0]) >= table[1].nbytes


def test_what_is_free_can_be_given_and_decides_how_a_table_is_read(table, monkeypatch):
    path, _ = table
    for given, chosen in (("0", "pread"), (str(1 << 60), "mmap")):
        monkeypatch.setenv("ENGRAPHY_FREE_MEMORY", given)
        assert options.FileOptions().choose(Table.open(path)) == chosen
    monkeypatch.setenv("ENGRAPHY_FREE_MEMORY", "much")
    with pytest.raises(
        ConfigError, match="ENGRAPHY_FREE_MEMORY: expected a number of bytes, found 'much'"
    ):
        options.FileOptions().choose(Table.open(path))


# Where nothing may be written.


READ_ONLY = """
import os, sys
import numpy as np
from engraphy.store import open_store
path, user = sys.argv[1], int(sys.argv[2])
if user >= 0:
    os.setgid(user); os.setuid(user)
assert not os.access(path, os.W_OK) and not os.access(path + "/engram.json", os.W_OK)
for how in ("", "?read=pread", "?direct=1", "?populate=1"):
    store = open_store(f"file:{path}{how}", layer=3)
    print(store.gather(np.arange(4)).sum(), end=" ")
"""


def test_a_table_that_this_user_may_only_read_is_served():
    with tempfile.TemporaryDirectory() as name:  # which other users may enter, unlike pytest's
        folder, table = Path(name), Path(name) / "table"
        expected = sealed(table)
        for each in table.iterdir():
            each.chmod(0o444)
        table.chmod(0o555)
        folder.chmod(0o755)
        nobody = "65534" if os.geteuid() == 0 else "-1"
        run = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(table), nobody], capture_output=True, text=True
        )
        table.chmod(0o755)
    assert run.stdout.split() == [str(expected[:4].sum())] * 4, run.stderr


# Shards that change while they are served.


def both_ways(store, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows as gathered, and as read; out is poisoned."""
    out = np.full((len(ids), 64), np.nan, np.float32)
    return store.gather(ids, out=np.full((len(ids), 256), 0xA5, np.uint8)), read(
        store, ids, fmt_of("f32", 64), out
    )


@every_engine
@every_read
@pytest.mark.parametrize("size", [0, 4096, 5000, 4096 + 256 * 4096 - 1])
def test_a_shard_that_was_truncated_is_an_error_before_any_row_is_handed_out(
    table, engine, reads, size
):
    path, expected = table
    with _native.forced(engine):
        store = opened(path, reads)
        both_ways(store, np.array([5000, 9000]))
        shard = sorted(path.glob("layer-00003-*"))[1]
        os.truncate(shard, size)
        out, fmt = np.empty((1, 64), np.float32), fmt_of("f32", 64)
        for use in (store.gather, lambda ids: read(store, ids, fmt, out)):
            with pytest.raises(
                ShardTruncated, match=rf"{shard}: expected 1052672 bytes, found {size}"
            ):
                use(np.array([8191]))
        assert store.stats.gathers == 2
        store.close()


@every_engine
@every_read
@pytest.mark.parametrize("size", [4096 + 256 * 3, 4096 + 256 * 17 + 100, 4096 + 256 * 4096 - 300])
def test_a_cut_within_a_page_is_an_error_of_the_next_read_also_where_rows_end_with_zeros(
    tmp_path, engine, reads, size
):
    """Nothing faults: the rows lie in the page in which the file now ends, and its rest reads as
    zeros."""
    table = create(tmp_path / "table", fmt_of("f32", 64), shard_rows=4096, rows=5000)
    rows = np.zeros((4096, 256), np.uint8)
    rows[:, 100] = 1
    table.write_rows(LAYER, 0, rows)
    table.seal()
    with _native.forced(engine):
        store, shard = opened(table.path, reads), sorted(table.path.glob("layer-00003-*"))[0]
        store.gather(np.array([7]))  # has just looked at the size
        os.truncate(shard, size)
        for _ in range(2):
            with pytest.raises(ShardTruncated, match=rf"expected 1052672 bytes, found {size}"):
                store.gather(np.array([(size - 4096) // 256 + 1]))
        store.close()


@every_engine
@every_read
def test_a_shard_that_another_file_is_renamed_over_is_served_as_it_was(table, engine, reads):
    path, expected = table
    with _native.forced(engine):
        store, ids = opened(path, reads), np.arange(0, len(expected), 17)
        for shard in path.glob("*.safetensors"):
            (path / "new").write_bytes(b"another")
            os.rename(path / "new", shard)
        gathered, values = both_ways(store, ids)
        np.testing.assert_array_equal(gathered, expected[ids])
        np.testing.assert_array_equal(values.view(np.uint8), expected[ids])
        with pytest.raises(EngraphyError):
            opened(path, reads)


@every_engine
@pytest.mark.parametrize("reads", ["read=mmap", "read=pread"])
def test_a_truncated_shard_is_not_made_longer_by_writing_to_it(table, engine, reads):
    path, expected = table
    with _native.forced(engine):
        store = opened(path, reads, "w")
        shard = sorted(path.glob("layer-00003-*"))[1]
        os.truncate(shard, 8192)
        with pytest.raises(ShardTruncated, match=r"expected 1052672 bytes, found 8192"):
            store.scatter(np.array([8191, 1]), expected[:2])
        assert shard.stat().st_size == 8192
        store.close()


@pytest.mark.slow
@every_engine
def test_a_thousand_stores_leave_no_file_open_and_nothing_mapped(tmp_path, engine):
    path, expected = tmp_path / "table", sealed(tmp_path / "table")
    with _native.forced(engine):
        opened(path, "read=pread").gather(np.array([1]))
        before = open_fds()
        for turn in range(1000):
            store = opened(path, READS[turn % 3])
            assert (
                store.gather(np.array([turn % 80, 7]))[0].tobytes() == expected[turn % 80].tobytes()
            )
            store.close()
        assert open_fds() == before and mappings_of(path) == 0


@every_read
def test_too_many_open_files_are_an_error_and_leave_none_open(tmp_path, reads):
    sealed(tmp_path / "table", shard_rows=7)  # twelve shards
    before, (soft, hard) = open_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 6, hard))
    try:
        with pytest.raises(EngraphyError, match="Too many open files"):
            opened(tmp_path / "table", reads)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before and mappings_of(tmp_path) == 0


FULL_DISK = """
import subprocess, sys
from pathlib import Path
import numpy as np
folder, reads = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True)
sys.path.insert(0, sys.argv[3])
from tests.tools.store_builders import create, fmt_of, records
from engraphy.errors import StoreError
from engraphy.store import open_store
table = create(folder / "table", fmt_of("f32", 64), shard_rows=4096, rows=5000)
table.seal()
store = open_store(f"file:{folder}/table?{reads}", layer=3, mode="w")
rows = records(fmt_of("f32", 64), store.info.rows)
written = []
for ids in np.random.default_rng(0).permutation(len(rows)).reshape(-1, 41):
    try:
        store.scatter(ids, rows[ids])
    except StoreError as error:
        print(error)
        break
    written.append(ids)
ids = np.concatenate(written)
print(len(written), np.array_equal(store.gather(ids), rows[ids]))
store.scatter(ids, rows[ids][::-1])  # what has its place can be written again
print(np.array_equal(store.gather(ids), rows[ids][::-1]))
"""


@every_engine
@pytest.mark.parametrize("reads", ["read=mmap", "read=pread"])
def test_a_full_disk_is_an_error_and_neither_a_signal_nor_the_end_of_what_was_written(
    tmp_path, engine, reads
):
    run = in_own_namespace(FULL_DISK, str(tmp_path), reads, str(ROOT), ENGRAPHY_NATIVE=engine)
    assert run.returncode == 0, run.stderr
    error, written, again = run.stdout.splitlines()
    assert "No space left on device" in error and "layer-00003-" in error
    assert int(written.split()[0]) > 3 and written.endswith(" True") and again == "True"
