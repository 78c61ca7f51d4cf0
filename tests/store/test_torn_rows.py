"""No reader sees a torn row, or rows of two tables in one call, while tables are exchanged.

The bytes of a row follow from its id and the table's epoch, and end in a checksum of both.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engraphy.store import ReloadableStore, RowStore, open_store, publish_pool
from engraphy.store.testing.tools import in_children
from tests.tools.store_builders import LAYER, create, fmt_of

FMT = fmt_of("f32", 64)  # 256 bytes
EPOCHS = 3
HOT = 64
READERS = 3
PATIENCE = 60  # seconds
CACHES = ["", "cache=256KiB"]


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def records(ids_N: np.ndarray, epoch: int) -> np.ndarray:
    """uint8 [N, 256]: 252 bytes that follow from id and epoch, and their CRC."""
    rows_NR = np.empty((len(ids_N), FMT.row_bytes), np.uint8)
    for row_R, row_id in zip(rows_NR, ids_N.tolist(), strict=True):
        words = np.random.default_rng([row_id, epoch]).integers(0, 2**32, 61, np.uint32)
        body = np.array([row_id, epoch], np.uint32).tobytes() + words.tobytes()
        row_R[:252] = np.frombuffer(body, np.uint8)
        row_R[252:] = np.frombuffer(np.uint32(zlib.crc32(row_R[:252])).tobytes(), np.uint8)
    return rows_NR


def epoch_of(rows_NR: np.ndarray, ids_N: np.ndarray) -> int:
    """The epoch that all rows of a call have. Raises ValueError if one is torn or of another."""
    words_NW = rows_NR.view(np.uint32)
    epoch = int(words_NW[0, 1])
    whole = [zlib.crc32(row[:252]) == int(row[252:].view(np.uint32)[0]) for row in rows_NR]
    if not all(whole) or (words_NW[:, 0] != ids_N).any() or (words_NW[:, 1] != epoch).any():
        raise ValueError(f"torn: {words_NW[:, :2].tolist()}")
    return epoch


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> list[Path]:
    """A table and what it became by more seals: the same addresses, other rows."""
    paths = [tmp_path_factory.mktemp("tables") / str(epoch) for epoch in range(EPOCHS)]
    for epoch, path in enumerate(paths):
        table = create(path, FMT, 50, 100)
        table.write_rows(LAYER, 0, records(np.arange(table.rows(LAYER)), epoch))
        table.seal()
    return paths


def read(store: RowStore, rng: np.random.Generator) -> int:
    """Reads some of the hot rows in one call. Returns their epoch."""
    hot = np.random.default_rng(0).choice(store.info.rows, HOT, replace=False)
    ids = rng.choice(hot, int(rng.integers(1, 60)))
    return epoch_of(store.gather(ids), ids)


def read_meanwhile(store: RowStore, exchange: Callable[[], None], last: int) -> None:
    """Threads read while `exchange` runs, and until each has seen epoch `last`."""
    ends = time.monotonic() + PATIENCE
    seen: list[list[int]] = [[0] for _ in range(READERS)]
    errors: list[BaseException] = []
    exchanged = threading.Event()

    def one(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            while not (exchanged.is_set() and seen[number][-1] == last):
                seen[number].append(read(store, rng))
                assert time.monotonic() < ends
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=one, args=(number,)) for number in range(READERS)]
    for reader in readers:
        reader.start()
    exchange()
    exchanged.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert all(epochs == sorted(epochs) for epochs in seen)  # nobody goes back to an older table


def test_a_torn_row_and_rows_of_two_epochs_are_told():
    ids = np.arange(5)
    rows = records(ids, 1)
    assert epoch_of(rows, ids) == 1
    torn = rows.copy()
    torn[2, 100:] = records(ids, 2)[2, 100:]
    mixed = rows.copy()
    mixed[3] = records(ids, 2)[3]
    for wrong, order in ((torn, ids), (mixed, ids), (rows, ids[::-1])):
        with pytest.raises(ValueError, match="torn"):
            epoch_of(wrong, order)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["file", "file pread", "pool"])
def test_threads_see_whole_rows_of_one_table_in_each_call_while_it_is_exchanged(
    tables, tmp_path, kind, cache
):
    def opened(epoch: int) -> RowStore:
        if kind == "pool":
            publish_pool(tables[epoch], tmp_path / "pool")
        where = f"pool:{tmp_path / 'pool'}" if kind == "pool" else f"file:{tables[epoch]}"
        options = [option for option in ("read=pread" * kind.endswith("pread"), cache) if option]
        return open_store(f"{where}?{'&'.join(options)}".rstrip("?"), layer=LAYER)

    store = ReloadableStore(opened(0))

    def exchange() -> None:
        for epoch in range(1, EPOCHS):
            store.reload(opened(epoch))
            time.sleep(0.02)

    read_meanwhile(store, exchange, EPOCHS - 1)
    store.close()


def test_threads_see_whole_rows_while_the_rows_of_a_cache_are_pinned(tables):
    store = ReloadableStore(open_store(f"file:{tables[0]}?cache=64KiB", layer=LAYER))

    def exchange() -> None:
        for _ in range(5):
            store.inner.pin(np.random.default_rng(0).permutation(store.info.rows))

    read_meanwhile(store, exchange, 0)
    store.close()


def test_processes_see_whole_rows_of_one_epoch_while_the_next_is_published(tables, tmp_path):
    """Who has a pool open ends on its epoch. Who opens it anew has the newest, whole."""
    pool, done = tmp_path / "pool", tmp_path / "done"
    publish_pool(tables[0], pool)

    def reader(number: int) -> None:
        rng, epochs, finished = np.random.default_rng(number), [0], False
        while not finished:
            finished = done.exists()
            store = open_store(f"pool:{pool}", layer=LAYER)
            seen = {read(store, rng) for _ in range(5)}
            assert seen == {store.header.epoch - 1}
            epochs += seen
            store.close()
        assert epochs == sorted(epochs) and epochs[-1] == EPOCHS - 1

    def publisher() -> None:
        for epoch in range(1, EPOCHS):
            time.sleep(0.03)
            publish_pool(tables[epoch], pool)
        done.touch()

    in_children([publisher, *(functools.partial(reader, number) for number in range(READERS))])
