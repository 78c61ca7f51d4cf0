"""Stack distances are those of a real LRU list, and Zipf's law is found in texts drawn from it."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engraphy.addresses.counts import Counts
from engraphy.analysis import reuse
from engraphy.analysis.reuse import hit_rates, stack_distances, zipf_exponent
from engraphy.errors import InputError


def depth_in_a_list(keys: list[int]) -> list[int]:
    """The depth of each key in a list whose first element was read last."""
    stack: list[int] = []
    depths = []
    for key in keys:
        depths.append(stack.index(key) if key in stack else -1)
        if key in stack:
            stack.remove(key)
        stack.insert(0, key)
    return depths


def hits_of_a_cache(keys: list[int], size: int) -> float:
    """Hit rate of a cache that is walked through read by read."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in keys:
        hits += key in kept
        kept[key] = None
        kept.move_to_end(key)
        if len(kept) > size:
            kept.popitem(last=False)
    return hits / len(keys)


@given(st.lists(st.integers(0, 12), max_size=80))
def test_a_distance_is_the_depth_in_a_list_of_the_keys_read_last(keys):
    assert stack_distances(np.array(keys, np.int64)).tolist() == depth_in_a_list(keys)


def test_distances_do_not_depend_on_the_size_of_the_blocks(monkeypatch):
    keys = np.random.default_rng(0).zipf(1.3, 3000) % 500 * 2**40
    expected = depth_in_a_list(keys.tolist())
    for block, bits in ((1, 0), (7, 3), (1024, 5), (2**20, 12)):
        monkeypatch.setattr(reuse, "_BLOCK", block)
        monkeypatch.setattr(reuse, "_CACHED_BITS", bits)
        assert stack_distances(keys).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 10, 100, 1000])
def test_the_hit_rate_of_a_size_is_that_of_a_cache_of_this_size(size):
    keys = np.random.default_rng(1).zipf(1.2, 4000) % 1000
    rate = hit_rates(stack_distances(keys), [size])[0]
    assert rate == pytest.approx(hits_of_a_cache(keys.tolist(), size), abs=1e-12)


def test_hit_rates_of_a_part_of_the_reads():
    distances = stack_distances(np.array([5, 6, 5, 6, 5, 7, 5]))
    assert hit_rates(distances[4:], [1, 2, 3]).tolist() == [0, 2 / 3, 2 / 3]
    assert hit_rates(distances[:0], [1]).tolist() == [0]


def test_keys_that_do_not_fit_are_refused():
    for keys in ([-1, 0], [0, 2**62, 1]):
        with pytest.raises(InputError, match="63 bits"):
            stack_distances(np.array(keys))


@pytest.mark.parametrize("exponent", [0.7, 1.0])
def test_the_exponent_of_drawn_texts_is_found(exponent):
    share = np.arange(1, 50_001) ** -exponent
    random = np.random.default_rng(2)
    texts = [Counts(random.choice(50_000, 400_000, p=share / share.sum())) for _ in range(2)]
    assert zipf_exponent(*texts) == pytest.approx(exponent, abs=0.03)


def test_uniform_keys_have_no_slope_though_their_own_counts_do():
    random = np.random.default_rng(3)
    texts = [Counts(random.integers(0, 2000, 40_000)) for _ in range(2)]
    assert abs(zipf_exponent(*texts)) < 0.02
    assert zipf_exponent(texts[0], texts[0]) > 0.05


def test_too_little_text_has_no_exponent():
    few = Counts(np.arange(100))
    assert np.isnan(zipf_exponent(few, few))
