"""A pool is one copy for all processes, whole or not there, and of the table that it is said to be
of."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    EngraphyError,
    ShardTruncated,
    StoreError,
    TableError,
)
from engraphy.rows import read
from engraphy.store import PoolStore, open_store, pool
from engraphy.table import Table
from engraphy.table.manifest import Manifest
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

F32 = fmt_of("f32", 64)


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    """What is synced, and when, is tested with the table."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source", sealed(tmp_path / "source", F32, shard_rows=4096, rows=5000)


def opened(path: Path, source: Path | None = None, populate: str = "", layer: int = LAYER):
    options = "&".join(
        [f"from={source}"] * (source is not None) + [f"populate={populate}"] * bool(populate)
    )
    return open_store(f"pool:{path}{'?' if options else ''}{options}", layer=layer)


def left_beside(path: Path) -> set[str]:
    """What there is beside a pool but its lock."""
    return {each.name for each in path.parent.iterdir()} - {
        path.name,
        f".{path.name}.lock",
        "source",
    }


# One process.


def test_the_first_fills_the_pool_with_all_layers_and_later_ones_need_no_source(tmp_path, source):
    path, expected = source
    store = opened(tmp_path / "pool", path)
    assert (
        isinstance(store, PoolStore)
        and store.info.kind == "pool"
        and store.info.reads == "mmap, populated"
    )
    assert store.info.path == str(tmp_path / "pool") and not store.info.writable
    np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)
    assert resident(tmp_path / "pool") >= expected.nbytes
    path.rename(tmp_path / "gone")
    for layer in (1, LAYER):
        again = opened(tmp_path / "pool", layer=layer, populate="0")
        assert again.info.table_id == store.info.table_id and again.info.reads == "mmap"
    assert Table.open(tmp_path / "pool").verify() and left_beside(tmp_path / "pool") == {"gone"}


def test_rows_are_read_as_numbers_from_the_pool(tmp_path, source):
    path, expected = source
    ids, out = np.array([[3, 19_000], [4096, 3]]), np.full((2, 2, 64), np.nan, np.float32)
    read(opened(tmp_path / "pool", path), ids, F32, out)
    np.testing.assert_array_equal(out.view(np.uint8).reshape(2, 2, 256), expected[ids])


def test_a_pool_of_another_table_is_refused_and_stays(tmp_path, source):
    opened(tmp_path / "pool", source[0]).close()
    sealed(tmp_path / "other", F32)
    with pytest.raises(
        DigestMismatch, match=r"pool .*pool: expected table [0-9a-f]{32} of .*other, found table"
    ):
        opened(tmp_path / "pool", tmp_path / "other")
    with Table.open(source[0], "w").writing(LAYER, [0]):
        pass
    with pytest.raises(TableError, match="not sealed"):
        opened(tmp_path / "pool", source[0])
    assert opened(tmp_path / "pool").info.table_id == Manifest.read(source[0]).table_id


def test_a_pool_that_is_not_there_is_not_opened_without_a_source(tmp_path, source):
    for path in (tmp_path / "pool", tmp_path / "no" / "folder"):
        with pytest.raises(StoreError, match="found none; from=DIR fills it"):
            opened(path)
    with pytest.raises(StoreError, match="cannot be filled .*No such file"):
        opened(tmp_path / "no" / "folder", source[0])
    with pytest.raises(TableError, match="found no file"):
        opened(tmp_path / "pool", tmp_path / "none")
    assert left_beside(tmp_path / "pool") == set()


def test_an_empty_folder_is_filled_and_one_in_use_is_left_alone(tmp_path, source):
    (tmp_path / "pool").mkdir()
    opened(tmp_path / "pool", source[0]).close()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    with pytest.raises(StoreError, match="taken: expected a new or empty directory"):
        opened(tmp_path / "taken", source[0])
    assert [each.name for each in (tmp_path / "taken").iterdir()] == ["mine"]
    assert left_beside(tmp_path / "taken") == {"pool", ".pool.lock"}


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("pool:", {}),
        ("pool:?from=x", {}),
        ("pool:x?from=", {}),
        ("pool:x?form=y", {}),
        ("pool:x?populate=2", {}),
        ("pool:x?read=mmap", {}),
        ("pool:x", {"mode": "w"}),
        ("pool:x", {"rows": 4}),
        ("pool:x", {"row_bytes": 4}),
        ("pool:x", {"layer": None}),
    ],
)
def test_urls_that_cannot_be_meant_are_refused(url, arguments):
    with pytest.raises(ConfigError, match="expected"):
        open_store(url, **{"layer": LAYER, **arguments})


def test_a_layer_that_the_table_does_not_have_is_refused_before_the_copy(tmp_path, source):
    with pytest.raises(ConfigError, match="2"):
        opened(tmp_path / "pool", source[0], layer=2)
    assert not (tmp_path / "pool").exists()


def test_rows_never_written_are_zero_and_have_their_space(tmp_path):
    create(tmp_path / "source", F32, rows=5000).seal()
    store = opened(tmp_path / "pool", tmp_path / "source")
    assert not store.gather(np.arange(0, store.info.rows, 7)).any()
    for shard in (tmp_path / "pool").glob("*.safetensors"):
        assert (
            shard.stat().st_blocks * 512 >= shard.stat().st_size
            and not shard.stat().st_mode & 0o222
        )


def test_closing_gives_everything_back(tmp_path, source):
    opened(tmp_path / "pool", source[0]).close()
    before = open_fds()
    for _ in range(50):
        opened(tmp_path / "pool", source[0]).close()
    assert open_fds() == before and mappings_of(tmp_path) == 0


# What is half made or damaged.


def test_a_copy_that_fails_leaves_nothing(tmp_path, source, monkeypatch):
    real = os.sendfile

    def write_beside(*arguments):
        Table.open(source[0], "w").close()  # opened for writing, not sealed
        monkeypatch.setattr(os, "sendfile", real)
        return real(*arguments)

    monkeypatch.setattr(os, "sendfile", write_beside)
    before = open_fds()
    with pytest.raises(TableError, match="to stay unchanged while it is copied to a pool"):
        opened(tmp_path / "pool", source[0])
    assert (
        left_beside(tmp_path / "pool") == set()
        and not (tmp_path / "pool").exists()
        and open_fds() == before
    )
    Table.open(source[0], "w").seal()

    def shorten(out, fd, *rest):
        os.truncate(next(source[0].glob("layer-00001-00001*")), 9000)
        return 0

    monkeypatch.setattr(os, "sendfile", shorten)
    with pytest.raises(ShardTruncated, match="found 9000"):
        opened(tmp_path / "pool", source[0])
    assert left_beside(tmp_path / "pool") == set()


def test_a_pool_that_lost_a_shard_is_refused(tmp_path, source):
    opened(tmp_path / "pool", source[0]).close()
    next((tmp_path / "pool").glob("layer-00001-*")).unlink()
    with pytest.raises(EngraphyError):
        opened(tmp_path / "pool", source[0])


FILL = """
import os, signal, sys
from pathlib import Path
from engraphy.store import open_store, pool
path, source, shards = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real, done = pool._copy_data, []
def copy(*arguments):
    if len(done) == shards:
        names = sorted(other.name for other in path.parent.iterdir() if "pool" in other.name)
        print("half", names, flush=True)
        if sys.argv[4] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.stdin.readline()
    real(*arguments)
    done.append(1)
pool._copy_data = copy
store = open_store(f"pool:{path}?from={source}", layer=3)
print(len(done), store.gather(__import__("numpy").arange(store.info.rows)).sum(), flush=True)
"""


def filler(path: Path, source: Path, shards: int, then: str) -> subprocess.Popen[str]:
    """A process that stops filling a pool after some shards, to die or to wait for a line."""
    return subprocess.Popen(
        [sys.executable, "-c", FILL, str(path), str(source), str(shards), then],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_process_killed_halfway_leaves_no_pool_and_the_next_begins_anew(tmp_path, source):
    for _ in range(2):
        killed = filler(tmp_path / "pool", source[0], 3, "die")
        assert re.search(
            r"half \['\.pool\.[0-9a-f]{8}\.engraphy-part', '\.pool\.lock'\]",
            killed.communicate()[0],
        )
        assert killed.returncode == -signal.SIGKILL
        with pytest.raises(StoreError, match="found none"):
            opened(tmp_path / "pool")
    store = opened(tmp_path / "pool", source[0])
    np.testing.assert_array_equal(store.gather(np.arange(len(source[1]))), source[1])
    assert left_beside(tmp_path / "pool") == set()


@pytest.mark.slow
def test_processes_that_come_while_it_is_filled_wait_and_one_fills_it(tmp_path, source):
    first = filler(tmp_path / "pool", source[0], 2, "wait")
    assert first.stdout and first.stdout.readline().startswith("half")
    with pytest.raises(StoreError, match="found none"):  # nobody is served half a pool
        opened(tmp_path / "pool")
    others = [filler(tmp_path / "pool", source[0], 99, "wait") for _ in range(2)]
    with pytest.raises(subprocess.TimeoutExpired):
        others[0].wait(1.5)
    copied = [process.communicate("go\n")[0].split()[-2:] for process in (first, *others)]
    total = str(source[1].sum())
    assert copied == [["10", total], ["0", total], ["0", total]]


# Many processes.


SHARE = """
import sys
from pathlib import Path
from engraphy.store import open_store
store = open_store(f"pool:{sys.argv[1]}", layer=3)
print("ready", flush=True)
sys.stdin.readline()
sizes, ours = {"Rss:": 0, "Pss:": 0}, False
for words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
    if "-" in words[0]:
        ours = words[-1].startswith(sys.argv[1])
    elif ours and words[0] in sizes:
        sizes[words[0]] += int(words[1]) * 1024
print(sizes["Rss:"], sizes["Pss:"], flush=True)
sys.stdin.readline()
"""


def test_processes_share_one_copy(tmp_path, source):
    opened(tmp_path / "pool", source[0]).close()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, str(tmp_path / "pool")],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    sizes = []
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
        sizes.append([int(word) for word in process.stdout.readline().split()])
    for process in processes:
        process.communicate("\n")
    size = source[1].nbytes
    assert all(rss >= size for rss, _ in sizes)
    assert 0.9 * size <= sum(pss for _, pss in sizes) <= 1.2 * size


FULL = """
import subprocess, sys
from engraphy.errors import StoreError
from engraphy.store import open_store
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", sys.argv[2]], check=True)
try:
    open_store(f"pool:{sys.argv[2]}/pool?from={sys.argv[1]}", layer=3)
except StoreError as error:
    print(error, flush=True)  # before what ls prints
subprocess.run(["ls", "-A", sys.argv[2]])
subprocess.run(["mount", "-o", "remount,size=16m", sys.argv[2]], check=True)
store = open_store(f"pool:{sys.argv[2]}/pool?from={sys.argv[1]}", layer=3)
print(store.gather(__import__("numpy").arange(store.info.rows)).sum())
"""


def test_a_pool_without_room_is_an_error_and_leaves_nothing(tmp_path, source):
    (tmp_path / "memory").mkdir()
    run = in_own_namespace(FULL, str(source[0]), str(tmp_path / "memory"))
    assert run.returncode == 0, run.stderr
    error, left, total = run.stdout.splitlines()
    assert (
        "there is no room for it" in error
        and left == ".pool.lock"
        and total == str(source[1].sum())
    )


def test_what_is_copied_is_all_of_a_file_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_STEP", 1000)
    with open(tmp_path / "from", "wb") as file:
        file.truncate(1 << 20)
        for at in (5, 70_000, 300_000, (1 << 20) - 3):
            file.seek(at)
            file.write(b"abc")
    content = (tmp_path / "from").read_bytes()
    (tmp_path / "to").write_bytes(bytes(1 << 20))
    fd = os.open(tmp_path / "from", os.O_RDONLY)
    pool._copy_data(fd, 1 << 20, tmp_path / "to")
    os.close(fd)
    assert (tmp_path / "to").read_bytes() == content
