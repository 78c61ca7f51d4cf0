"""The native cache keeps and forgets what the plain one does; who reads it meanwhile sees no torn
and no old rows."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import _native
from engraphy.errors import StoreError
from engraphy.store import CacheStore, RowStore, StoreInfo
from engraphy.store.sets import MOST_ROWS, SET, WAYS, NativeSets, Sets, set_bytes
from tests.native.test_rows import Guarded
from tests.tools.store_builders import check_in_child

LEVELS = _native.core.levels() if _native.core else ()
pytestmark = pytest.mark.skipif(not LEVELS, reason=_native.reason)
every_level = pytest.mark.parametrize("level", LEVELS)
WIDTHS = (1, 12, 31, 64, 66, 128, 264)
U8, I64 = np.dtype(np.uint8), np.dtype(np.int64)
LARGE = 8 << 20  # bytes: an output from here on is written past the caches


def rows_of(ids_N: np.ndarray, width: int, written: int = 0) -> np.ndarray:
    """What a store would hold, after so many writes: uint8 [N, width]."""
    first_N1 = (ids_N * 37 + (ids_N >> 7) + written * 101)[:, None]
    return ((first_N1 + np.arange(width) * 11) % 251).astype(np.uint8)


class Both:
    """The plain and the native sets, given the same calls. What was looked for may be kept later,
    or never."""

    def __init__(self, count: int, width: int) -> None:
        self.width = width
        self.each = Sets(count, width), NativeSets(_native.core, count, width)
        for sets in self.each:
            sets.rows[...] = 0xA5
        self.missed: list[tuple] = []

    def look(self, ids_N: np.ndarray, skip: int = 0) -> None:
        found = []
        ids = Guarded((len(ids_N),), I64, skip)
        ids.array[...] = ids_N
        for sets in self.each:
            out = Guarded((len(ids_N), self.width), U8, skip)
            missing_M, version_M = sets.look(ids.array, out.array)
            assert out.intact() and len(missing_M) == len(version_M)
            ids_n, first_n, reads_n = np.unique(
                ids_N[missing_M], return_index=True, return_counts=True
            )
            found.append(
                (out.array.tobytes(), missing_M.tolist(), ids_n, version_M[first_n], reads_n)
            )
        assert found[0][:2] == found[1][:2]
        self.missed.append(found[0][2:3] + (found[0][3], found[1][3]) + found[0][4:])

    def keep(self, which: int, written: int) -> None:
        if self.missed:
            ids_n, *version_2n, reads_n = self.missed.pop(which % len(self.missed))
            for sets, version_n in zip(self.each, version_2n, strict=True):
                sets.keep(ids_n, version_n, reads_n, rows_of(ids_n, self.width, written))

    def write(self, ids_N: np.ndarray, written: int, known: bool) -> None:
        for sets in self.each:
            sets.write(ids_N, rows_of(ids_N, self.width, written) if known else None)

    def check(self) -> None:
        plain, native = self.each
        for name in set(SET.names or ()) - {"version"}:
            np.testing.assert_array_equal(plain.records[name], native.records[name], name)
        assert not (native.records["version"] & 1).any()
        assert plain.rows.tobytes() == native.rows.tobytes()
        np.testing.assert_array_equal(plain.kept(), native.kept())


any_id = (
    st.integers(0, 60) | st.integers(MOST_ROWS - 99, MOST_ROWS - 1) | st.integers(0, MOST_ROWS - 1)
)
any_ids = st.lists(any_id, max_size=60).map(lambda ids: np.array(ids, np.int64))
steps = st.lists(
    st.tuples(st.just("look"), any_ids, st.integers(0, 7))
    | st.tuples(st.just("keep"), st.integers(0, 3), st.integers(0, 5))
    | st.tuples(st.just("hold"), any_ids)
    | st.tuples(st.just("write"), any_ids, st.integers(0, 5), st.booleans()),
    max_size=40,
)


@every_level
@settings(max_examples=120)
@given(steps=steps, count=st.integers(1, 5), width=st.sampled_from(WIDTHS))
def test_any_calls_leave_the_native_sets_as_they_leave_the_plain_ones(level, steps, count, width):
    both = Both(count, width)
    with _native.forced(level):
        for name, first, *others in steps:
            if name == "hold":
                for sets in both.each:
                    sets.hold(first)
            else:
                getattr(both, name)(first, *others)
            both.check()


@every_level
@pytest.mark.parametrize(("count", "width"), [(1, 12), (7, 264), (40, 66), (300, 31)])
def test_traffic_like_that_of_text_leaves_the_same_rows_kept(level, count, width):
    both, rng = Both(count, width), np.random.default_rng(count)
    with _native.forced(level):
        for step in range(150):
            both.look(rng.zipf(1.3, rng.integers(1, 8 * count)) % 5000)
            both.keep(0, 0)
            if step % 10 == 0:
                written = rng.integers(0, 5000, 20)
                for sets in both.each:
                    sets.hold(written)
                both.write(written, 0, bool(step % 20))
            if step % 50 == 0:
                both.check()
    both.check()  # all of the policy has been at work by now:
    records = both.each[0].records
    assert (
        (records["tags"] != 0).mean() > 0.9
        and (records["order"] >= WAYS).any()
        and (records["ghosts"] != 0).any()
    )
    assert set(np.unique(records["reads"])) == {0, 1, 2, 3}


@every_level
@pytest.mark.parametrize("used", [1, 3])
@pytest.mark.parametrize(("width", "skip"), [(128, 0), (128, 16), (264, 0)])
def test_large_outputs_and_several_threads_find_the_same_rows(level, width, skip, used, threads):
    threads(used)
    both, rng = Both(400, width), np.random.default_rng(0)
    known = rng.integers(0, MOST_ROWS, 5000)
    both.look(known)
    both.keep(0, 0)
    count = LARGE // width + 1
    chosen = np.where(
        rng.random(count) < 0.9, rng.choice(known, count), rng.integers(0, MOST_ROWS, count)
    )
    memory = np.full(count * width + 256, 0xA5, np.uint8)
    begin = -_native.core.address(memory) % 64 + 64 + skip
    out = memory[begin : begin + count * width].reshape(count, width)
    expected = np.full((count, width), 0xA5, np.uint8)
    plain, native = both.each
    with _native.forced(level):
        found = native.look(chosen, out)
    for one, other in zip(found, plain.look(chosen, expected), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(out, expected)
    assert (memory[:begin] == 0xA5).all() and (memory[begin + count * width :] == 0xA5).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": 0},
        {"changes": 0},
        {"set_count": 0},
        {"set_count": 2**32},
        {"row_bytes": 0},
        {"count": -1},
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong):
    sets, ids = NativeSets(_native.core, 2, 8), np.zeros(1, np.int64)
    sound = dict(
        zip(("memory", "changes", "set_count", "row_bytes"), sets._place, strict=True), count=1
    )
    others = {
        "cache_look": ("out", "missing"),
        "cache_keep": ("versions", "reads", "from_rows"),
        "cache_hold": (),
        "cache_write": ("from_rows",),
    }
    for name, more in others.items():
        at = _native.core.address(ids)
        with pytest.raises(ValueError, match="there must be"):
            getattr(_native.core, name)(ids=at, **dict.fromkeys(more, at), **sound | wrong)


def test_the_version_in_use_is_the_one_that_was_asked_for():
    for demand, expected in (("off", Sets), ("auto", NativeSets)):
        with _native.forced(demand):
            assert type(CacheStore(Written(10, 8), 10_000)._sets) is expected


# Many threads. A row is its number and how often it was written, again and again: a torn one shows.


LOOKED = 1000  # rows a call


class Written(RowStore):
    """Whole rows, however many threads read and write."""

    def __init__(self, rows: int, words: int) -> None:
        super().__init__()
        self.rows_NW = stamped(np.arange(rows), np.zeros(rows), words)
        self.lock = threading.Lock()

    @property
    def info(self) -> StoreInfo:
        return StoreInfo("written", len(self.rows_NW), self.rows_NW.shape[1] * 4, writable=True)

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        with self.lock:
            out_NR[...] = self.rows_NW.view(np.uint8)[ids_N]

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        with self.lock:
            self.rows_NW.view(np.uint8)[ids_N] = rows_NR


def stamped(ids_N: np.ndarray, times_N: np.ndarray, words: int) -> np.ndarray:
    pair_N2 = np.stack([ids_N, times_N], axis=1).astype(np.uint32)
    return np.tile(pair_N2, (1, words // 2))


@pytest.mark.slow
@every_level
@pytest.mark.parametrize(("rows", "words", "sets"), [(64, 66, 2), (24, 512, 2), (2000, 32, 3)])
def test_eight_readers_beside_a_writer_see_whole_rows_that_only_grow_newer(
    level, rows, words, sets
):
    behind = Written(rows, words)
    ended, wrong, calls = np.zeros(rows, np.int64), [], [0] * 8
    stop = threading.Event()

    def look(number: int) -> None:
        newest, rng = np.zeros(rows, np.int64), np.random.default_rng(number)
        while not stop.is_set() and not wrong:
            chosen = np.minimum(rng.geometric(4 / rows, LOOKED) - 1, rows - 1)
            least = np.maximum(newest, ended)
            found = cache.gather(chosen).view(np.uint32)
            times = found[:, 1].astype(np.int64)
            if not np.array_equal(found, stamped(chosen, times, words)):
                wrong.append("torn or another's")
            if (times < least[chosen]).any():
                wrong.append("old")
            np.maximum.at(newest, chosen, times)
            calls[number] += 1

    with _native.forced(level):
        cache = CacheStore(behind, sets * set_bytes(words * 4))
        readers = [threading.Thread(target=look, args=(number,)) for number in range(8)]
        for each in readers:
            each.start()
        rng, until, times = np.random.default_rng(99), time.monotonic() + 1.5, 0
        while time.monotonic() < until and not wrong:
            times += 1
            chosen = np.unique(np.minimum(rng.geometric(4 / rows, 40) - 1, rows - 1))
            cache.scatter(
                chosen, stamped(chosen, np.full(len(chosen), times), words).view(np.uint8)
            )
            ended[chosen] = times
        stop.set()
        for each in readers:
            each.join()
    assert not wrong and times > 5 and min(calls) > 5
    stats = cache.stats
    assert stats.hits and stats.rows == LOOKED * sum(calls) == stats.hits + stats.misses
    assert behind.stats.rows == stats.misses
    kept = cache.kept()
    assert len(np.unique(kept)) == len(kept) <= cache.capacity
    for chosen in (kept, np.arange(rows)):
        np.testing.assert_array_equal(cache.gather(chosen).view(np.uint32), behind.rows_NW[chosen])


def test_rows_that_are_kept_are_read_while_another_thread_changes_the_cache():
    cache = CacheStore(Written(100, 8), 50_000)
    cache.gather(np.arange(50))
    sets = cache._sets
    assert sets is not None
    with sets.lock, cache._writer:  # in the hands of others
        found: list[np.ndarray] = []
        reader = threading.Thread(target=lambda: found.append(cache.gather(np.arange(50))))
        reader.start()
        reader.join(20)
        assert found and np.array_equal(
            found[0].view(np.uint32), stamped(np.arange(50), np.zeros(50), 8)
        )


@every_level
def test_readers_of_rows_that_change_amid_their_call_see_whole_rows_that_only_grow_newer(level):
    rows, words, many = 16, 512, np.tile(np.arange(16), 300)
    sets, stop, wrong, times_read = (
        NativeSets(_native.core, 3, words * 4),
        threading.Event(),
        [],
        set(),
    )
    missing_M, version_M = sets.look(np.arange(rows), np.empty((rows, words * 4), np.uint8))
    sets.keep(
        np.arange(rows),
        version_M,
        np.ones(rows, np.int64),
        stamped(missing_M, np.zeros(rows), words),
    )

    def look() -> None:
        out, newest = np.empty((len(many), words * 4), np.uint8), np.zeros(rows, np.int64)
        while not stop.is_set() and not wrong:
            missing_M, _ = sets.look(many, out)
            found, chosen = np.delete(out.view(np.uint32), missing_M, 0), np.delete(many, missing_M)
            times = found[:, 1].astype(np.int64)
            if not np.array_equal(found, stamped(chosen, times, words)):
                wrong.append("torn or another's")
            if (times < newest[chosen]).any():
                wrong.append("old")
            np.maximum.at(newest, chosen, times)
            times_read.update(times.tolist())

    with _native.forced(level):
        readers = [threading.Thread(target=look) for _ in range(2)]
        for each in readers:
            each.start()
        until, times = time.monotonic() + 1, 0
        while time.monotonic() < until and not wrong:
            times += 1
            chosen = np.arange(times % 2, rows, 2)
            sets.hold(chosen)
            sets.write(chosen, stamped(chosen, np.full(len(chosen), times), words).view(np.uint8))
        stop.set()
        for each in readers:
            each.join()
    assert not wrong and times > 5 and len(times_read) > 5


def test_calls_that_change_sets_are_changes_of_the_cache_and_reading_is_none():
    sets, rows = NativeSets(_native.core, 3, 8), np.zeros((4, 8), np.uint8)
    chosen, (_, version_M) = np.arange(4), sets.look(np.arange(4), rows)
    for number, change in enumerate(
        [
            lambda: sets.keep(chosen, version_M, chosen, rows),
            lambda: sets.hold(chosen),
            lambda: sets.write(chosen, rows),
            lambda: sets.write(chosen, None),
        ]
    ):
        change()
        assert (
            sets.changes[0] == 2 * number + 2
            and sets.look(chosen, rows)
            and sets.changes[0] == 2 * number + 2
        )


def test_while_sets_are_being_changed_the_others_are_read():
    cache = CacheStore(Written(100, 8), 50_000)
    cache.gather(np.arange(50))
    assert isinstance(cache._sets, NativeSets)
    cache._sets.changes += 1  # odd
    assert np.array_equal(
        cache.gather(np.arange(50)).view(np.uint32), stamped(np.arange(50), np.zeros(50), 8)
    )
    assert cache.stats.misses == 50


def test_a_set_is_read_when_its_change_is_over():
    cache = CacheStore(Written(100, 8), set_bytes(32))  # one set
    many = np.full(1 << 15, 5)  # so many that this thread may run meanwhile
    cache.gather(many)
    sets, found = cache._sets, []
    assert isinstance(sets, NativeSets)
    sets.changes += 1  # odd
    sets.records["version"] += 1
    reader = threading.Thread(target=lambda: found.append(cache.gather(many)))
    reader.start()
    reader.join(0.1)
    assert not found
    sets.rows[...] = 7
    sets.records["version"] += 1
    reader.join(20)
    assert (found[0] == 7).all()


@pytest.mark.parametrize("demand", ["off", "auto"])
def test_while_rows_are_written_they_are_read_from_the_store_and_nothing_of_their_sets_is_kept(
    demand,
):
    behind = Written(100, 8)
    with _native.forced(demand):
        cache = CacheStore(behind, set_bytes(32))  # one set
    cache.gather(np.array([5, 6]))
    new, write, amid = stamped(np.array([5]), np.ones(1), 8).view(np.uint8), behind._scatter, []

    def read_amid(ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        write(ids_N, rows_NR)
        amid.extend(
            [cache.gather(np.array([5])), cache.gather(np.array([6, 7])), cache.kept().tolist()]
        )

    behind._scatter = read_amid
    cache.scatter(np.array([5]), new)
    assert np.array_equal(amid[0], new) and amid[2] == [6]
    assert sorted(cache.kept().tolist()) == [5, 6] and cache.stats.misses == 4
    assert np.array_equal(cache.gather(np.array([5])), new) and cache.stats.misses == 4


def test_a_cache_closed_while_others_read_lets_them_finish():
    rows, started = 4000, threading.Barrier(5)
    expected, wrong = stamped(np.arange(rows), np.zeros(rows), 66), []

    def look(cache: CacheStore, chosen: np.ndarray) -> None:
        started.wait()
        try:
            while True:
                if not np.array_equal(cache.gather(chosen).view(np.uint32), expected[chosen]):
                    wrong.append(1)
        except StoreError as error:
            if "closed" not in str(error):
                wrong.append(error)

    for seed in range(15):
        cache = CacheStore(Written(rows, 66), 2 << 20)
        chosen = np.random.default_rng(seed).integers(0, rows, 3000)
        readers = [threading.Thread(target=look, args=(cache, chosen)) for _ in range(4)]
        for each in readers:
            each.start()
        started.wait()
        time.sleep(0.002 * seed)
        cache.close()
        for each in readers:
            each.join()
    assert not wrong


class Lying:
    """A lock that says it is free while somebody holds it, as one of Python's does for a moment: a
    thread that waited has it, and does not have the interpreter's yet. A fork at that moment leaves
    it so for ever."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.acquire, self.release = self.lock.acquire, self.lock.release
        self.acquire()

    def locked(self) -> bool:
        return False


@pytest.mark.parametrize("which", ["sets", "writer"])
def test_a_forked_child_waits_for_no_lock_that_a_lost_thread_has_just_got(which):
    cache = CacheStore(Written(500, 66), 100_000)
    before = cache._sets
    if which == "sets":
        cache._sets.lock = Lying()
    else:
        cache._writer = Lying()
    cache._after_fork()
    assert cache._sets is not before and cache._sets.lock.acquire(blocking=False)
    assert cache._writer.acquire(blocking=False)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_others_read_and_write_reads_the_right_rows(threads):
    threads(3)
    behind = Written(500, 66)
    cache, stop, rng = CacheStore(behind, 100_000), threading.Event(), np.random.default_rng(0)

    def keep_busy() -> None:
        while not stop.is_set():
            cache.gather(rng.integers(0, 500, 9000))
            chosen = rng.integers(0, 500, 10)
            cache.scatter(chosen, stamped(chosen, np.zeros(10), 66).view(np.uint8))

    def right() -> bool:
        behind.lock = threading.Lock()
        chosen = np.random.default_rng(os.getpid()).integers(0, 500, 9000)
        return all(
            np.array_equal(cache.gather(chosen).view(np.uint32), behind.rows_NW[chosen])
            for _ in range(2)
        )

    busy = [threading.Thread(target=keep_busy) for _ in range(2)]
    for each in busy:
        each.start()
    try:
        for _ in range(15):
            check_in_child(right)
    finally:
        stop.set()
        for each in busy:
            each.join()
