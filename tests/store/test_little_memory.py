"""With little address space left reading goes on with fewer threads; it never ends the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engraphy import _native
from tests.tools.paths import ROOT
from tests.tools.store_builders import fmt_of, sealed

ENGINES = ("off", "auto") if _native.core else ("off",)
READ = """
import resource, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from tests.tools.store_builders import fmt_of
from engraphy import _native
from engraphy.errors import StoreError
from engraphy.rows import read
from engraphy.store import open_store

def size() -> int:
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))

store = open_store(f"file:{sys.argv[1]}?{sys.argv[4]}", layer=3)
expected = open_store(f"file:{sys.argv[1]}?read=mmap", layer=3).gather(np.arange(20_000))
fmt = fmt_of("f32", 64)
numbers = fmt.decode(expected)
if _native.core is not None:
    _native.set_threads(32)
batches = np.random.default_rng(0).integers(0, 20_000, (3, 9000))
resource.setrlimit(resource.RLIMIT_AS, (size() + (int(sys.argv[3]) << 20), -1))
for ids in batches:
    try:
        assert np.array_equal(store.gather(ids), expected[ids])
        assert np.array_equal(read(store, ids, fmt, np.empty((9000, 64), np.float32)), numbers[ids])
        print("read", end=" ")
    except (MemoryError, StoreError):  # of numpy, for the output; for what is read
        print("no memory", end=" ")
print(len(__import__("os").listdir("/proc/self/task")))
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("little") / "table"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        sealed(path, fmt_of("f32", 64), shard_rows=4096, rows=5000)
    return path


@pytest.mark.parametrize(
    "how", ["read=pread&threads=128", "read=pread&direct=1&threads=1024", "read=mmap"]
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("room", [5, 12, 40, 80])
def test_rows_are_read_with_the_threads_that_can_be_started(table, room, engine, how):
    arguments = [str(table), str(ROOT), str(room), how]
    environment = os.environ | {"ENGRAPHY_NATIVE": "off" if engine == "off" else _native.level()}
    found = subprocess.run(
        [sys.executable, "-c", READ, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert found.returncode == 0, (found.returncode, found.stdout, found.stderr)
    assert found.stdout.count("read") == 3 or room < 40, found.stdout
