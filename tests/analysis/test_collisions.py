"""Collisions are those that a plain search over all pairs finds."""

from __future__ import annotations

import numpy as np
import pytest

from engraphy import HashSpec, VocabMap
from engraphy.addresses.addresser import Addresser
from engraphy.analysis import collisions as module
from engraphy.analysis.collisions import collisions, look_back

VOCAB = 12


def addresser(dialect: str = "demo") -> Addresser:
    """Few rows, so most n-grams share theirs. Ids 2 and 3 are one word; 11 has no token."""
    table = np.arange(VOCAB, dtype=np.int64)
    table[3] = 2
    table[4:11] -= 1
    table[11] = -1
    if dialect == "demo":
        spec = HashSpec.demo((0, 2), (2, 3), 2, 5, vocab_size=10, pad_id=0)
        return Addresser(spec, VocabMap(table))
    spec = HashSpec.qwen4((0,), (2, 3), 2, 5, vocab_size=VOCAB, eos_id=1)
    return Addresser(spec, VocabMap.identity(VOCAB))


def text(low: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, VOCAB, size) for size in (40, 1, 25, 60)]


def grams(one: Addresser, ids: np.ndarray, order: int) -> list[tuple[int, ...] | None]:
    """The n-gram that ends at each token, in compressed ids; None at a token without one."""
    found: list[tuple[int, ...] | None] = []
    compressed = one.vocab.table[ids]
    for t in range(len(ids)):
        begin = look_back(one, ids, t, order)
        gram = tuple(compressed[begin : t + 1].tolist())
        found.append(None if compressed[t] < 0 else gram)
    return found


@pytest.mark.parametrize("dialect", ["demo", "qwen4"])
def test_sharers_and_counts_are_those_of_a_search_over_all_pairs(dialect, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 16)  # so that the text is read in parts
    one = addresser(dialect)
    inspected = np.array([4, 2, 5, 1, 6, 3, 7, 5])
    documents = text(1, 0)
    found = collisions(one, inspected, documents, most=1000, least=1)
    for number, order in enumerate(one.spec.orders):
        own = grams(one, inspected, order)
        read: dict[tuple, list] = {}  # n-gram: how often, and its rows in each layer
        for ids in documents:
            rows = one.all_rows(ids[None])[:, 0]
            for t, gram in enumerate(grams(one, ids, order)):
                if gram is not None:
                    read.setdefault(gram, [0, rows[:, t]])[0] += 1
        counts = [read.get(gram, [0])[0] for gram in own]
        assert found.counts[order].tolist() == counts
        own_rows = one.all_rows(inspected[None])[:, 0]
        for place, layer in enumerate(one.spec.layer_ids):
            for column in range(number * one.spec.heads, (number + 1) * one.spec.heads):
                for t, gram in enumerate(own):
                    others = {
                        other: count
                        for other, (count, rows) in read.items()
                        if rows[place, column] == own_rows[place, t, column] and other != gram
                    }
                    shared = found.shared[layer][t][column]
                    named = {
                        tuple(one.vocab.table[list(sharer.ids)].tolist()): sharer.count
                        for sharer in shared.frequent
                    }
                    assert named == others
                    assert (shared.others, shared.reads) == (len(others), sum(others.values()))


def test_the_most_frequent_are_named_first_and_the_rare_not_at_all():
    one = addresser()
    found = collisions(one, np.array([4, 5]), text(1, 1), most=2, least=3)
    rows = [shared for by_token in found.shared.values() for token in by_token for shared in token]
    counts = [[sharer.count for sharer in shared.frequent] for shared in rows]
    assert any(len(few) == 2 for few in counts)
    assert all(few == sorted(few, reverse=True) and min(few, default=3) >= 3 for few in counts)
    assert all(len(few) <= 2 for few in counts)


def test_the_text_that_is_inspected_does_not_count_itself():
    one = addresser()
    found = collisions(one, np.array([4, 5, 4, 5]), [])
    assert not any(counts.any() for counts in found.counts.values())
    assert not any(shared.others for token in found.shared[0] for shared in token)
