"""Warming reads what it is told to, says how far it is, and whether the cache is full of it."""

from __future__ import annotations

import numpy as np
import pytest

from engraphy.errors import ConfigError, RowOutOfRange
from engraphy.store import RamStore, warming
from engraphy.store.cache import CacheStore
from engraphy.store.reload import ReloadableStore
from engraphy.store.warming import warm

ROWS, WIDTH = 5000, 4


@pytest.fixture
def ram():
    return RamStore(ROWS, WIDTH)


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


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "all", None, True])
def test_shares_that_cannot_be_meant_are_refused(ram, share):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        warm(ram, share)


def test_ids_out_of_range_are_the_stores_error(ram):
    with pytest.raises(RowOutOfRange):
        warm(ram, np.array([1, ROWS]))
