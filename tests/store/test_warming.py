"""Warming reads what it is told to, says how far it is, and whether the cache is full of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engraphy import _native
from engraphy.addresses import Addresser, Ngrams, VocabMap, frequent_rows
from engraphy.addresses.counting import count_ngrams
from engraphy.addresses.counts import Counts
from engraphy.errors import ConfigError, DigestMismatch, RowOutOfRange
from engraphy.spec import HashSpec
from engraphy.store import RamStore, warming
from engraphy.store.cache import CacheStore
from engraphy.store.reload import ReloadableStore
from engraphy.store.sets import WAYS, place
from engraphy.store.warming import warm

ROWS, WIDTH = 5000, 4


@pytest.fixture
def ram():
    return RamStore(ROWS, WIDTH)


@pytest.fixture(params=["off"] if _native.core is None else ["off", "scalar"])
def native(request):
    with _native.forced(request.param):
        yield


@pytest.mark.parametrize(("share", "rows"), [(0, 0), (0.5, 2500), (1.0, ROWS), (1, ROWS)])
def test_a_share_of_the_rows_is_read_from_the_first_on(ram, share, rows):
    done = warm(ram, share)
    assert (done.rows, done.bytes, done.kept, done.ready) == (rows, rows * WIDTH, None, True)
    assert ram.stats.rows == rows and done.seconds >= 0


def test_progress_is_told_after_each_part(ram, monkeypatch):
    monkeypatch.setattr(warming, "_CHUNK", 1000)
    told = []
    warm(ram, 0.45, progress=lambda *now: told.append(now))
    assert told == [(1000, 2250), (2000, 2250), (2250, 2250)]


def test_rows_that_were_warmed_are_hits_and_the_cache_is_ready(ram):
    cache = CacheStore(ram, 100_000)
    chosen = np.random.default_rng(0).permutation(ROWS)[:1500]
    done = warm(cache, chosen)
    assert done.ready and done.kept == len(np.intersect1d(cache.kept(), chosen)) > 1400
    before = cache.stats.misses
    cache.gather(chosen)
    assert cache.stats.misses - before == 1500 - done.kept


def test_a_cache_as_full_as_it_can_be_is_ready_though_it_holds_less_than_asked_for(ram):
    cache = CacheStore(ram, 20_000)
    done = warm(cache, 1.0)
    assert done.ready and 0.8 * cache.capacity <= done.kept <= cache.capacity < ROWS


def test_a_cache_that_lost_what_it_was_given_is_not_ready(ram):
    cache = CacheStore(ram, 20_000)
    done = warm(ReloadableStore(cache), 1.0, progress=lambda done, total: cache._make())
    assert done.kept == 0 and not done.ready


def test_a_new_cache_warmed_with_what_another_kept_keeps_the_same(ram):
    old = CacheStore(ram, 30_000)
    rng = np.random.default_rng(3)
    for _ in range(40):
        old.gather(rng.zipf(1.3, 200) % ROWS)
    new = CacheStore(ram, 30_000)
    assert warm(new, old.kept()).ready
    assert set(new.kept().tolist()) == set(old.kept().tolist())


def test_pinned_rows_stay_and_no_others_come(ram, native):
    cache = CacheStore(ram, 20_000)
    rng = np.random.default_rng(4)
    cache.gather(rng.integers(0, ROWS, 300))
    wanted = rng.permutation(ROWS)[: 3 * cache.capacity]
    told = []
    done = warm(ReloadableStore(cache), wanted, lambda *now: told.append(now), pin=True)
    assert cache.pinned and "pinned" in repr(cache) and told == [(done.kept, done.kept)]
    # Of the rows of each set the first 16, so nearly all places are taken, and none for nothing.
    sets = place(wanted, cache.capacity // WAYS).set_N
    first = [row for at, row in enumerate(wanted) if (sets[:at] == sets[at]).sum() < WAYS]
    assert sorted(cache.kept()) == sorted(first) and done.kept == len(first) == done.rows
    assert done.ready and done.kept > 0.99 * cache.capacity
    before = cache.stats.misses
    for _ in range(30):
        cache.gather(rng.integers(0, ROWS, 400))
    assert sorted(cache.kept()) == sorted(first)
    missed = cache.stats.misses - before
    cache.gather(np.array(first))
    assert cache.stats.misses == before + missed > before


def test_pinned_rows_are_exact_and_are_written_with_their_store(ram, native):
    ram.scatter(np.arange(ROWS), np.random.default_rng(5).integers(0, 256, (ROWS, WIDTH), np.uint8))
    cache = CacheStore(ram, 20_000)
    warm(cache, np.array([7, 7, 9, 4000, 9]), pin=True)
    assert sorted(cache.kept()) == [7, 9, 4000]
    cache.scatter(np.array([9, 10]), np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8))
    every = np.arange(ROWS)
    np.testing.assert_array_equal(cache.gather(every), ram.gather(every))
    assert cache.gather(np.array([9, 10])).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert sorted(cache.kept()) == [7, 9, 4000]


def test_a_row_that_is_written_while_rows_are_pinned_is_never_seen_old(ram):
    """The writer waits, since what is being read to be pinned would be old."""
    cache = CacheStore(ram, 20_000)
    reading, go_on = threading.Event(), threading.Event()
    gather = ram.gather

    def slow(ids, out=None):
        rows = gather(ids, out)
        reading.set()
        assert go_on.wait(20)
        return rows

    ram.gather = slow
    pinning = threading.Thread(target=lambda: cache.pin(np.arange(30)))
    pinning.start()
    assert reading.wait(20)
    new = np.full((1, WIDTH), 8, np.uint8)
    writing = threading.Thread(target=lambda: cache.scatter(np.array([3]), new))
    writing.start()
    go_on.set()
    pinning.join()
    writing.join()
    assert 3 in cache.kept() and (cache.gather(np.array([3])) == 8).all()


@pytest.mark.parametrize("what", [0.5, [1, 2]])
def test_what_cannot_be_pinned_is_refused(ram, what):
    with pytest.raises(ConfigError, match="expected row ids and a cache"):
        warm(CacheStore(ram, 20_000), what, pin=True)
    with pytest.raises(ConfigError, match="expected row ids and a cache"):
        warm(ram, np.arange(3), pin=True)
    cache = CacheStore(ram, 20_000)
    cache.gather(np.arange(5))
    with pytest.raises(RowOutOfRange):
        warm(cache, np.array([1, ROWS]), pin=True)
    assert not cache.pinned and sorted(cache.kept()) == [0, 1, 2, 3, 4]


def test_the_rows_of_frequent_ngrams_are_those_that_a_text_reads_most():
    vocab = VocabMap.identity(40)
    spec = HashSpec.demo((1, 3), (2, 3), 2, (50, 300), 40, 0)
    addresser = Addresser(spec, vocab)
    ids_T = np.random.default_rng(6).zipf(1.4, 900) % 40
    ngrams = count_ngrams(addresser, ids_T, 10**6)
    for layer in spec.layer_ids:
        reads = Counts(addresser.rows(ids_T[None], layer))
        assert np.array_equal(frequent_rows(addresser, ngrams, layer), reads.by_count())
        few = frequent_rows(addresser, ngrams, layer, most=30)
        assert np.array_equal(few, reads.by_count()[:30])
    with pytest.raises(ConfigError, match="counts of order 2"):
        frequent_rows(addresser, Ngrams(ngrams.ids, vocab.digest), 1)
    with pytest.raises(DigestMismatch, match="vocabulary map"):
        frequent_rows(addresser, Ngrams(ngrams.ids, "ab" * 32, ngrams.counts), 1)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "all", None, True])
def test_shares_that_cannot_be_meant_are_refused(ram, share):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        warm(ram, share)


def test_ids_out_of_range_are_the_stores_error(ram):
    with pytest.raises(RowOutOfRange):
        warm(ram, np.array([1, ROWS]))
