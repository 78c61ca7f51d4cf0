"""Addresser: token ids -> row ids, pure arithmetic. It knows no store and no tensor.

The plain numpy version below is the specification; the native kernel beside it gives the same
numbers.

    mix_n(t) = XOR over i < n of x[t-i] * m[i]          (int64, no product overflows)
    row      = mix_n mod prime[n, k] + offset[n, k]     (paper, section 2.2)

A hot n-gram of order n has rows of its own in place of these, row_count + slot * K + k for the K
heads of its order (hot.py).

x is the compressed id. At the first position that look-back may not reach, and at all positions
before it, x is the filler. Look-back never reaches before the sequence, past a document start, past
a dead position, or (in Qwen4-Exp) past EOS.
"""

# pyright: reportUnnecessaryIsInstance=false, reportPrivateUsage=false
# Callers need not be typed, so arguments are checked at run time too. `_native` is private to the
# package, not to a folder.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .. import _native
from ..errors import ConfigError, DigestMismatch, InputError
from ..spec.hash import HashSpec
from .hot import HotIndex
from .vocab import VocabMap

if TYPE_CHECKING:
    from .._native._core import HashPlan
    from .._native._core import HotOrder as NativeOrder

_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


class Addresser:
    """Row ids of every memory layer for raw token ids. Immutable: the caller keeps the history.

    Attributes:
        spec: How ids are hashed.
        vocab: Raw ids -> compressed ids.
        filler: The compressed id of positions that look-back may not reach.
        hot: The index of n-grams that have rows of their own, None if there are none.
        stop_id: The raw id that ends look-back, -1 if there is none.

    Raises:
        DigestMismatch: The spec's vocab_size, on which the multipliers depend, is not len(vocab);
            or the index was made with another map.
        ConfigError: The filler has no token, or `hot` is no index or has an order that is not
            hashed.
    """

    def __init__(self, spec: HashSpec, vocab: VocabMap, hot: HotIndex | None = None):
        if hot is not None:
            _check_hot(spec, vocab, hot)
        if spec.vocab_size != len(vocab):
            raise DigestMismatch(
                f"vocab_size: expected {spec.vocab_size} compressed ids, as in the hash spec, "
                f"found {len(vocab)} in the vocabulary map"
            )
        filler = int(vocab.table[spec.filler_id]) if spec.filler_id < vocab.raw_size else -1
        if filler < 0:
            raise ConfigError(
                "filler_id: expected a raw id with a token in the vocabulary map, "
                f"found {spec.filler_id}"
            )
        self.spec = spec
        self.vocab = vocab
        self.hot = hot
        self.filler = filler
        self.stop_id = spec.filler_id if spec.rules.stops_at_filler else -1
        self._multipliers_LN = np.array(
            [spec.multipliers(layer) for layer in spec.layer_ids], dtype=np.int64
        )
        self._primes_LC = np.array([spec.primes(layer) for layer in spec.layer_ids], dtype=np.int64)
        self._offsets_LC = np.array(
            [spec.offsets(layer) for layer in spec.layer_ids], dtype=np.int64
        )
        self._plan: HashPlan | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Addresser, (self.spec, self.vocab, self.hot)

    def __repr__(self) -> str:
        spec = self.spec
        layers = " ".join(str(layer) for layer in spec.layer_ids)
        rows = sum(spec.row_count(layer) for layer in spec.layer_ids)
        hot = "" if self.hot is None else f", {self.hot!r}"
        return (
            f"Addresser({spec.dialect}, layers {layers}, {spec.columns} columns, {rows:.2g} rows, "
            f"spec {spec.digest()[:8]}…, {self.vocab!r}{hot})"
        )

    def rows(
        self, ids_BT: Any, layer: int, history: Any = None, live: Any = None, starts: Any = None
    ) -> np.ndarray:
        """Flat row ids of one layer.

        Args:
            ids_BT, history, live, starts: As in `all_rows`.
            layer: One of spec.layer_ids.

        Returns:
            int64 [B, T, C].

        Raises:
            InputError: As in `all_rows`.
            ConfigError: The layer has no memory.
        """
        index = self.spec.layer_index(layer)
        return self._compute(ids_BT, slice(index, index + 1), history, live, starts)[0]

    def all_rows(
        self,
        ids_BT: Any,
        history: Any = None,
        live: Any = None,
        starts: Any = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Flat row ids of all layers.

        Ids without a token (-1 in the map) are dead. Rows at dead positions are those of the
        all-filler n-gram.

        Args:
            ids_BT: int64 or int32, raw ids.
            history: int [B, N-1], raw ids before the chunk; -1 = nothing there, nor before it.
            live: bool [B, T]. False: the position takes part in no n-gram.
            starts: bool [B, T]. True: a document begins here. None = as released.
            out: int64 [L, B, T, C], C-contiguous; is filled and returned.

        Returns:
            int64 [L, B, T, C], layers in the order of spec.layer_ids.

        Raises:
            InputError: An id is out of range (the message names its position and value), or a shape
                or dtype does not fit.
        """
        return self._compute(ids_BT, slice(0, len(self.spec.layer_ids)), history, live, starts, out)

    def windows(
        self, ids_BT: Any, history: Any = None, live: Any = None, starts: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The n-grams that are hashed: what the rows of each token are computed from.

        Args:
            ids_BT, history, live, starts: As in `all_rows`.

        Returns:
            int64 [B, T, N], compressed ids, the oldest first; the filler where look-back may not
            reach. The n-gram of order n is the last n of them. And bool [B, T], False where the
            position is dead: it has the all-filler n-gram.

        Raises:
            InputError: As in `all_rows`.
        """
        terms, alive = self._plain_terms(self._check(ids_BT, history, live, starts))
        return np.stack(terms[::-1], axis=-1), alive

    def ngram_rows(self, ids_Nn: np.ndarray, layer: int) -> np.ndarray:
        """The rows of n-grams, wherever they stand.

        Args:
            ids_Nn: Compressed ids, integers [N, n], the oldest first. n is one of spec.orders.
            layer: One of spec.layer_ids.

        Returns:
            int64 [N, K], flat row ids of the layer: those of the order's columns.

        Raises:
            ConfigError: The layer has no memory, or the order is not hashed.
        """
        index = self.spec.layer_index(layer)
        order = ids_Nn.shape[1]
        if order not in self.spec.orders:
            raise ConfigError(
                f"n-grams: expected an order of {list(self.spec.orders)}, found {order}"
            )
        terms = [ids_Nn[:, order - 1 - i].astype(np.int64) for i in range(order)]
        return self._order_rows(terms, index, self.spec.orders.index(order), self._slots(terms))

    def chunk(
        self, ids_BT: Any, history: Any = None, live: Any = None, starts: Any = None
    ) -> Chunk:
        """A checked copy of the arguments of `all_rows`, for a caller that computes rows later.

        Raises:
            InputError: As in `all_rows`.
        """
        chunk = self._check(ids_BT, history, live, starts, copy=True)
        if _native.core is None:
            alive = self._plain_ids(chunk)[2][:, self.spec.order - 1 :]
        else:
            alive = np.empty(chunk.ids_BT.shape, dtype=bool)
            self._native(chunk, slice(0, 1), None, alive)
        return replace(chunk, alive=None if alive.all() else alive)

    def _compute(
        self,
        ids_BT: Any,
        layers: slice,
        history: Any,
        live: Any,
        starts: Any,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        chunk = self._check(ids_BT, history, live, starts)
        shape = (layers.stop - layers.start, *chunk.ids_BT.shape, self.spec.columns)
        if out is None:
            out = np.empty(shape, dtype=np.int64)
        else:
            _check_out(out, shape)
        if _native.core is None:
            self._plain(chunk, layers, out)
        else:
            self._native(chunk, layers, out)
        return out

    def _check(
        self, ids_BT: Any, history: Any, live: Any, starts: Any, copy: bool = False
    ) -> Chunk:
        ids_BT = _integers("ids", ids_BT, None, copy)
        if ids_BT.ndim != 2:
            raise InputError(f"ids: expected [B, T], found shape {list(ids_BT.shape)}")
        batch, _ = ids_BT.shape
        past = self.spec.order - 1
        if history is not None:
            history = _integers("history", history, (batch, past), copy)
        return Chunk(
            ids_BT,
            history,
            _flags("live", live, ids_BT.shape, copy),
            _flags("starts", starts, ids_BT.shape, copy),
        )

    @property
    def plan(self) -> HashPlan:
        """The `HashPlan` of the native core, made at first use."""
        plan = self._plan
        if plan is None:
            plan = self._plan = _native.compiled().HashPlan(
                map=_address(self.vocab.table),
                vocab=self.vocab.raw_size,
                filler=self.filler,
                stop=self.stop_id,
                orders=self.spec.orders,
                heads=self.spec.heads,
                layers=len(self.spec.layer_ids),
                multipliers=_address(self._multipliers_LN),
                primes=_address(self._primes_LC),
                offsets=_address(self._offsets_LC),
                hot=self._native_hot(),
                hot_first=[self.spec.row_count(layer) for layer in self.spec.layer_ids],
            )
        return plan

    def _native_hot(self) -> list[NativeOrder | None]:
        """Hot n-grams of each order; empty if there is no index."""
        hot = self.hot
        if hot is None:
            return []
        slots = hot.spec.slots
        return [
            hot.part(order).native(slots) if order in hot.orders else None
            for order in self.spec.orders
        ]

    def _native(
        self,
        chunk: Chunk,
        layers: slice,
        out_LBTC: np.ndarray | None,
        alive_BT: np.ndarray | None = None,
    ) -> None:
        """The same numbers from the compiled kernel (`_native/hash_kernel.cpp`).

        Args:
            chunk: Arguments.
            layers: Of these places in spec.layer_ids.
            out_LBTC: Gets the row ids; None = they are not wanted.
            alive_BT: Gets True where a position is live and its id has a token; None = not wanted.
        """
        batch, tokens = chunk.ids_BT.shape
        all_layers = layers.stop - layers.start == len(self.spec.layer_ids)
        code = self.plan.rows(
            _address(chunk.ids_BT),
            batch,
            tokens,
            _address(chunk.history),
            _address(chunk.live),
            _address(chunk.starts),
            _address(out_LBTC),
            -1 if all_layers else layers.start,
            _address(alive_BT),
        )
        # -1: all ids are valid. Otherwise the flat position p of the first bad one: p in the ids,
        # -2 - p in the history.
        if code >= 0:
            sequence, position = divmod(code, tokens)
            bad_id = int(chunk.ids_BT[sequence, position])
            raise _bad_id(bad_id, sequence, position, self.vocab.raw_size)
        if code < -1 and chunk.history is not None:
            past = self.spec.order - 1
            sequence, position = divmod(-2 - code, past)
            bad_id = int(chunk.history[sequence, position])
            raise _bad_id(bad_id, sequence, position - past, self.vocab.raw_size)

    def _plain(self, chunk: Chunk, layers: slice, out_LBTC: np.ndarray) -> None:
        """The specification: this code alone defines an address."""
        spec = self.spec
        terms, _ = self._plain_terms(chunk)
        slots = [self._slots(terms[:order]) for order in spec.orders]
        for place, index in enumerate(range(layers.start, layers.stop)):
            for number, order in enumerate(spec.orders):
                heads = slice(number * spec.heads, (number + 1) * spec.heads)
                rows = self._order_rows(terms[:order], index, number, slots[number])
                out_LBTC[place, :, :, heads] = rows

    def _slots(self, terms: list[np.ndarray]) -> np.ndarray | None:
        """Hot slots of the n-grams x[t], x[t-1], ...; -1 = not hot; None if no n-gram is hot."""
        return None if self.hot is None else self.hot.slots_of(np.stack(terms[::-1], axis=-1))

    def _order_rows(
        self, terms: list[np.ndarray], layer: int, number: int, slots: np.ndarray | None
    ) -> np.ndarray:
        """Row ids [..., K] of n-grams x[t], x[t-1], ...

        Args:
            terms: The n ids.
            layer, number: Places of the layer and of the order in the spec.
            slots: What `_slots` gives for them.
        """
        spec = self.spec
        mix = np.zeros(terms[0].shape, dtype=np.int64)
        for i, term in enumerate(terms):
            mix = mix ^ term * self._multipliers_LN[layer, i]
        heads = slice(number * spec.heads, (number + 1) * spec.heads)
        rows = mix[..., None] % self._primes_LC[layer, heads] + self._offsets_LC[layer, heads]
        if slots is None:
            return rows
        first = spec.row_count(spec.layer_ids[layer])
        own = first + slots[..., None] * spec.heads + np.arange(spec.heads)
        return np.where(slots[..., None] >= 0, own, rows)

    def _plain_terms(self, chunk: Chunk) -> tuple[list[np.ndarray], np.ndarray]:
        """What is hashed, and where there is a live token.

        Returns:
            x[t-i] or the filler for i from 0 to N-1, int64 [B, T] each; and bool [B, T].
        """
        past = self.spec.order - 1
        ids, x, alive = self._plain_ids(chunk)
        blocked = ~alive | (ids == self.stop_id)  # look-back may not reach these
        resets = np.ones_like(blocked)  # so it begins again after them
        resets[:, 1:] = blocked[:, :-1]
        if chunk.starts is not None:
            resets[:, past:] |= chunk.starts
        width: int = ids.shape[1]
        positions = np.arange(width)
        reset_at = np.where(resets, positions, 0)
        # Earlier tokens that each position may see.
        run = positions - np.maximum.accumulate(reset_at, axis=1)
        run[~alive] = 0

        terms = [x[:, past:]]
        for i in range(1, past + 1):
            shifted = x[:, past - i : width - i]
            terms.append(np.where(run[:, past:] >= i, shifted, self.filler))
        return terms, alive[:, past:]

    def _plain_ids(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw ids, x, and where there is a live token, [B, N-1+T]."""
        past = self.spec.order - 1
        vocab_size = self.vocab.raw_size
        history = chunk.history
        if history is None:
            history = np.full((len(chunk.ids_BT), past), -1, dtype=np.int64)
        ids = np.concatenate([history, chunk.ids_BT], axis=1)
        live = np.ones(chunk.ids_BT.shape, dtype=bool) if chunk.live is None else chunk.live
        alive = np.concatenate([history != -1, live], axis=1)
        out_of_range = alive & ((ids < 0) | (ids >= vocab_size))
        if out_of_range.any():
            b, position = np.argwhere(out_of_range)[0]
            raise _bad_id(int(ids[b, position]), int(b), int(position) - past, vocab_size)
        x = np.where(alive, self.vocab.table[np.where(alive, ids, 0)], -1).astype(np.int64)
        alive &= x >= 0
        x[~alive] = self.filler
        return ids, x, alive


@dataclass(frozen=True)
class Chunk:
    """Arguments of `Addresser.all_rows` that have been checked: C-contiguous int64 and bool arrays.

    Attributes:
        ids_BT, history, live, starts: As in `all_rows`.
        alive: bool [B, T], which positions are live and have a token; None = all. Set by
            `Addresser.chunk` alone.
    """

    ids_BT: np.ndarray
    history: np.ndarray | None
    live: np.ndarray | None
    starts: np.ndarray | None
    alive: np.ndarray | None = None


def _check_hot(spec: HashSpec, vocab: VocabMap, hot: HotIndex) -> None:
    if not isinstance(hot, HotIndex):
        raise ConfigError(f"hot: expected a HotIndex, found {type(hot).__name__}")
    if hot.vocab_digest != vocab.digest:
        raise DigestMismatch(
            f"hot: expected an index of vocabulary map {vocab.digest}, found {hot.vocab_digest}"
        )
    unknown = sorted(set(hot.orders) - set(spec.orders))
    if unknown:
        raise ConfigError(
            f"hot: expected n-grams of orders {list(spec.orders)}, which are hashed, "
            f"found {unknown}"
        )


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        # Ragged lists, and tensors that are not in this machine's memory.
        raise InputError(
            f"{name}: expected an array, found {type(values).__name__}: {error}"
        ) from None


def _check_out(out: Any, shape: tuple[int, ...]) -> None:
    expected = f"writable, aligned, C-contiguous int64 {list(shape)}"
    if not isinstance(out, np.ndarray):
        raise InputError(f"out: expected {expected}, found {type(out).__name__}")
    array = cast("np.ndarray[Any, np.dtype[Any]]", out)
    if array.shape != shape or array.dtype != np.int64 or not array.flags.carray:
        raise InputError(f"out: expected {expected}, found {array.dtype} {list(array.shape)}")


def _address(values: np.ndarray | None) -> int:
    return 0 if values is None else _native.compiled().address(values)


def _integers(name: str, values: Any, shape: tuple[int, ...] | None, copy: bool) -> np.ndarray:
    values = _array(name, values)
    if values.dtype not in _INTEGERS:
        raise InputError(f"{name}: expected int64 or int32, found {values.dtype}")
    if shape is not None and values.shape != shape:
        raise InputError(f"{name}: expected shape {list(shape)}, found {list(values.shape)}")
    if copy:
        return np.array(values, dtype=np.int64, order="C")
    return np.ascontiguousarray(values, dtype=np.int64)


def _flags(name: str, values: Any, shape: tuple[int, ...], copy: bool) -> np.ndarray | None:
    if values is None:
        return None
    values = _array(name, values)
    if values.dtype != np.bool_ or values.shape != shape:
        raise InputError(
            f"{name}: expected bool {list(shape)}, found {values.dtype} {list(values.shape)}"
        )
    return np.array(values, order="C") if copy else np.ascontiguousarray(values)


def _bad_id(value: int, sequence: int, position: int, vocab_size: int) -> InputError:
    place = f"position {position}" if position >= 0 else f"history {position}"
    where = f"sequence {sequence}, {place}"
    return InputError(f"token id at {where}: expected 0 to {vocab_size - 1}, found {value}")
