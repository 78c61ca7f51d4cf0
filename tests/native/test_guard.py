"""A mapped file that shrinks while it is read is an error of the read; a fault of anybody else is
theirs, as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from engraphy import _native
from engraphy.errors import ShardTruncated
from engraphy.store import mapping, open_store
from tests.tools.paths import ROOT
from tests.tools.store_builders import LAYER, fmt_of, in_own_namespace, sealed

pytestmark = pytest.mark.skipif(_native.core is None, reason=_native.reason)

F32 = fmt_of("f32", 64)
PRELUDE = """
import ctypes, faulthandler, mmap, os, signal, sys, threading, time
import numpy as np
from pathlib import Path
path = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from tests.tools.store_builders import fmt_of
from engraphy.errors import EngraphyError, ShardTruncated, StoreError
from engraphy.rows import read
from engraphy.store import mapping, open_store
from engraphy import _native

def opened(mode="r", layer=3):
    store = open_store(f"file:{path}?read=mmap", layer=layer, mode=mode)
    store.gather(np.array([0]))  # the sizes have been looked at
    return store

def foreign():
    "Memory of a file that lost its only page; nobody guards it."
    with open(path.parent / "foreign", "w+b") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
    return memory

def cut(number):
    os.truncate(sorted(path.glob("layer-00003-*"))[number], 4096)
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    return tmp_path / "table", sealed(tmp_path / "table", F32, shard_rows=4096, rows=5000)


def run(table, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(table[0]), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def printed(table, code: str) -> list[str]:
    found = run(table, code)
    assert found.returncode == 0, (found.returncode, found.stderr)
    return found.stdout.split()


# What is ours.


def test_a_shard_cut_after_the_look_is_an_error_of_every_way_to_read(table):
    """Each batch meets many missing pages, in more than one thread."""
    assert printed(
        table,
        """
_native.set_threads(4)
ids = np.random.default_rng(0).integers(0, 20_000, 10_000)
uses = {
    "gather": lambda store: store.gather(ids),
    "read": lambda store: read(store, ids, fmt_of("f32", 64), np.empty((10_000, 64), np.float32)),
    "one": lambda store: store.gather(np.array([5000])),
}
mapping._LOOK_EVERY = 1000
stores = {name: opened() for name in uses}
cut(1)
for name, use in uses.items():
    for _ in range(2):
        try:
            use(stores[name])
        except ShardTruncated as error:
            sizes = "expected 1052672 bytes, found 4096"
            print(name, sizes in str(error) and "00002-of" in str(error))
    print(stores[name].stats.gathers)
""",
    ) == [word for name in ("gather", "read", "one") for word in (name, "True", name, "True", "1")]


def test_a_shard_cut_while_it_is_written_is_an_error_of_the_write(table):
    assert printed(
        table,
        """
mapping._LOOK_EVERY = 1000
store = opened("w")
cut(1)
try:
    store.scatter(np.array([1, 5000]), np.zeros((2, 256), np.uint8))
except ShardTruncated as error:
    print("found 4096" in str(error), sorted(path.glob("layer-00003-*"))[1].stat().st_size)
""",
    ) == ["True", "4096"]


def test_no_zeros_are_handed_out_while_shards_are_cut(table):
    assert printed(
        table,
        """
_native.set_threads(2)
expected = open_store(f"file:{path}?read=mmap", layer=3).gather(np.arange(20_000))
stores, wrong, truncated = [opened() for _ in range(4)], [], []
def work(seed):
    rng = np.random.default_rng(seed)
    while True:
        ids = rng.integers(0, 20_000, int(rng.integers(1, 9000)))
        try:
            if not np.array_equal(stores[seed].gather(ids), expected[ids]):
                return wrong.append(seed)
        except ShardTruncated:
            return truncated.append(seed)
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for thread in threads: thread.start()
time.sleep(0.2)
for number in range(5): cut(number)
for thread in threads: thread.join()
print(len(wrong), len(truncated))
""",
    ) == ["0", "4"]


def test_damage_to_one_store_is_not_taken_for_damage_to_another(table):
    assert printed(
        table,
        """
mapping._LOOK_EVERY = 1000
damaged, other = opened(), opened(layer=1)
cut(0)
print(damaged.pinned[0][:4000].any(), _native.core.damage_count())  # past the store: zeros
for store in (damaged, other, damaged):
    try:
        print(len(store.gather(np.array([0, 9]))))
    except ShardTruncated:
        print("truncated")
""",
    ) == ["False", "1", "truncated", "2", "truncated"]


def test_a_forked_child_and_its_parent_both_find_out(table):
    assert printed(
        table,
        """
mapping._LOOK_EVERY = 1000
store = opened()
child = os.fork()
if child: time.sleep(0.2)
else: cut(2)
try:
    store.gather(np.arange(0, 20_000, 3))
except ShardTruncated:
    print("child" if not child else "parent", flush=True)
if child: print(os.waitpid(child, 0)[1])
""",
    ) == ["child", "parent", "0"]


FULL_DISK = """
import subprocess, sys
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=True)
sys.path.insert(0, sys.argv[2])
import numpy as np
from pathlib import Path
from tests.tools.store_builders import create, fmt_of, records
from engraphy.errors import StoreError
from engraphy.store import mapping, open_store
create(Path(folder) / "table", fmt_of("f32", 64), shard_rows=4096, rows=5000).seal()
store = open_store(f"file:{folder}/table?read=mmap", layer=3, mode="w")
mapping.Reserved.take = lambda *_: None  # a file system that breaks its promise
try:
    store.scatter(np.arange(store.info.rows), records(fmt_of("f32", 64), store.info.rows))
except StoreError as error:
    print(error)
"""


def test_a_disk_that_is_full_in_spite_of_its_promise_is_an_error(tmp_path):
    found = in_own_namespace(FULL_DISK, str(tmp_path), str(ROOT))
    assert found.returncode == 0 and "or had no space for one" in found.stdout, found.stderr


# What is not ours.


@pytest.mark.parametrize(
    "before", ["", "faulthandler.enable()", "signal.signal(signal.SIGBUS, signal.SIG_IGN)"]
)
def test_a_fault_in_memory_of_others_ends_the_process_as_it_would_have(table, before):
    found = run(
        table,
        f"""
{before}
store = opened()
memory = foreign()
print("touching", flush=True)
memory[0]
""",
    )
    assert found.returncode == -signal.SIGBUS and found.stdout == "touching\n"
    assert ("Fatal Python error: Bus error" in found.stderr) == ("faulthandler" in before)


def test_a_handler_that_was_there_before_still_gets_what_is_not_ours(table):
    found = run(
        table,
        """
libc, handler = ctypes.CDLL(None), ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: os._exit(42))
libc.signal(signal.SIGBUS, handler)
mapping._LOOK_EVERY = 1000
store = opened()
cut(1)
try:
    store.gather(np.array([5000]))
except ShardTruncated:
    print("truncated", flush=True)
foreign()[0]
""",
    )
    assert found.returncode == 42 and found.stdout == "truncated\n", found.stderr


def test_faulthandler_enabled_beforehand_leaves_our_faults_to_us(table):
    assert printed(
        table,
        """
faulthandler.enable()
mapping._LOOK_EVERY = 1000
store = opened()
cut(1)
try:
    store.gather(np.array([5000]))
except ShardTruncated:
    print("truncated")
""",
    ) == ["truncated"]


def test_a_handler_installed_later_is_stepped_before_at_the_next_look_and_none_calls_another_for_ever(  # noqa: E501
    table,
):
    found = run(
        table,
        """
store = opened()
faulthandler.enable()  # passes on to ours, which after the look passes on to it
time.sleep(2 * mapping._LOOK_EVERY)
store.gather(np.array([0]))
mapping._LOOK_EVERY, store._watch._next_look = 1000, time.monotonic() + 1000
cut(1)
try:
    store.gather(np.array([5000]))
except ShardTruncated:
    print("truncated", flush=True)
foreign()[0]
""",
    )
    assert found.returncode == -signal.SIGBUS and found.stdout == "truncated\n"
    assert found.stderr.count("Fatal Python error: Bus error") >= 1


@pytest.mark.parametrize(
    ("before", "ended"),
    [
        ("", -signal.SIGBUS),
        ("signal.signal(signal.SIGBUS, signal.SIG_IGN)", 0),
        ("signal.signal(signal.SIGBUS, lambda *_: os._exit(3))", 3),
    ],
)
def test_the_signal_sent_by_somebody_does_what_it_did(table, before, ended):
    assert (
        run(
            table,
            f"{before}\nstore = opened()\nos.kill(os.getpid(), signal.SIGBUS)\ntime.sleep(0.01)",
        ).returncode
        == ended
    )


def test_what_is_no_longer_guarded_is_not_ours(table):
    found = run(
        table,
        """
store = opened()
memory = foreign()
slot = _native.core.guard(np.frombuffer(memory, np.uint8).ctypes.data, 4096, False)
print(memory[0], _native.core.damaged(slot), flush=True)
_native.core.unguard(slot)
foreign()[0]
""",
    )
    assert found.stdout == "0 True\n" and found.returncode == -signal.SIGBUS


def test_guards_end_with_the_memory(tmp_path):
    expected, core = sealed(tmp_path / "t", shard_rows=7), _native.core
    store = open_store(f"file:{tmp_path / 't'}?read=mmap", layer=LAYER)
    kept = store.pinned[0]
    store.close()
    free = core.guard(0, 1, False)  # the first free slot
    core.unguard(free)
    for _ in range(100):
        store = open_store(f"file:{tmp_path / 't'}?read=mmap", layer=LAYER)
        np.testing.assert_array_equal(store.gather(np.array([3])), expected[[3]])
        store.close()
    assert core.guard(0, 1, False) == free
    core.unguard(free)
    np.testing.assert_array_equal(kept, expected[:7])


def test_the_ends_of_files_are_looked_at_by_one_call_which_leaves_out_what_is_unmapped(tmp_path):
    core = _native.core
    files = []
    for number, last in enumerate((1, 2)):
        path = tmp_path / str(number)
        path.write_bytes(bytes(5000) + bytes([last]))
        with open(path, "rb") as file:
            files.append(mapping.MappedFile(file.fileno(), str(path), 5001))
    ends = core.FileEnds([file.slot for file in files], [file.last_byte for file in files])
    damages = core.damage_count()
    assert ends.whole(damages) and not ends.whole(damages - 1)
    os.truncate(tmp_path / "0", 4500)  # in the last page: the rest of it reads as zeros
    assert not ends.whole(damages) and core.damage_count() == damages
    del files[0]
    assert ends.whole(damages)
    os.truncate(tmp_path / "1", 0)  # the page is gone
    assert not ends.whole(damages) and core.damage_count() == damages + 1
    with pytest.raises(ValueError, match="same files"):
        core.FileEnds([1, 2], [1])


@pytest.mark.parametrize("last", [0, 7])
def test_a_file_that_ends_with_a_zero_is_served_and_missed_when_it_is_cut(tmp_path, last):
    path = tmp_path / "file"
    path.write_bytes(bytes([9]) * 5000 + bytes([last]))
    with open(path, "rb") as file:
        mapped = mapping.MappedFile(file.fileno(), str(path), 5001)
    watch = mapping.Watch([mapped])
    watch.after()
    os.truncate(path, 5000)
    with pytest.raises(ShardTruncated, match="expected 5001 bytes, found 5000"):
        watch.after()
