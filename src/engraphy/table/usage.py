"""How a text uses a table: the rows that it reads, n-grams that share a row, the hottest rows.

The text is one sequence of token ids. Documents in it are not separated, as in released models.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from ..addresses.addresser import Addresser
from ..addresses.tokenizers import load_map
from ..addresses.vocab import VocabMap
from ..errors import InputError
from ..spec.hash import HashSpec
from ..system.checks import describe
from .table import Table

_STEP = 1 << 16
_GIANT = 2**56


@dataclass(frozen=True)
class HeadUsage:
    """One head of one n-gram order.

    Attributes:
        order: The n-gram order.
        head: The head, from 0.
        ngrams: Distinct n-grams in the text.
        rows: Rows that the head has; those of hot n-grams are not among them.
        used: Rows that the text reads, of hot n-grams too.
        sharing: Distinct n-grams that share their row with another n-gram.
    """

    order: int
    head: int
    ngrams: int
    rows: int
    used: int
    sharing: int


@dataclass(frozen=True)
class HotRow:
    """A row that is read often.

    Attributes:
        row: Row id in the layer.
        order: The n-gram order.
        head: The head, from 0.
        reads: How often it is read.
        ngrams: Distinct n-grams that read it.
    """

    row: int
    order: int
    head: int
    reads: int
    ngrams: int


@dataclass(frozen=True)
class LayerUsage:
    """One layer.

    Attributes:
        layer: The model's layer.
        tokens: Positions of the text.
        rows: Rows of the layer.
        used: Rows that the text reads.
        heads: Counts of each head of each order.
        hottest: Rows of all heads, most reads first.
    """

    layer: int
    tokens: int
    rows: int
    used: int
    heads: tuple[HeadUsage, ...]
    hottest: tuple[HotRow, ...]


def usage(table: Table, vocab: VocabMap, ids_T: np.ndarray, hottest: int = 5) -> list[LayerUsage]:
    """Counts the rows that a text reads in each layer of a table.

    Takes about 100 bytes of memory per token. n-grams are told apart by 64-bit hashes that follow
    the table's rules of look-back. Among U distinct n-grams, some two count as one with a
    probability of about U**2 / 2**65.

    Args:
        table: The table.
        vocab: Its vocabulary map.
        ids_T: Raw token ids, integers [T], one sequence.
        hottest: Number of hot rows to name in each layer.

    Raises:
        DigestMismatch: The map is not the table's.
        InputError: An id is not in the map, or the shape or dtype of `ids_T` is invalid.
    """
    table.check_address(table.config.address_digest(vocab.digest))
    if ids_T.ndim != 1 or not len(ids_T):
        raise InputError(f"ids: expected integers [T], found {describe(ids_T)}")
    spec = table.config.hash
    addresser = Addresser(spec, vocab, table.hot)
    names_TO = _ngram_names(spec, vocab, ids_T)
    heads: dict[int, list[HeadUsage]] = {layer: [] for layer in spec.layer_ids}
    hot: dict[int, list[HotRow]] = {layer: [] for layer in spec.layer_ids}
    for index, order in enumerate(spec.orders):
        _, first_U, reads_U = np.unique(names_TO[:, index], return_index=True, return_counts=True)
        columns = slice(index * spec.heads, (index + 1) * spec.heads)
        for layer in spec.layer_ids:
            rows_UK = _rows_at(addresser, layer, ids_T, first_U, columns)
            primes = spec.primes(layer)[columns]
            for head, prime in enumerate(primes):
                count = _Count.of(rows_UK[:, head], reads_U)
                heads[layer].append(count.head(order, head, prime))
                hot[layer] += count.hottest(order, head, hottest)
    layers: list[LayerUsage] = []
    for layer in spec.layer_ids:
        used = sum(head.used for head in heads[layer])
        rows = sorted(hot[layer], key=_most_reads_first)[:hottest]
        layers.append(
            LayerUsage(layer, len(ids_T), table.rows(layer), used, tuple(heads[layer]), tuple(rows))
        )
    return layers


def _most_reads_first(row: HotRow) -> tuple[int, int]:
    return -row.reads, row.row


def find_vocab(
    table: Table, saved: str | os.PathLike[str] | None, tokenizer: Tokenizer | None
) -> VocabMap:
    """The table's vocabulary map.

    Args:
        table: The table.
        saved: A saved map. If it is given, the tokenizer is not used.
        tokenizer: Makes the map, unless the table was made with the identity map. Without a
            tokenizer and a saved map the result is the identity (Qwen4-Exp).

    Raises:
        DigestMismatch: The map is not the table's.
    """
    size = table.config.hash.vocab_size
    identity = VocabMap.identity(size)
    if saved is not None:
        vocab = load_map(saved)
    elif tokenizer is None or table.address_digest == table.config.address_digest(identity.digest):
        vocab = identity
    else:
        vocab = VocabMap.from_tokenizer(tokenizer)
    table.check_address(table.config.address_digest(vocab.digest))
    return vocab


def _ngram_names(spec: HashSpec, vocab: VocabMap, ids_T: np.ndarray) -> np.ndarray:
    """uint64 [T, orders]: a hash of the n-gram of each order at each position.

    It combines two row ids of an imaginary table with 2**56 rows per head, which is never stored.
    """
    giant = dataclasses.replace(
        spec, layer_ids=(0, 1), heads=1, rows_per_head=(_GIANT,) * len(spec.orders), pad_to=1
    )
    addresser = Addresser(giant, vocab)
    names_TO = np.empty((len(ids_T), len(spec.orders)), np.uint64)
    for first in range(0, len(ids_T), _STEP):
        last = min(first + _STEP, len(ids_T))
        high_nO, low_nO = _addresses(addresser, ids_T, first, last).view(np.uint64)
        names_TO[first:last] = high_nO * np.uint64(0x9E3779B97F4A7C15) + low_nO
    return names_TO


def _rows_at(
    addresser: Addresser, layer: int, ids_T: np.ndarray, wanted_U: np.ndarray, columns: slice
) -> np.ndarray:
    """int64 [U, K]: the rows that some columns of a layer read at positions `wanted_U`."""
    order_U = np.argsort(wanted_U)
    rows_UK = np.empty((len(wanted_U), columns.stop - columns.start), np.int64)
    bounds = np.searchsorted(wanted_U[order_U], np.arange(0, len(ids_T) + _STEP, _STEP))
    index = addresser.spec.layer_index(layer)
    for number, first in enumerate(range(0, len(ids_T), _STEP)):
        chosen_u = order_U[bounds[number] : bounds[number + 1]]
        rows_nC = _addresses(addresser, ids_T, first, min(first + _STEP, len(ids_T)))[index]
        rows_UK[chosen_u] = rows_nC[wanted_U[chosen_u] - first, columns]
    return rows_UK


def _addresses(addresser: Addresser, ids_T: np.ndarray, first: int, last: int) -> np.ndarray:
    """int64 [L, n, C] of positions first..last-1, with the tokens before them."""
    past = addresser.spec.order - 1
    history_1P = np.full((1, past), -1, np.int64)
    before = ids_T[max(0, first - past) : first]
    history_1P[0, past - len(before) :] = before
    return addresser.all_rows(ids_T[None, first:last], history_1P)[:, 0]


@dataclass(frozen=True)
class _Count:
    """Counts of the distinct n-grams of one order in one head, for the R rows that they read."""

    total: int  # distinct n-grams
    rows_R: np.ndarray
    ngrams_R: np.ndarray
    reads_R: np.ndarray

    @classmethod
    def of(cls, rows_U: np.ndarray, reads_U: np.ndarray) -> _Count:
        """rows_U: the row of each n-gram. reads_U: how often the n-gram occurs in the text."""
        rows_R, row_U, ngrams_R = np.unique(rows_U, return_inverse=True, return_counts=True)
        reads_R = np.bincount(row_U, reads_U).astype(np.int64)
        return cls(len(rows_U), rows_R, ngrams_R, reads_R)

    def head(self, order: int, head: int, rows: int) -> HeadUsage:
        sharing = int(self.ngrams_R[self.ngrams_R > 1].sum())
        return HeadUsage(order, head, self.total, rows, len(self.rows_R), sharing)

    def hottest(self, order: int, head: int, most: int) -> Iterator[HotRow]:
        for index in np.argsort(-self.reads_R, kind="stable")[:most]:
            yield HotRow(
                row=int(self.rows_R[index]),
                order=order,
                head=head,
                reads=int(self.reads_R[index]),
                ngrams=int(self.ngrams_R[index]),
            )
