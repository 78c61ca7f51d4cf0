"""Counts of n-grams, against counting by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from engraphy.data.packing import Batches
from engraphy.errors import ConfigError
from engraphy.eval.bands import NgramCounts, loss_by_band

END, VOCAB = 0, 6


def random_documents(count: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        random.integers(1, VOCAB, size=random.integers(1, 30)).astype(np.int32)
        for _ in range(count)
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_counts_equal_counting_by_hand(order):
    train, unseen = random_documents(40, seed=0), random_documents(12, seed=1)
    by_hand: Counter[tuple[int, ...]] = Counter()
    for ids in train:
        whole = [END, *ids.tolist(), END]
        by_hand.update(tuple(whole[at : at + order]) for at in range(len(whole) - order + 1))
    counts = NgramCounts(train, END, VOCAB, order)
    seen = set()
    for batch in Batches(unseen, END, batch=3, tokens=11, seed=None):
        found = counts.count(*batch)
        ids, targets, starts = (value.tolist() for value in batch)
        for row, last in np.ndindex(found.shape):
            begin = max(at for at in range(last + 1) if starts[row][at])
            gram = (*ids[row][max(begin, last - order + 2) : last + 1], targets[row][last])
            gram = gram[len(gram) - order :] if order == 1 else gram
            whole = targets[row][last] >= 0 and len(gram) == order
            expected = by_hand[gram] if whole else -1
            assert found[row, last] == expected
            seen.add(min(expected, 1))
    assert {0, 1} <= seen if order > 2 else 1 in seen


def test_no_ngram_joins_two_documents():
    counts = NgramCounts([np.array([1, 2]), np.array([3, 4])], END, VOCAB)
    ids, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    starts = torch.tensor([[True, False, False]])
    assert counts.count(ids, targets, starts).tolist() == [[-1, 0, 0]]


def test_the_end_of_a_document_and_its_first_token_count():
    counts = NgramCounts([np.array([1, 2]), np.array([1, 2, 3])], END, VOCAB)
    ids, targets = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 0]])
    assert counts.count(ids, targets, torch.tensor([[True, False, False]])).tolist() == [[-1, 2, 1]]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_batches_count_what_was_trained_on_and_nothing_else(order):
    batches = Batches(random_documents(40, seed=0), END, batch=3, tokens=11, seed=0)
    trained = [batches[step] for step in range(len(batches) // 2)]
    by_hand: Counter[tuple[int, ...]] = Counter()
    for ids, targets, starts in (map(Tensor.tolist, batch) for batch in trained):
        for row, row_targets, row_starts in zip(ids, targets, starts, strict=True):
            begin = 0
            for last, target in enumerate(row_targets):
                begin = last if row_starts[last] else begin
                gram = (*row[begin : last + 1], target)[-order:]
                by_hand[gram] += len(gram) == order
    counts = NgramCounts.of_batches(trained, VOCAB, order)
    for batch in (*trained, batches[len(batches) - 1]):
        found = counts.count(*batch)
        for row, last in np.argwhere(found >= 0):
            ids = batch.ids_BT[row, max(0, last - order + 2) : last + 1].tolist()
            assert found[row, last] == by_hand[(*ids, int(batch.targets_BT[row, last]))[-order:]]
    rest = batches[len(batches) - 1]
    assert (NgramCounts.of_batches(batches, VOCAB, order).count(*rest) > 0).any()
    assert NgramCounts.of_batches([], VOCAB, order).count(*rest).max() <= 0


def test_a_training_text_without_ngrams_has_seen_nothing():
    counts = NgramCounts([], END, VOCAB)
    ids = torch.tensor([[1, 2]])
    assert counts.count(ids, ids, torch.tensor([[True, False]])).tolist() == [[-1, 0]]


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="63"):
        NgramCounts([], END, 2**21 + 1, order=3)


def test_losses_are_averaged_by_band():
    losses = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=np.float32)
    found = loss_by_band(losses, np.array([[0, 1, 3], [4, -1, 0]]))
    assert {name: band.targets for name, band in found.items()} == {
        "never": 2,
        "1-3": 2,
        "4-30": 1,
        "31+": 0,
    }
    assert (found["never"].loss, found["1-3"].loss, found["4-30"].loss) == (16.5, 3.0, 8.0)
    assert math.isnan(found["31+"].loss)
