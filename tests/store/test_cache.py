"""The row cache gives the rows of the store behind it, whatever is read and written, and keeps
those that are read.

All of it is true of the plain version and of the native one.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engraphy import _native
from engraphy.errors import ConfigError, InputError, RowOutOfRange, StoreError
from engraphy.rows import RowFormat, read
from engraphy.store import RamStore, RowStore, StoreInfo, open_store
from engraphy.store.cache import CacheStore
from engraphy.store.options import parse_size
from engraphy.store.reload import ReloadableStore
from engraphy.store.sets import GHOSTS, SMALL, WAYS, place, set_bytes
from engraphy.store.testing.tools import fork
from engraphy.table import Table
from tests.tools.store_builders import LAYER, sealed, shards_of

WIDTH = 12
SET_BYTES = set_bytes(WIDTH)  # what one set of 16 rows takes


@pytest.fixture(autouse=True, scope="module", params=["off", "auto"] if _native.core else ["off"])
def version(request):
    with _native.forced(request.param):
        yield


class Behind(RowStore):
    """A store that is not mapped, remembers what it was asked for, and can be told what to do
    meanwhile."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows_NR = np.random.default_rng(0).integers(0, 256, (rows, WIDTH), np.uint8)
        self.asked: list[list[int]] = []
        self.after_read: Callable[[], None] = lambda: None
        self.fails_after: int | None = None

    @property
    def info(self) -> StoreInfo:
        return StoreInfo("behind", *self.rows_NR.shape, writable=True)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        self.asked.append(ids_N.tolist())
        out_NR[...] = self.rows_NR[ids_N]
        self.after_read()

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        self.rows_NR[ids_N[: self.fails_after]] = rows_NR[: self.fails_after]
        if self.fails_after is not None:
            raise StoreError("the disk is full")


def cached(rows: int = 400, sets: int = 3) -> tuple[CacheStore, Behind]:
    behind = Behind(rows)
    cache = CacheStore(behind, sets * SET_BYTES)
    cache._sets.rows[...] = 0xA5  # what is not written must not be seen
    return cache, behind


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def records(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, WIDTH), np.uint8)


# Exact.


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 39), max_size=30), st.integers(0, 2**32)),
        max_size=25,
    ),
    st.integers(1, 3),
)
def test_gathers_and_scatters_in_any_order_see_what_a_dict_would_hold(steps, sets):
    cache, behind = cached(40, sets)
    expected = {row: bytes(record) for row, record in enumerate(behind.rows_NR)}
    for writes, chosen, seed in steps:
        if writes:
            new = records(len(chosen), seed)
            cache.scatter(ids(*chosen), new)
            expected |= {row: bytes(record) for row, record in zip(chosen, new, strict=True)}
        else:
            found = cache.gather(ids(*chosen))
            assert [bytes(record) for record in found] == [expected[row] for row in chosen]
    assert [bytes(record) for record in behind.rows_NR] == list(expected.values())


def test_a_cache_smaller_and_one_larger_than_the_table_give_the_same_rows():
    rng = np.random.default_rng(1)
    for sets in (1, 5, 200):
        cache, behind = cached(2000, sets)
        for _ in range(60):
            chosen = rng.zipf(1.2, rng.integers(0, 400)) % 2000
            np.testing.assert_array_equal(cache.gather(chosen), behind.rows_NR[chosen])
        kept = cache.kept()
        assert len(np.unique(kept)) == len(kept) <= cache.capacity


def test_numbers_read_through_a_cache_are_those_of_the_store():
    fmt = RowFormat("int8", WIDTH - 2)
    ram = RamStore(300, WIDTH)
    ram.scatter(
        np.arange(300),
        fmt.encode(np.random.default_rng(0).standard_normal((300, fmt.d), np.float32)),
    )
    cache = CacheStore(ram, 4 * SET_BYTES)
    for seed in range(20):
        chosen = np.random.default_rng(seed).integers(0, 300, (2, 5, 7))
        expected = read(ram, chosen, fmt, np.empty((2, 5, 7 * fmt.d), np.float32))
        found = read(cache, chosen, fmt, np.full((2, 5, 7 * fmt.d), np.nan, np.float32))
        assert found.tobytes() == expected.tobytes()
    assert shards_of(cache) is None and cache.stats.hits


def test_rows_written_while_others_read_are_never_seen_torn_or_old():
    """Each writer owns some rows and finds what it wrote last; a row is its number, a count that
    grows, and both once more."""
    rows, wrong = 64, []
    behind = Behind(rows)
    numbers = np.arange(rows)
    behind.rows_NR[...] = encoded(numbers, 0)
    cache = CacheStore(behind, 2 * SET_BYTES)

    def write(first: int) -> None:
        own = numbers[first::4]
        for count in range(1, 120):
            chosen = np.random.default_rng(count).choice(own, 5)
            cache.scatter(chosen, encoded(chosen, count))
            if not np.array_equal(cache.gather(chosen), encoded(chosen, count)):
                wrong.append(("written", first, count))

    def look(seed: int) -> None:
        newest, rng = np.zeros(rows, int), np.random.default_rng(seed)
        for _ in range(300):
            chosen = np.unique(rng.integers(0, rows, 20))
            found = cache.gather(chosen)
            count = found[:, 4].astype(int)
            if not np.array_equal(found, encoded(chosen, count)) or (count < newest[chosen]).any():
                wrong.append(("read", seed))
            newest[chosen] = count

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    threads += [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    np.testing.assert_array_equal(cache.gather(numbers), behind.rows_NR)


def encoded(numbers: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    made = np.zeros((len(numbers), WIDTH), np.uint8)
    made[:, 0] = made[:, 8] = numbers
    made[:, 4] = made[:, 11] = count
    return made


def test_a_row_that_is_written_while_it_is_read_is_not_kept_as_it_was():
    cache, behind = cached()
    new = records(1, 5)

    def write() -> None:
        behind.after_read = lambda: None
        cache.scatter(ids(7), new)

    behind.after_read = write
    cache.gather(ids(7))
    np.testing.assert_array_equal(cache.gather(ids(7)), new)
    np.testing.assert_array_equal(cache.gather(ids(7)), new)


def test_two_readers_that_miss_the_same_row_leave_it_in_the_cache_once():
    cache, behind = cached()

    def read_too() -> None:
        behind.after_read = lambda: None
        cache.gather(ids(7, 8))

    behind.after_read = read_too
    cache.gather(ids(7, 9))
    kept = cache.kept().tolist()
    assert sorted(kept) == sorted(set(kept)) and {7, 8} <= set(kept)


def test_after_a_write_that_failed_half_way_the_cache_says_what_the_store_says():
    cache, behind = cached()
    chosen = np.arange(10)
    cache.gather(chosen)
    behind.fails_after = 4
    with pytest.raises(StoreError, match="disk is full"):
        cache.scatter(chosen, records(10, 3))
    np.testing.assert_array_equal(behind.rows_NR[:4], records(10, 3)[:4])
    np.testing.assert_array_equal(cache.gather(chosen), behind.rows_NR[chosen])


def test_written_rows_are_updated_where_they_are_kept():
    cache, behind = cached()
    cache.gather(ids(1, 2))
    cache.scatter(ids(1, 3, 1), records(3, 4))
    behind.asked.clear()
    np.testing.assert_array_equal(cache.gather(ids(1, 2)), [records(3, 4)[2], behind.rows_NR[2]])
    assert not behind.asked and 3 not in cache.kept()


# What is kept.


class Model:
    """One set as queues of Python: S3-FIFO with a small queue that may fill what the main one does
    not."""

    def __init__(self) -> None:
        self.small, self.main, self.ghosts = deque[int](), deque[int](), deque[int](maxlen=GHOSTS)
        self.reads: dict[int, int] = {}

    def ask(self, row: int) -> None:
        if row in self.reads:
            self.reads[row] = min(self.reads[row] + 1, 3)
            return
        known = row in self.ghosts
        if known:  # its place among the ghosts stays empty until its turn comes
            self.ghosts[self.ghosts.index(row)] = -1
        while len(self.reads) == WAYS:
            queue = self.small if len(self.small) >= SMALL else self.main
            oldest = queue.popleft()
            if self.reads[oldest]:
                self.reads[oldest] = 0 if queue is self.small else self.reads[oldest] - 1
                self.main.append(oldest)
            else:
                del self.reads[oldest]
                if queue is self.small:
                    self.ghosts.append(oldest)
        (self.main if known else self.small).append(row)
        self.reads[row] = 0


@pytest.mark.parametrize("exponent", [1.1, 1.5, 2.5])
def test_each_set_keeps_what_the_policy_keeps(exponent):
    cache, _ = cached(300, 3)
    set_N, print_N = place(np.arange(300), 3)
    assert (
        len({*zip(set_N.tolist(), print_N.tolist(), strict=True)}) == 300
    )  # the policy's ghosts mistake no row
    models = [Model() for _ in range(3)]
    rng = np.random.default_rng(2)
    for _ in range(2000):
        row = int(rng.zipf(exponent) % 300)
        cache.gather(ids(row))
        models[set_N[row]].ask(row)
        assert set(cache.kept().tolist()) == {kept for model in models for kept in model.reads}


def test_nothing_leaves_while_its_set_has_room():
    cache, _ = cached(400, 20)
    cache.gather(np.arange(200))
    found = np.bincount(place(np.arange(200), 20).set_N, minlength=20)
    assert len(cache.kept()) == np.minimum(found, WAYS).sum() >= 190


def test_rows_read_often_outlive_a_scan_of_many_times_the_cache():
    cache, _ = cached(40_000, 64)
    often = np.arange(300)
    for _ in range(4):
        for first in range(0, 300, 30):
            cache.gather(often[first : first + 30])
    for first in range(1000, 31_000, 500):
        cache.gather(np.arange(first, first + 500))
    assert np.isin(often, cache.kept()).mean() > 0.9


def test_kept_rows_come_with_the_most_read_first():
    cache, _ = cached(400, 1)
    cache.gather(np.arange(16))
    for _ in range(2):
        cache.gather(ids(11))
    cache.gather(ids(100, 101, 102))
    assert cache.kept()[0] == 11


def test_all_that_it_keeps_stays_within_the_budget():
    for budget in (SET_BYTES, 10 * SET_BYTES - 1, 123_456):
        cache = CacheStore(Behind(400), budget)
        assert budget - SET_BYTES < cache._sets.memory.nbytes <= budget
        assert cache.capacity == budget // SET_BYTES * WAYS


# Counting and refusing.


def test_each_missing_row_is_read_once_a_call_and_every_row_is_counted():
    cache, behind = cached()
    cache.gather(ids(5, 9, 5, 5))
    cache.gather(ids(9, 3, 9))
    assert behind.asked == [[5, 9], [3]]
    stats = cache.stats
    assert (stats.gathers, stats.rows, stats.bytes, stats.hits, stats.misses) == (
        2,
        7,
        7 * WIDTH,
        4,
        3,
    )
    assert stats.hit_rate == 4 / 7 and behind.stats.rows == 3


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (ids(1, 400), RowOutOfRange),
        (ids(-1), RowOutOfRange),
        (np.array([1, 2], np.int32), InputError),
        (ids(1)[None], InputError),
        ([1], InputError),
    ],
)
def test_wrong_ids_are_refused_before_anything_is_asked(wrong, error):
    cache, behind = cached()
    for use in (
        lambda: cache.gather(wrong),
        lambda: cache.scatter(wrong, records(np.size(wrong), 0)),
    ):
        with pytest.raises(error):
            use()
    assert (
        not behind.asked and cache.stats.hits == cache.stats.misses == 0 and not len(cache.kept())
    )


def test_a_store_whose_ids_do_not_fit_the_tags_is_refused():
    class Huge(Behind):
        @property
        def info(self):
            return StoreInfo("behind", 2**31 - 1, WIDTH, writable=True)

    with pytest.raises(ConfigError, match="at most 2147483646 rows, found 2147483647"):
        CacheStore(Huge(10), 10 * SET_BYTES)


@pytest.mark.parametrize("budget", [0, SET_BYTES - 1, -5, True, 1e9, "2GiB", None])
def test_a_budget_below_one_set_is_refused(budget):
    with pytest.raises(ConfigError, match=f"{SET_BYTES} bytes or more"):
        CacheStore(Behind(10), budget)


@pytest.mark.parametrize("mode", ["r", "w"])
def test_a_url_puts_a_cache_in_front_of_a_table(tmp_path, mode):
    expected = sealed(tmp_path / "table")
    store = open_store(f"file:{tmp_path / 'table'}?read=pread&cache=64KiB", layer=LAYER, mode=mode)
    chosen = np.arange(len(expected))
    for _ in range(2):
        np.testing.assert_array_equal(store.gather(chosen), expected)
    assert isinstance(store, CacheStore) and store.stats.hits and store.info.kind == "file"
    store.close()
    Table.open(tmp_path / "table", "w").close()  # nothing is left open


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("1.5MiB", 3 * 2**19), ("64KiB", 2**16), ("5000", 5000)]
)
def test_sizes_in_urls_are_in_binary_units(text, size):
    assert parse_size("file:x", text) == size


@pytest.mark.parametrize(
    "text", ["", "2GB", "2 GiB", "-1", "1e9", "GiB", ".5GiB", "2gib", "0", "100"]
)
def test_sizes_that_cannot_be_meant_are_refused_and_leave_no_table_open(tmp_path, text):
    sealed(tmp_path / "table")
    with pytest.raises(ConfigError, match="expected a (size|budget)"):
        open_store(f"file:{tmp_path / 'table'}?cache={text}", layer=LAYER, mode="w")
    Table.open(tmp_path / "table", "w").close()


def test_a_cache_around_a_store_that_may_be_exchanged_is_refused():
    with pytest.raises(ConfigError, match="around each table"):
        CacheStore(ReloadableStore(Behind(10)), SET_BYTES)


def test_closing_closes_the_store_behind_it_too():
    cache, behind = cached()
    cache.gather(ids(1))
    cache.close()
    cache.close()
    for use in (
        lambda: cache.gather(ids(1)),
        lambda: behind.gather(ids(1)),
        cache.kept,
        lambda: cache.scatter(ids(1), records(1, 0)),
    ):
        with pytest.raises(StoreError, match="closed"):
            use()
    assert cache.stats.misses == 1 and cache.info.rows == 400


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("amid", ["nothing", "a change", "a write"])
def test_a_forked_child_reads_the_right_rows_whatever_other_threads_were_doing(amid):
    cache, behind = cached()
    cache.gather(np.arange(20))
    if amid == "a write":  # as if a thread had written to the store, and not yet to the cache
        cache._writer.acquire()
        behind.rows_NR[:5] = 7
    if amid == "a change":  # or were half-way through one of the cache
        cache._sets.lock.acquire()
        behind._counters._lock.acquire()
        cache._sets.rows[...] = 0xA5
    child = fork()
    if not child:
        signal.alarm(20)  # a lock that nobody will ever open ends it
        right = np.array_equal(cache.gather(np.arange(30)), behind.rows_NR[:30])
        cache.scatter(ids(1), records(1, 9))
        right &= np.array_equal(cache.gather(ids(1)), records(1, 9))
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
