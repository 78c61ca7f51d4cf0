"""Frequent n-grams share the rows that a dictionary of rows says they share."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from engraphy.addresses import Addresser, HotIndex, Ngrams, VocabMap, frequent
from engraphy.errors import ConfigError, DigestMismatch
from engraphy.spec import HashSpec
from engraphy.table.sharing import shared_rows

VOCAB = VocabMap.identity(64)
SPECS = {
    "demo": HashSpec.demo((1, 3), (2, 3), 2, (90, 300), 64, 2),
    "deepseek": HashSpec.deepseek_v41((1, 3), (2, 3, 4), 3, 200, 64, 2),
    "qwen": HashSpec.qwen4((1,), (2, 3), 2, 150, 64, 5, pad_to=16),
}


def some(orders, count: int = 120, seed: int = 0) -> Ngrams:
    rng = np.random.default_rng(seed)
    ids, counts = {}, {}
    for order in orders:
        ids[order] = rng.permutation(np.unique(rng.integers(0, 64, (count, order)), axis=0))
        counts[order] = np.sort(rng.zipf(1.3, len(ids[order])) % 1000 + 1)[::-1]
    return Ngrams(ids, VOCAB.digest, counts)


def by_row(addresser: Addresser, ngrams: Ngrams, layer: int, order: int) -> list[dict]:
    """For each head: row -> the ranks of its n-grams. Each n-gram is read as a token's own."""
    spec = addresser.spec
    column = spec.orders.index(order) * spec.heads
    found = [defaultdict(list) for _ in range(spec.heads)]
    for rank, gram in enumerate(ngrams.ids[order]):
        history = np.full((1, spec.order - 1), -1)
        history[0, spec.order - order :] = gram[:-1]
        rows_C = addresser.rows(gram[None, -1:].astype(np.int64), layer, history)[0, 0]
        for head in range(spec.heads):
            found[head][int(rows_C[column + head])].append(rank)
    return found


@pytest.mark.parametrize("dialect", SPECS)
@pytest.mark.parametrize("hot", [False, True])
def test_what_is_shared_is_what_a_dictionary_says(dialect, hot, monkeypatch):
    monkeypatch.setattr(frequent, "_STEP", 37)
    spec = SPECS[dialect]
    ngrams = some(spec.orders)
    # Look-back stops at the EOS, so of these n-grams a token's own one would be another.
    whole = {order: ids[~(ids[:, :-1] == 5).any(axis=1)] for order, ids in ngrams.ids.items()}
    counts = {order: ngrams.counts[order][: len(ids)] for order, ids in whole.items()}
    ngrams = Ngrams(whole, VOCAB.digest, counts)
    index = HotIndex.build(ngrams.top(30)) if hot else None
    addresser = Addresser(spec, VOCAB, index)
    found = shared_rows(addresser, ngrams, examples=400)
    assert [(part.layer, part.order) for part in found] == [
        (layer, order) for layer in spec.layer_ids for order in spec.orders
    ]
    for part in found:
        rows = by_row(addresser, ngrams, part.layer, part.order)
        counts_N = ngrams.counts[part.order]
        in_heads = np.zeros(part.ngrams, int)
        for head, ranks in zip(part.heads, rows, strict=True):
            shared = [rank for group in ranks.values() if len(group) > 1 for rank in group]
            in_heads[shared] += 1
            assert (head.used, head.sharing) == (len(ranks), len(shared))
            assert head.most == max(map(len, ranks.values()))
            assert head.reads == pytest.approx(counts_N[shared].sum() / counts_N.sum())
            assert not hot or min(shared, default=30) >= 30
        assert part.in_heads == tuple(np.bincount(in_heads, minlength=spec.heads + 1))
        listed = {
            (row.head, row.row): ([gram.rank for gram in row.ngrams], row.total)
            for row in part.examples
        }
        assert listed == {
            (head, row): (group[:4], len(group))
            for head, ranks in enumerate(rows)
            for row, group in ranks.items()
            if len(group) > 1
        }
        seconds = [row.ngrams[1].rank for row in part.examples]
        assert seconds == sorted(seconds) and len(seconds) > 3
        gram = part.examples[0].ngrams[0]
        assert gram.ids == tuple(ngrams.ids[part.order][gram.rank].tolist())
        assert gram.count == counts_N[gram.rank]


def test_as_many_share_by_chance_as_the_hash_makes_share():
    spec = HashSpec.demo((1,), (3,), 8, 20_011, 64, 2)
    ngrams = some((3,), 20_000)
    (part,) = shared_rows(Addresser(spec, VOCAB), ngrams)
    assert len(part.examples) == 5
    for head in part.heads:
        assert 0.5 < head.expected / part.ngrams < 0.7
        assert abs(head.sharing - head.expected) < 5 * head.expected**0.5


def test_ngrams_without_counts_and_none_at_all():
    addresser = Addresser(SPECS["demo"], VOCAB)
    bare = Ngrams({2: some((2,)).ids[2], 3: np.zeros((0, 3), np.int32)}, VOCAB.digest)
    steps = []
    first, none = shared_rows(addresser, bare, progress=lambda *step: steps.append(step))[:2]
    assert first.heads[0].reads == 0 and first.examples[0].ngrams[0].count == 0
    assert none.ngrams == 0 and none.in_heads == (0, 0, 0) and not none.examples
    assert len(steps) == 4 and steps[-1][1] == steps[-1][2] > 0


def test_ngrams_of_another_map_or_order_are_refused():
    addresser = Addresser(SPECS["demo"], VOCAB)
    with pytest.raises(DigestMismatch, match="vocabulary map"):
        shared_rows(addresser, Ngrams(some((2,)).ids, "ab" * 32))
    with pytest.raises(ConfigError, match=r"expected orders of \[2, 3\].*found \[4\]"):
        shared_rows(addresser, some((2, 4)))
