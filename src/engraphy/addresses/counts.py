"""Exact counts of row ids, n-grams or other integer keys, in memory; and what a static hot set of
the most-read ones serves.

It knows no store and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Counts:
    """How often each key was read. Immutable; takes 16 bytes for each distinct key.

    Attributes:
        keys_K: int64 [K], the distinct keys, ascending.
        counts_K: int64 [K], how often each was read, 1 or more.

    Args:
        keys: Integers of any shape, such as the row ids of a text. 2**63 - 1 is no key.
    """

    def __init__(self, keys: np.ndarray):
        self.keys_K, self.counts_K = np.unique(keys.astype(np.int64), return_counts=True)

    @property
    def total(self) -> int:
        """The number of reads."""
        return int(self.counts_K.sum())

    def of(self, keys: np.ndarray) -> np.ndarray:
        """Returns how often each key was read; 0 = never. int64, of the shape of `keys`."""
        at = np.searchsorted(self.keys_K, keys)
        # The appended values stand for keys above all others.
        known = np.append(self.keys_K, 2**63 - 1)[at] == keys
        return np.where(known, np.append(self.counts_K, 0)[at], 0)

    def by_count(self) -> np.ndarray:
        """The distinct keys, most read first, int64 [K]. Of equal counts the smaller key is first.

        The first N are the static hot set of N rows.
        """
        return self.keys_K[np.argsort(-self.counts_K, kind="stable")]

    def served_by(self, ranked_K: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """The share of the reads that static hot sets serve.

        Args:
            ranked_K: Distinct keys, most wanted first: `by_count` of another text. Those of this
                one give what the choice would reach if it knew the text.
            sizes: Rows of each hot set: the first so many keys.

        Returns:
            float64 [len(sizes)].
        """
        served = np.concatenate([[0], np.cumsum(self.of(ranked_K))])
        sizes_n = np.minimum(np.asarray(sizes, dtype=np.int64), len(ranked_K))
        return served[sizes_n] / max(1, self.total)


def ngram_keys(ids_N: np.ndarray, starts_N: np.ndarray, order: int) -> np.ndarray:
    """Numbers the n-grams that end at each token: without hashing, so different ones never meet.

    Args:
        ids_N: Integers from 0 on; compressed ids, where a map is used.
        starts_N: bool [N]: a document begins here. No n-gram reaches over a start: what is missing
            before it counts as a filler.
        order: Tokens of an n-gram, 1 or more.

    Returns:
        int64 [N], below N; equal exactly where the n-grams are equal.
    """
    position_N = np.arange(len(ids_N))
    begin_N = np.maximum.accumulate(np.where(starts_N, position_N, 0))
    _, keys_N = np.unique(ids_N, return_inverse=True)
    size = int(ids_N.max(initial=0)) + 2
    for back in range(1, order):
        before_N = np.zeros(len(ids_N), dtype=np.int64)  # 0 is the filler
        before_N[back:] = ids_N[: len(ids_N) - back] + 1
        before_N[position_N - begin_N < back] = 0
        _, keys_N = np.unique(keys_N * size + before_N, return_inverse=True)
    return keys_N.astype(np.int64)
