"""Which other n-grams of a text share the rows of a token: hashing sends many n-grams to one row.

N-grams are those of the hash: of compressed ids, and cut where look-back stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..addresses.addresser import Addresser
from ..addresses.counts import ngram_keys

_CHUNK = 1 << 17  # tokens whose row ids are computed at a time


@dataclass(frozen=True)
class Sharer:
    """An n-gram of the text that reads the same row.

    Attributes:
        ids: Its raw token ids, as they stand where the text has it first.
        count: How often the text has it.
    """

    ids: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class SharedRow:
    """Who else reads a row in the text.

    Attributes:
        others: Number of other n-grams that read it.
        reads: How often they read it, together.
        frequent: The most frequent of them, most frequent first.
    """

    others: int = 0
    reads: int = 0
    frequent: tuple[Sharer, ...] = ()


@dataclass(frozen=True)
class Collisions:
    """The rows of some tokens, beside a text.

    Attributes:
        counts: order -> int64 [T], how often the text has the n-gram that ends at each token.
        shared: layer -> for each token, for each column, who else reads its row.
    """

    counts: dict[int, np.ndarray]
    shared: dict[int, list[list[SharedRow]]]


def collisions(
    addresser: Addresser,
    ids_T: np.ndarray,
    documents: Sequence[np.ndarray],
    *,
    most: int = 4,
    least: int = 2,
) -> Collisions:
    """Looks for other n-grams with the rows of a token.

    Args:
        addresser: Token ids -> row ids.
        ids_T: Raw ids of the tokens, one document.
        documents: The text: raw ids of each document.
        most: How many sharers to name for each row.
        least: Name those that the text has at least so often.

    Returns:
        Counts and sharers.

    Raises:
        InputError: As `Addresser.all_rows` raises it.
    """
    spec = addresser.spec
    text = _Text(addresser, [ids_T, *documents])
    layers = spec.layer_ids
    shared = {layer: [[SharedRow()] * spec.columns for _ in ids_T] for layer in layers}
    counts = {}
    own_LTC = addresser.all_rows(ids_T[None])[:, 0]
    for number, order in enumerate(spec.orders):
        grams = text.ngrams(order, len(ids_T))
        counts[order] = grams.counts_K[grams.own_T]
        rows_LKC = text.rows_at(grams.first_K)
        for column in range(number * spec.heads, (number + 1) * spec.heads):
            for place, layer in enumerate(layers):
                own_T = own_LTC[place, :, column]
                matches = _matches(rows_LKC[place, :, column], own_T)
                for t, keys in enumerate(matches):
                    others = keys[keys != grams.own_T[t]]
                    others = others[grams.counts_K[others] > 0]
                    shared[layer][t][column] = text.shared(grams, others, order, most, least)
    return Collisions(counts, shared)


def look_back(addresser: Addresser, ids: Sequence[int], end: int, order: int) -> int:
    """The first token that the n-gram ending at token `end` of a document reaches.

    Args:
        addresser: Says at which ids look-back stops.
        ids: Raw ids of the document.
        end: The n-gram's last token.
        order: Its order.
    """
    begin = end
    while begin > max(0, end - order + 1):
        before = int(ids[begin - 1])
        if before == addresser.stop_id or addresser.vocab.table[before] < 0:
            break
        begin -= 1
    return begin


@dataclass(frozen=True)
class _Ngrams:
    """The distinct n-grams of one order.

    own_T: the number of the n-gram at each inspected token. counts_K: how often the text has each,
    the inspected tokens left out. first_K: where each stands first.
    """

    own_T: np.ndarray
    counts_K: np.ndarray
    first_K: np.ndarray


class _Text:
    """The inspected tokens and the documents, one after the other."""

    def __init__(self, addresser: Addresser, documents: Sequence[np.ndarray]) -> None:
        self.addresser = addresser
        self.ids_N = np.concatenate(documents).astype(np.int64)
        lengths = [len(ids) for ids in documents]
        self.starts_N = np.zeros(len(self.ids_N), dtype=bool)
        begins = np.cumsum([0, *lengths])[:-1]
        self.starts_N[begins[begins < len(self.ids_N)]] = True
        self.compressed_N = addresser.vocab(self.ids_N).astype(np.int64)
        # Look-back stops at dead tokens and at the dialect's own stop, so n-grams begin after them.
        stops_N = (self.compressed_N < 0) | (self.ids_N == addresser.stop_id)
        self.cuts_N = self.starts_N.copy()
        self.cuts_N[1:] |= stops_N[:-1]

    def ngrams(self, order: int, inspected: int) -> _Ngrams:
        # A dead token reads the all-filler n-gram, which is no n-gram of the text.
        alive_N = self.compressed_N >= 0
        keys_N = ngram_keys(self.compressed_N + 1, self.cuts_N, order)
        first_K = np.unique(keys_N, return_index=True)[1]
        text_N = alive_N.copy()
        text_N[:inspected] = False
        counts_K = np.bincount(keys_N[text_N], minlength=len(first_K))
        return _Ngrams(keys_N[:inspected], counts_K, first_K)

    def rows_at(self, places_K: np.ndarray) -> np.ndarray:
        """Row ids [L, K, C] of the tokens at these places."""
        spec = self.addresser.spec
        past = spec.order - 1
        rows_LKC = np.empty((len(spec.layer_ids), len(places_K), spec.columns), dtype=np.int64)
        for begin in range(0, len(self.ids_N), _CHUNK):
            chosen = np.flatnonzero((places_K >= begin) & (places_K < begin + _CHUNK))
            if not len(chosen):
                continue
            # The tokens before the chunk are read with it: look-back finds them there.
            low = max(0, begin - past)
            part = slice(low, begin + _CHUNK)
            rows_LNC = self.addresser.all_rows(
                self.ids_N[None, part], starts=self.starts_N[None, part]
            )[:, 0]
            rows_LKC[:, chosen] = rows_LNC[:, places_K[chosen] - low]
        return rows_LKC

    def shared(
        self, grams: _Ngrams, others: np.ndarray, order: int, most: int, least: int
    ) -> SharedRow:
        counts = grams.counts_K[others]
        ranked = np.argsort(-counts, kind="stable")[:most]
        frequent = tuple(
            Sharer(self._ids(int(grams.first_K[others[at]]), order), int(counts[at]))
            for at in ranked
            if counts[at] >= least
        )
        return SharedRow(len(others), int(counts.sum()), frequent)

    def _ids(self, end: int, order: int) -> tuple[int, ...]:
        """Raw ids of the n-gram that ends at a place."""
        cuts = np.flatnonzero(self.cuts_N[max(0, end - order + 1) : end + 1])
        begin = max(0, end - order + 1)
        if len(cuts):
            begin += int(cuts[-1])
        return tuple(self.ids_N[begin : end + 1].tolist())


def _matches(rows_K: np.ndarray, own_T: np.ndarray) -> list[np.ndarray]:
    """For each token, the numbers of the n-grams with the token's row."""
    wanted = np.unique(own_T)
    at_K = np.minimum(np.searchsorted(wanted, rows_K), len(wanted) - 1)
    hits = np.flatnonzero(wanted[at_K] == rows_K)
    by_row: dict[int, list[int]] = {int(row): [] for row in wanted}
    for number in hits.tolist():
        by_row[int(rows_K[number])].append(number)
    return [np.array(by_row[int(row)], dtype=np.int64) for row in own_T]
