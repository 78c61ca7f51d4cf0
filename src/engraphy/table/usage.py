"""What a text does with a table: rows that it touches, n-grams that share one, rows that are asked
for most.

The text is one sequence of token ids; documents in it are not told apart, as released models do
not.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from ..addresses.addresser import Addresser
from ..addresses.tokenizers import load_map
from ..addresses.vocab import VocabMap
from ..errors import InputError
from ..spec.hash import HashSpec
from .table import Table

_STEP = 1 << 16
_GIANT = 2**56


@dataclass(frozen=True)
class HeadUsage:
    """One head of one n-gram order. ngrams: distinct ones in the text. rows, used: rows that the
    head has, and those touched. sharing: distinct n-grams whose row is also that of another one."""

    order: int
    head: int
    ngrams: int
    rows: int
    used: int
    sharing: int


@dataclass(frozen=True)
class HotRow:
    """A row that is asked for often. reads: times. ngrams: distinct n-grams behind them."""

    row: int
    order: int
    head: int
    reads: int
    ngrams: int


@dataclass(frozen=True)
class LayerUsage:
    """One layer. tokens: positions of the text. rows, used: rows of the layer, and those touched.
    hottest: of all heads, most reads first."""

    layer: int
    tokens: int
    rows: int
    used: int
    heads: tuple[HeadUsage, ...]
    hottest: tuple[HotRow, ...]


def usage(table: Table, vocab: VocabMap, ids_T: np.ndarray, hottest: int = 5) -> list[LayerUsage]:
    """Count what the raw ids of a text (integers [T], one sequence) touch in each layer.

    Takes about 100 bytes a token. n-grams are told apart by 64 bits that the table's own rules of
    look-back give, so two of U are taken for one with a chance of U**2 / 2**65. Raises
    DigestMismatch unless the map is the table's, InputError for ids that it does not have.
    """
    table.check_address(table.config.address_digest(vocab.digest))
    if ids_T.ndim != 1 or not len(ids_T):
        raise InputError(f"ids: expected integers [T], found {ids_T.dtype} {list(ids_T.shape)}")
    spec = table.config.hash
    addresser = Addresser(spec, vocab)
    names_TO = _ngram_names(spec, vocab, ids_T)
    found = {layer: ([], []) for layer in spec.layer_ids}
    for index, order in enumerate(spec.orders):
        _, first_U, reads_U = np.unique(names_TO[:, index], return_index=True, return_counts=True)
        columns = slice(index * spec.heads, (index + 1) * spec.heads)
        for layer in spec.layer_ids:
            rows_UK = _rows_at(addresser, layer, ids_T, first_U, columns)
            heads, hot = found[layer]
            for head in range(spec.heads):
                column = index * spec.heads + head
                _count(
                    rows_UK[:, head],
                    reads_U,
                    order,
                    head,
                    spec.primes(layer)[column],
                    hottest,
                    heads,
                    hot,
                )
    return [
        LayerUsage(
            layer,
            len(ids_T),
            table.rows(layer),
            sum(head.used for head in heads),
            tuple(heads),
            tuple(sorted(hot, key=lambda row: (-row.reads, row.row))[:hottest]),
        )
        for layer, (heads, hot) in found.items()
    ]


def find_vocab(
    table: Table, saved: str | os.PathLike[str] | None, tokenizer: Tokenizer | None
) -> VocabMap:
    """The table's vocabulary map: a saved one, else that of a tokenizer, else none at all
    (Qwen4-Exp).

    Raises DigestMismatch where that is not the table's.
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
    """uint64 [T, orders]: what tells n-grams apart. Two rows each of a table too large to fit
    anywhere."""
    giant = dataclasses.replace(
        spec, layer_ids=(0, 1), heads=1, rows_per_head=(_GIANT,) * len(spec.orders), pad_to=1
    )
    addresser, names_TO = (
        Addresser(giant, vocab),
        np.empty((len(ids_T), len(spec.orders)), np.uint64),
    )
    for first in range(0, len(ids_T), _STEP):
        pair_LnO = _addresses(addresser, ids_T, first, min(first + _STEP, len(ids_T))).view(
            np.uint64
        )
        names_TO[first : first + _STEP] = pair_LnO[0] * np.uint64(0x9E3779B97F4A7C15) + pair_LnO[1]
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


def _count(
    rows_U: np.ndarray,
    reads_U: np.ndarray,
    order: int,
    head: int,
    size: int,
    hottest: int,
    heads: list[HeadUsage],
    hot: list[HotRow],
) -> None:
    used, where_U, ngrams = np.unique(rows_U, return_inverse=True, return_counts=True)
    heads.append(
        HeadUsage(order, head, len(rows_U), size, len(used), int(ngrams[ngrams > 1].sum()))
    )
    reads = np.bincount(where_U, reads_U).astype(np.int64)
    top = np.argsort(-reads, kind="stable")[:hottest]
    hot += [
        HotRow(*values)
        for values in zip(
            used[top].tolist(),
            [order] * len(top),
            [head] * len(top),
            reads[top].tolist(),
            ngrams[top].tolist(),
            strict=True,
        )
    ]
