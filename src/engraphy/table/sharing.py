"""Which frequent n-grams share rows: hashing sends many n-grams to one row.

It takes what a table says of itself, its hash and its vocabulary map, and no rows: a layout can be
looked at without its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..addresses.addresser import Addresser
from ..addresses.frequent import rows_of
from ..addresses.ngrams import Ngrams
from ..errors import ConfigError, DigestMismatch

_NAMED = 4  # n-grams of a shared row
_Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HeadSharing:
    """One head of an order.

    Attributes:
        head: The head, from 0.
        rows: Rows that the head has; those of hot n-grams are not among them.
        used: Rows that the n-grams read, those of hot n-grams too.
        sharing: N-grams that share their row with another one.
        expected: How many would share it if rows were drawn at random and no n-gram was hot.
        reads: The share of the n-grams' counts that the sharing ones have; 0 without counts.
        most: N-grams of the row that most of them read.
    """

    head: int
    rows: int
    used: int
    sharing: int
    expected: float
    reads: float
    most: int


@dataclass(frozen=True)
class RankedNgram:
    """A frequent n-gram.

    Attributes:
        rank: Its place among the n-grams of its order, from 0: the most frequent one.
        ids: Its compressed ids, the oldest first.
        count: How often the corpus has it; 0 if that is not known.
    """

    rank: int
    ids: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class SharedRow:
    """A row that several n-grams read.

    Attributes:
        head: The head.
        row: Row id in the layer.
        ngrams: The most frequent n-grams of the row, at most four.
        total: All n-grams of the row.
    """

    head: int
    row: int
    ngrams: tuple[RankedNgram, ...]
    total: int


@dataclass(frozen=True)
class OrderSharing:
    """The frequent n-grams of one order in one layer.

    Attributes:
        layer: The model's layer.
        order: n.
        ngrams: How many n-grams were looked at.
        heads: What is shared in each head.
        in_heads: [K + 1]: n-grams that share their row in none, in one, ... in all K heads.
        examples: Shared rows, those first whose second n-gram is most frequent.
    """

    layer: int
    order: int
    ngrams: int
    heads: tuple[HeadSharing, ...]
    in_heads: tuple[int, ...]
    examples: tuple[SharedRow, ...]


def shared_rows(
    addresser: Addresser, ngrams: Ngrams, *, examples: int = 5, progress: _Progress | None = None
) -> list[OrderSharing]:
    """Counts the n-grams that share rows, in each layer, order and head.

    N-grams of different orders never share a row, nor do different heads. It takes 8 K + 60 bytes
    of memory for each n-gram of an order of K heads, one order of one layer at a time.

    Args:
        addresser: Says which rows an n-gram reads.
        ngrams: The n-grams, the most frequent ones first.
        examples: Shared rows to name for each order and layer.
        progress: Called with the stage, bytes of row ids done, and bytes in all.

    Returns:
        By layer, then by order.

    Raises:
        DigestMismatch: The n-grams are those of another vocabulary map.
        ConfigError: They have an order that is not hashed.
    """
    spec = addresser.spec
    if ngrams.vocab_digest != addresser.vocab.digest:
        raise DigestMismatch(
            f"n-grams: expected ids of vocabulary map {addresser.vocab.digest}, "
            f"found {ngrams.vocab_digest}"
        )
    foreign = sorted(set(ngrams.ids) - set(spec.orders))
    if foreign:
        raise ConfigError(
            f"n-grams: expected orders of {list(spec.orders)}, which are hashed, found {foreign}"
        )
    whole = 8 * spec.heads * len(spec.layer_ids) * sum(map(len, ngrams.ids.values()))
    done = 0
    result: list[OrderSharing] = []
    for layer in spec.layer_ids:
        for order in ngrams.ids:
            work = _Work(addresser, ngrams, layer, order)
            result.append(work.run(examples))
            done += 8 * spec.heads * len(work.ids_Nn)
            if progress is not None:
                progress(f"layer {layer}, order {order}", done, whole)
    return result


class _Work:
    """One order of one layer."""

    def __init__(self, addresser: Addresser, ngrams: Ngrams, layer: int, order: int) -> None:
        spec = addresser.spec
        number = spec.orders.index(order)
        self._addresser = addresser
        self._layer = layer
        self._order = order
        self._primes = spec.primes(layer)[number * spec.heads : (number + 1) * spec.heads]
        self.ids_Nn = ngrams.ids[order]
        self._counts_N = ngrams.counts.get(order)

    def run(self, examples: int) -> OrderSharing:
        rows_KN = rows_of(self._addresser, self.ids_Nn, self._layer)
        in_heads_N = np.zeros(len(self.ids_Nn), dtype=np.uint8)
        heads: list[HeadSharing] = []
        found: list[SharedRow] = []
        for head, rows_N in enumerate(rows_KN):
            groups = _Groups.of(rows_N)
            sharing_N = groups.sharing()
            in_heads_N += sharing_N
            heads.append(self._head(head, groups, sharing_N))
            found += self._examples(head, groups, examples)
        found.sort(key=_second_rank)
        in_heads = np.bincount(in_heads_N, minlength=len(rows_KN) + 1)
        return OrderSharing(
            self._layer,
            self._order,
            len(self.ids_Nn),
            tuple(heads),
            tuple(in_heads.tolist()),
            tuple(found[:examples]),
        )

    def _head(self, head: int, groups: _Groups, sharing_N: np.ndarray) -> HeadSharing:
        count, rows = len(sharing_N), self._primes[head]
        alone = (1 - 1 / rows) ** max(0, count - 1)
        reads = 0.0
        if self._counts_N is not None and count:
            reads = float(self._counts_N[sharing_N].sum() / self._counts_N.sum())
        return HeadSharing(
            head,
            rows,
            len(groups.size_G),
            int(sharing_N.sum()),
            count * (1 - alone),
            reads,
            int(groups.size_G.max(initial=0)),
        )

    def _examples(self, head: int, groups: _Groups, most: int) -> Iterator[SharedRow]:
        shared = np.flatnonzero(groups.size_G > 1)
        second = groups.ngram_N[groups.first_G[shared] + 1]
        for group in shared[np.argsort(second)[:most]].tolist():
            first, size = int(groups.first_G[group]), int(groups.size_G[group])
            named = groups.ngram_N[first : first + min(size, _NAMED)].tolist()
            ngrams = tuple(self._ranked(rank) for rank in named)
            yield SharedRow(head, int(groups.row_G[group]), ngrams, size)

    def _ranked(self, rank: int) -> RankedNgram:
        count = 0 if self._counts_N is None else int(self._counts_N[rank])
        return RankedNgram(rank, tuple(self.ids_Nn[rank].tolist()), count)


def _second_rank(row: SharedRow) -> tuple[int, int]:
    return row.ngrams[1].rank, row.head


@dataclass(frozen=True)
class _Groups:
    """The n-grams of one head by their rows: group G is the n-grams of one row.

    ngram_N: the n-grams, group by group, in a group by rank. first_G: where a group begins.
    """

    ngram_N: np.ndarray
    row_G: np.ndarray
    first_G: np.ndarray
    size_G: np.ndarray

    @classmethod
    def of(cls, rows_N: np.ndarray) -> _Groups:
        ngram_N = np.argsort(rows_N, kind="stable")
        ordered_N = rows_N[ngram_N]
        is_first_N = np.ones(len(rows_N), dtype=bool)
        is_first_N[1:] = ordered_N[1:] != ordered_N[:-1]
        first_G = np.flatnonzero(is_first_N)
        size_G = np.diff(first_G, append=len(rows_N))
        return cls(ngram_N, ordered_N[first_G], first_G, size_G)

    def sharing(self) -> np.ndarray:
        """bool [N]: whether each n-gram shares its row."""
        sharing_N = np.zeros(len(self.ngram_N), dtype=bool)
        sharing_N[self.ngram_N] = np.repeat(self.size_G > 1, self.size_G)
        return sharing_N
