"""Counts are exact, and a hot set serves what counting by hand says."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engraphy.addresses.counts import Counts, ngram_keys

KEYS = st.lists(st.integers(0, 9), max_size=40)


@given(KEYS, KEYS)
def test_counts_are_those_of_a_counter(keys, asked):
    counts, expected = Counts(np.array(keys, np.int64)), Counter(keys)
    assert dict(zip(counts.keys_K.tolist(), counts.counts_K.tolist(), strict=True)) == expected
    assert counts.total == len(keys)
    assert counts.of(np.array(asked, np.int64)).tolist() == [expected[key] for key in asked]


@given(KEYS, KEYS)
def test_a_hot_set_serves_the_reads_of_its_keys(keys, tested):
    counts = Counts(np.array(keys, np.int64))
    order = sorted(set(keys), key=lambda key: (-keys.count(key), key))
    assert counts.by_count().tolist() == order
    shares = Counts(np.array(tested, np.int64)).served_by(counts.by_count(), range(12))
    for size, share in enumerate(shares):
        hits = sum(key in order[:size] for key in tested)
        assert share == hits / max(1, len(tested))


def test_row_ids_of_any_shape_are_counted():
    counts = Counts(np.array([[[5, 7]], [[5, 9]]]))
    assert counts.keys_K.tolist() == [5, 7, 9] and counts.counts_K.tolist() == [2, 1, 1]
    assert counts.of(np.array([[9, 10]])).tolist() == [[1, 0]]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40), st.integers(1, 5))
def test_ngram_keys_are_equal_exactly_where_the_ngrams_are(tokens, order):
    ids = [number for number, _ in tokens]
    keys = ngram_keys(np.array(ids, np.int64), np.array([new for _, new in tokens], bool), order)
    grams: list[tuple[int | None, ...]] = []
    document: list[int] = []
    for number, new in tokens:
        document = [number] if new else [*document, number]
        grams.append((*[None] * order, *document)[-order:])
    assert len(keys) == len(tokens)
    for key, gram in zip(keys.tolist(), grams, strict=True):
        assert [other == gram for other in grams] == (keys == key).tolist()
