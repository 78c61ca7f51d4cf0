"""The rows that frequent n-grams read, the most read ones first: what a fixed cache should have."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError, DigestMismatch
from ..system.checks import as_int
from .addresser import Addresser
from .ngrams import Ngrams

_STEP = 1 << 16  # n-grams whose row ids are computed at a time


def frequent_rows(
    addresser: Addresser, ngrams: Ngrams, layer: int, most: int | None = None
) -> np.ndarray:
    """Rows of one layer by how often n-grams read them.

    It takes 8 K + 50 bytes of memory for each n-gram of an order of K heads, one order at a time,
    and 40 bytes for each row that may be in the result.

    Args:
        addresser: Says which rows an n-gram reads.
        ngrams: N-grams with their counts. Those that share a row add up.
        layer: One of the layers of the spec.
        most: Only so many rows.

    Returns:
        int64 [N], distinct row ids, the most read first; of equal ones the smaller id.

    Raises:
        DigestMismatch: The n-grams are those of another vocabulary map.
        ConfigError: They have no counts, the layer has no memory, or `most` is no size.
    """
    if ngrams.vocab_digest != addresser.vocab.digest:
        raise DigestMismatch(
            f"n-grams: expected ids of vocabulary map {addresser.vocab.digest}, "
            f"found {ngrams.vocab_digest}"
        )
    most = None if most is None else as_int("most", most, 0)
    rows: list[np.ndarray] = [np.zeros(0, np.int64)]
    reads: list[np.ndarray] = [np.zeros(0, np.int64)]
    for order, ids_Nn in ngrams.ids.items():
        counts_N = ngrams.counts.get(order)
        if counts_N is None:
            raise ConfigError(f"n-grams: expected counts of order {order}, found none")
        # Heads and orders have rows of their own, so the sums of one head are final.
        for rows_N in rows_of(addresser, ids_Nn, layer):
            row_R, at_N = np.unique(rows_N, return_inverse=True)
            reads_R = np.bincount(at_N, counts_N).astype(np.int64)
            best_R = np.argsort(-reads_R, kind="stable")[:most]
            rows.append(row_R[best_R])
            reads.append(reads_R[best_R])
    rows_n = np.concatenate(rows)
    return rows_n[np.lexsort([rows_n, -np.concatenate(reads)])[:most]]


def rows_of(addresser: Addresser, ids_Nn: np.ndarray, layer: int) -> np.ndarray:
    """The rows of n-grams of one order in each head, int64 [K, N]; a part of them at a time.

    Args and errors are those of `Addresser.ngram_rows`.
    """
    heads = addresser.spec.heads
    rows_KN = np.empty((heads, len(ids_Nn)), dtype=np.int64)
    for first in range(0, len(ids_Nn), _STEP):
        part = slice(first, first + _STEP)
        rows_KN[:, part] = addresser.ngram_rows(ids_Nn[part], layer).T
    return rows_KN
