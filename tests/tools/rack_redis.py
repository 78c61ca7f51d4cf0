"""Part of `make test-rack`: the suite of every store on rows in a Redis of one's own.

Not collected by pytest by itself: tests/tools/rack.py starts redis-server and names it in REDIS.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from engraphy.errors import StoreError
from engraphy.store import RamStore
from engraphy.store.testing import ReadOnlyStoreTests
from tests.tools.paths import ROOT
from tests.tools.row_servers import free_port

sys.path.insert(0, str(ROOT / "examples" / "other_servers"))

import redis_rows

VARIABLE = "ENGRAPHY_TEST_REDIS"


def missing() -> list[str]:
    """What this part needs and does not find."""
    if shutil.which("redis-server"):
        return []
    return ["the program redis-server (Debian: apt-get install redis-server)"]


def run() -> dict[str, object]:
    """Starts redis-server, and runs this file's tests. Raises AssertionError if one fails."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for(port)
            tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
            done = subprocess.run(
                tests,
                env=os.environ | {VARIABLE: f"127.0.0.1:{port}"},
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
        finally:
            server.terminate()
            server.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return {"the suite of every store on redis-server": done.stdout.splitlines()[-1]}


def wait_for(port: int) -> None:
    """Waits until Redis answers."""
    end = time.monotonic() + 20
    while True:
        try:
            redis_rows.Connection(f"127.0.0.1:{port}").close()
            return
        except OSError:
            assert time.monotonic() < end, "redis-server does not answer"
            time.sleep(0.05)


class TestRedisStore(ReadOnlyStoreTests):
    def make_store(self, rows_NR: np.ndarray, folder: Path) -> redis_rows.RedisStore:
        address = os.environ[VARIABLE]
        with_rows = RamStore(*rows_NR.shape)
        with_rows.scatter(np.arange(len(rows_NR)), rows_NR)
        redis_rows.copy_to_redis(with_rows, address, 3)
        return redis_rows.RedisStore(address, 3)

    def test_rows_in_several_strings_and_a_layer_that_is_not_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_rows, "STRING_BYTES", 7 * 34 + 5)
        store, expected = self.make_filled(tmp_path)
        np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)
        with pytest.raises(StoreError, match="expected layer 5, found no key"):
            redis_rows.RedisStore(os.environ[VARIABLE], 5)
