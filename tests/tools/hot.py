"""Hot indexes for tests: of n-grams of random tokens, with the fillers that are hashed."""

from __future__ import annotations

import numpy as np

from engraphy.addresses import Addresser, HotIndex, Ngrams
from engraphy.addresses.counting import count_ngrams


def some_ngrams(addresser: Addresser, top: int = 60, seed: int = 0, tokens: int = 600) -> Ngrams:
    """The most frequent n-grams of random tokens, those at the begin of documents among them."""
    rng = np.random.default_rng(seed)
    ids_T = rng.zipf(1.3, tokens) % addresser.vocab.raw_size
    return count_ngrams(addresser, ids_T, top, begins=np.arange(0, tokens, 7))


def some_index(addresser: Addresser, top: int = 60, seed: int = 0) -> HotIndex:
    """An index of `some_ngrams`."""
    return HotIndex.build(some_ngrams(addresser, top, seed))
