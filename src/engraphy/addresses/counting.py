"""Exact counts of the n-grams of a corpus of any size, in bounded memory.

The corpus is read once, or several times. N-grams fall into classes by the leading bits of a hash.
A pass counts one class. It begins with all n-grams; whenever it meets more different ones than its
memory holds, it halves its class and leaves the other half to a later pass. So nothing is written
but the best of each class, and a count that was stopped goes on with the class that it was in.

It knows arrays of token ids and the Addresser, which says what an n-gram is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from ..system.checks import as_int, as_ints, describe
from .addresser import Addresser
from .arrays import read_arrays, write_arrays
from .ngrams import Ngrams

LEAST_MEMORY = 1 << 20
"""Bytes with which counting still goes on well."""

_STATE = "engraphy-counting-1"
_STEP = 1 << 16  # tokens whose n-grams are made at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_Progress = Callable[[str, int, int], None]
_Class = tuple[int, int]  # the number of leading bits of the hash, and their value


def count_ngrams(
    addresser: Addresser,
    ids_T: np.ndarray,
    top: int,
    *,
    orders: Sequence[int] | None = None,
    begins: np.ndarray | None = None,
    memory: int = 1 << 30,
    state: str | os.PathLike[str] | None = None,
    progress: _Progress | None = None,
) -> Ngrams:
    """The most frequent n-grams of a corpus, counted exactly.

    Of n-grams that are equally frequent, the one with the smaller ids (the oldest first) comes
    first. N-grams that end at a dead token are none.

    Args:
        addresser: Says which n-gram each token ends.
        ids_T: Raw ids, integers [T]; may be mapped from a file.
        top: How many n-grams of each order to keep.
        orders: By default those of the addresser; none may be larger than its largest.
        begins: Places in `ids_T` at which documents begin; by default the text is one document.
        memory: Bytes that the counts of a pass may take, beside `top` n-grams and some 100 MB.
        state: A folder that keeps what is done. If the same count was stopped, it continues.
        progress: Called with the pass, bytes of ids done, and bytes in all.

    Returns:
        The n-grams, their counts, and the number of live tokens.

    Raises:
        InputError: An id is out of range.
        ConfigError: An argument is invalid, or `state` is that of another count.
        WriteFailed: The system refuses to write to `state`.
    """
    corpus = _Corpus.of(addresser, ids_T, begins)
    orders = addresser.spec.orders if orders is None else as_ints("orders", orders)
    as_int("top", top, 1)
    as_int("memory", memory, LEAST_MEMORY)
    for order in orders:
        as_int("orders", order, 1, addresser.spec.order)
    found: dict[int, _Top] = {}
    tokens = 0
    for order in sorted(set(orders)):
        kept = None if state is None else Path(state) / f"order-{order}"
        work = _Work(corpus, order, top, memory, progress)
        tokens, found[order] = work.run(kept)
    ids = {order: best.ids() for order, best in found.items()}
    counts = {order: best.counts_K for order, best in found.items()}
    return Ngrams(ids, addresser.vocab.digest, counts, tokens)


@dataclass(frozen=True)
class _Corpus:
    """Token ids, and the places where documents begin, ascending."""

    addresser: Addresser
    ids_T: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, addresser: Addresser, ids_T: np.ndarray, begins: np.ndarray | None) -> _Corpus:
        if ids_T.ndim != 1 or ids_T.dtype.kind not in "iu":
            raise InputError(f"ids: expected integers [T], found {describe(ids_T)}")
        places = np.zeros(0, np.int64) if begins is None else np.asarray(begins, dtype=np.int64)
        outside = places.size and not 0 <= places.min() <= places.max() <= len(ids_T)
        if places.ndim != 1 or outside:
            raise InputError(f"begins: expected places from 0 to T, found {describe(places)}")
        return cls(addresser, ids_T, np.unique(places))

    def identity(self) -> str:
        """A digest of what decides the counts, and of some of the ids."""
        spec = self.addresser.spec
        sampled = self.ids_T[:: max(1, len(self.ids_T) >> 12)]
        about = [spec.dialect, spec.filler_id, self.addresser.vocab.digest, len(self.ids_T)]
        text = json.dumps([*about, str(self.ids_T.dtype), len(self.begins)])
        return hashlib.sha256(text.encode() + np.ascontiguousarray(sampled).tobytes()).hexdigest()

    def windows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Tokens read so far, and the n-grams [n, N] that end at the live ones of the last part."""
        past = self.addresser.spec.order - 1
        for first in range(0, len(self.ids_T), _STEP):
            last = min(first + _STEP, len(self.ids_T))
            low = max(0, first - past)  # look-back finds the tokens before the part there
            inside = self.begins[np.searchsorted(self.begins, low) :]
            inside = inside[: np.searchsorted(inside, last)]
            starts = np.zeros((1, last - low), dtype=bool)
            starts[0, inside - low] = True
            ids = np.asarray(self.ids_T[low:last]).astype(np.int64)[None]
            windows_1TN, alive_1T = self.addresser.windows(ids, starts=starts)
            new = slice(first - low, None)
            yield last, windows_1TN[0, new][alive_1T[0, new]]


class _Packing:
    """N-grams as numbers that sort as the n-grams do: W words of 64 bits, the first one highest."""

    def __init__(self, order: int, vocab_size: int) -> None:
        self.order = order
        self._bits = max(1, (vocab_size - 1).bit_length())
        self._each = min(order, 64 // self._bits)  # ids in a word
        self.words = -(-order // self._each)

    def pack(self, ids_Nn: np.ndarray) -> np.ndarray:
        """uint64 [W, N]."""
        keys_WN = np.zeros((self.words, len(ids_Nn)), dtype=np.uint64)
        for i in range(self.order):
            word = keys_WN[i // self._each]
            np.bitwise_or(word << np.uint64(self._bits), ids_Nn[:, i].astype(np.uint64), out=word)
        return keys_WN

    def unpack(self, keys_WN: np.ndarray) -> np.ndarray:
        """int32 [N, n]."""
        ids_Nn = np.empty((keys_WN.shape[1], self.order), dtype=np.int32)
        rest_WN = keys_WN.copy()
        for i in reversed(range(self.order)):
            word = rest_WN[i // self._each]
            ids_Nn[:, i] = word & np.uint64((1 << self._bits) - 1)
            word >>= np.uint64(self._bits)
        return ids_Nn

    def hashes(self, keys_WN: np.ndarray) -> np.ndarray:
        """uint64 [N], by which n-grams fall into classes."""
        value = np.zeros(keys_WN.shape[1], dtype=np.uint64)
        for word in keys_WN:
            value = (value ^ word) * _MULTIPLIER
            value ^= value >> np.uint64(32)
        return value * _MULTIPLIER

    def in_class(self, keys_WN: np.ndarray, chosen: _Class) -> np.ndarray:
        """bool [N]."""
        bits, value = chosen
        if not bits:
            return np.ones(len(keys_WN[0]), dtype=bool)
        leading_N = self.hashes(keys_WN) >> np.uint64(64 - bits)
        return np.equal(leading_N, np.uint64(value))


def _summed(keys_WN: np.ndarray, counts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys [W, K], ascending, and the sums of their counts."""
    if len(keys_WN) == 1:
        order_N = np.argsort(keys_WN[0], kind="stable")
    else:
        order_N = np.lexsort(keys_WN[::-1])
    keys_WN = keys_WN[:, order_N]
    is_new = np.ones(keys_WN.shape[1], dtype=bool)
    is_new[1:] = (keys_WN[:, 1:] != keys_WN[:, :-1]).any(axis=0)
    first_K = np.flatnonzero(is_new)
    before_N: np.ndarray = np.zeros(len(order_N) + 1, dtype=np.int64)
    np.cumsum(counts_N[order_N], out=before_N[1:])
    sums_K = before_N[np.append(first_K, len(order_N))]
    counts_K = sums_K[1:] - sums_K[:-1]
    return keys_WN[:, first_K], counts_K


class _Tally:
    """Counts of the n-grams of one class. `split_off` is called if there are too many."""

    def __init__(self, packing: _Packing, memory: int) -> None:
        self._packing = packing
        # Sorting holds keys and counts three times over, and their order.
        self._most = max(1, memory // (3 * 8 * (packing.words + 1) + 16))
        self.keys_WK = np.zeros((packing.words, 0), dtype=np.uint64)
        self.counts_K = np.zeros(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._size = 0  # keys that wait

    def add(self, keys_WN: np.ndarray) -> None:
        """Counts each of these keys once."""
        self._waiting.append(keys_WN)
        self._size += keys_WN.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether the keys that wait have to be summed."""
        return self._size + len(self.counts_K) > self._most

    def sum(self) -> bool:
        """Sums what waits. Returns whether there are more distinct keys than is good."""
        waiting = np.concatenate([np.zeros_like(self.keys_WK[:, :0]), *self._waiting], axis=1)
        once_N = np.ones(len(waiting[0]), dtype=np.int64)
        keys_WK, counts_K = _summed(waiting, once_N)
        self._waiting = []
        self._size = 0
        self.keys_WK, self.counts_K = _summed(
            np.concatenate([self.keys_WK, keys_WK], axis=1),
            np.concatenate([self.counts_K, counts_K]),
        )
        return len(self.counts_K) > self._most // 2

    def keep(self, chosen: _Class) -> None:
        """Forgets all keys of other classes."""
        kept_K = self._packing.in_class(self.keys_WK, chosen)
        self.keys_WK = self.keys_WK[:, kept_K]
        self.counts_K = self.counts_K[kept_K]


@dataclass(frozen=True)
class _Top:
    """The most frequent n-grams so far, in their final order."""

    packing: _Packing
    keys_WK: np.ndarray
    counts_K: np.ndarray

    def ids(self) -> np.ndarray:
        return self.packing.unpack(self.keys_WK)

    def joined(self, keys_WK: np.ndarray, counts_K: np.ndarray, most: int) -> _Top:
        """With the n-grams of another class."""
        keys_WK = np.concatenate([self.keys_WK, keys_WK], axis=1)
        counts_K = np.concatenate([self.counts_K, counts_K])
        order_K = np.lexsort([*keys_WK[::-1], -counts_K])[:most]
        return _Top(self.packing, keys_WK[:, order_K], counts_K[order_K])


class _Work:
    """The passes that count one order."""

    def __init__(
        self, corpus: _Corpus, order: int, top: int, memory: int, progress: _Progress | None
    ) -> None:
        self._corpus = corpus
        self._order = order
        self._top = top
        self._memory = memory
        self._progress = progress
        self._packing = _Packing(order, len(corpus.addresser.vocab))

    def run(self, state: Path | None) -> tuple[int, _Top]:
        """Live tokens, and the most frequent n-grams."""
        pending: list[_Class] = [(0, 0)]
        nothing = np.zeros((self._packing.words, 0), np.uint64)
        best = _Top(self._packing, nothing, np.zeros(0, np.int64))
        tokens = 0
        if state is not None and state.exists():
            pending, tokens, best = self._load(state)
        while pending:
            tokens, best = self._pass(pending, best)
            if state is not None:
                self._save(state, pending, tokens, best)
        return tokens, best

    def _pass(self, pending: list[_Class], best: _Top) -> tuple[int, _Top]:
        """Counts the last pending class. What it leaves out becomes pending."""
        chosen = pending.pop()
        tally = _Tally(self._packing, self._memory)
        tokens = 0
        item = self._corpus.ids_T.itemsize
        for done, windows_nN in self._corpus.windows():
            tokens += len(windows_nN)
            keys_Wn = self._packing.pack(windows_nN[:, -self._order :])
            tally.add(keys_Wn[:, self._packing.in_class(keys_Wn, chosen)])
            while tally.is_full and tally.sum():
                bits, value = chosen
                pending.append((bits + 1, 2 * value + 1))
                chosen = (bits + 1, 2 * value)
                tally.keep(chosen)
            if self._progress:
                whole = len(self._corpus.ids_T) * item
                left = f", {len(pending)} more" if pending else ""
                self._progress(f"order {self._order}{left}", done * item, whole)
        tally.sum()
        return tokens, best.joined(tally.keys_WK, tally.counts_K, self._top)

    def _identity(self) -> str:
        return f"{self._corpus.identity()} {self._order} {self._top}"

    def _save(self, path: Path, pending: list[_Class], tokens: int, best: _Top) -> None:
        about: dict[str, Any] = {"pending": pending, "tokens": tokens, "of": self._identity()}
        arrays = {"counts": best.counts_K, "keys": best.keys_WK.view(np.int64)}
        write_arrays(path, arrays, {"format": _STATE, "about": json.dumps(about)})

    def _load(self, path: Path) -> tuple[list[_Class], int, _Top]:
        arrays, metadata = read_arrays(path, _STATE)
        about = json.loads(metadata["about"])
        if about["of"] != self._identity():
            raise ConfigError(
                f"{path}: expected the state of this count, found that of another corpus, map or "
                "size; remove its folder to begin anew"
            )
        pending = [(int(bits), int(value)) for bits, value in about["pending"]]
        keys_WK = np.array(arrays["keys"]).view(np.uint64)
        return pending, int(about["tokens"]), _Top(self._packing, keys_WK, arrays["counts"])
