"""Native hot indexes are those of numpy, bit for bit, at each level and with any threads."""

from __future__ import annotations

import numpy as np
import pytest

from engraphy import _native
from engraphy.addresses import HotIndex, Ngrams, perfect_hash
from engraphy.addresses.perfect_hash import PerfectHash
from engraphy.errors import ConfigError

pytestmark = pytest.mark.skipif(_native.core is None, reason=_native.reason)
LEVELS = [] if _native.core is None else list(_native.core.levels())


def distinct(count: int, order: int, size: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.permutation(np.unique(rng.integers(0, size, (count, order)), axis=0))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [None, 11])
@pytest.mark.parametrize("order, size", [(1, 2**31), (2, 99_092), (5, 30), (32, 3)])
def test_an_index_is_that_of_numpy(level, bits, order, size, threads):
    keys, others = distinct(6000, order, size), distinct(9000, order, size, 1)
    ngrams = Ngrams({order: keys}, "0" * 64)
    with _native.forced("off"):
        expected = HotIndex.build(ngrams, bits)
        slots = expected.slots_of(others)
    with _native.forced(level):
        for count in (1, 3):
            threads(count)
            found = HotIndex.build(ngrams, bits)
            assert found.digest == expected.digest
            assert np.array_equal(found.slots_of(others.astype(np.int32)), slots)
            assert np.array_equal(found.slots_of(keys.astype(np.int32)), np.arange(len(keys)))
            ours, theirs = found.part(order), expected.part(order)
            assert ours.perfect.sizes == theirs.perfect.sizes
            assert np.array_equal(ours.perfect.blocks_BW, theirs.perfect.blocks_BW)
            assert np.array_equal(ours.records_NR, theirs.records_NR)


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 129])
def test_few_ngrams_are_looked_up_as_many_are(count):
    keys = distinct(300, 3, 12)
    index = HotIndex.build(Ngrams({3: keys}, "0" * 64))
    tried = distinct(900, 3, 12, 1)[:count].astype(np.int32)
    with _native.forced("off"):
        expected = index.slots_of(tried)
    assert np.array_equal(index.slots_of(tried), expected)


def test_keys_that_are_left_over_get_another_seed_or_are_named(monkeypatch):
    keys = distinct(200, 2, 90)
    with pytest.raises(ConfigError, match="more than once"):
        PerfectHash.build(np.concatenate([keys, keys[5:6]]))
    honest = perfect_hash._built

    def left_over(ids, seed):
        sizes, blocks, left = honest(ids, seed)
        return sizes, blocks, np.arange(2) if seed == 0 else left

    monkeypatch.setattr(perfect_hash, "_built", left_over)
    made = PerfectHash.build(keys)
    assert made.seed == 1 and sorted(made.ranks(keys)) == list(range(len(keys)))


def test_a_block_is_a_cache_line_where_it_is_built_and_where_it_is_mapped(tmp_path):
    index = HotIndex.build(Ngrams({2: distinct(3000, 2, 99)}, "0" * 64))
    index.save(tmp_path / "index")
    for one in (index, HotIndex.load(tmp_path / "index")):
        assert one.part(2).perfect.blocks_BW.ctypes.data % 64 == 0


def test_sizes_that_cannot_be_meant_are_refused():
    assert _native.core is not None
    index = HotIndex.build(Ngrams({2: distinct(50, 2, 30)}, "0" * 64))
    part = index.part(2)
    with pytest.raises(ValueError, match="positive"):
        part.native(0)
    with pytest.raises(ValueError, match="positive"):
        _native.core.hot_levels(0, 5, 2, 0, 7, 4)
