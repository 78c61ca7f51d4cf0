"""HotIndex: frequent n-grams -> slots, so that each has rows of its own in a table.

It knows n-grams as ids, but neither hash specifications nor tables. For each order there is a
minimal perfect hash (perfect_hash.py), and a record for each n-gram at its number: the slot, and
the n-gram itself, so that no other one is taken for it. In the fingerprint form the record has some
bits of a hash in the n-gram's place: others with the same bits are taken for it (as in "A
Collision-Free Hot-Tier Extension for Engram-Style Conditional Memory", arXiv 2601.16531).
"""

# pyright: reportPrivateUsage=false
# `_native` is private to the package, not to a folder.

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _native
from ..errors import ConfigError, DigestMismatch
from ..spec.hot import HotSpec
from ..system.checks import as_int
from .arrays import read_arrays, write_arrays
from .ngrams import MOST_ORDER, Ngrams
from .perfect_hash import (
    MOST_LEVELS,
    MOST_SEEDS,
    WORDS,
    PerfectHash,
    key_hashes,
    level_hashes,
)

if TYPE_CHECKING:
    from .._native._core import HotOrder as NativeOrder

FILE_NAME = "hot.index"
"""Name of the file in a table's folder."""

_FORMAT = "engraphy-hot-1"
_FINGERPRINT = MOST_LEVELS  # the hash of a level that is never reached


class FalseHits(NamedTuple):
    """N-grams that a fingerprint index takes for others.

    Attributes:
        ngrams: How many distinct ones.
        reads: How often the corpus has them; 0 if the counts are not known.
    """

    ngrams: int
    reads: int


@dataclass(frozen=True, eq=False)
class HotOrder:
    """The hot n-grams of one order.

    Attributes:
        order: n.
        perfect: N-gram -> number.
        records_NR: uint32 [N, 1 + n]: at each number the slot, then the ids, the oldest first; in
            the fingerprint form [N, 2], the slot and the fingerprint.
        fingerprint_bits: As in `HotIndex`.
    """

    order: int
    perfect: PerfectHash
    records_NR: np.ndarray
    fingerprint_bits: int | None

    def native(self, slots: int) -> NativeOrder:
        """The same for native code. slots: those of the whole index."""
        core = _native.compiled()
        return core.HotOrder(
            self.order,
            self.perfect.seed,
            self.perfect.sizes,
            core.address(self.perfect.blocks_BW),
            core.address(self.records_NR),
            len(self.records_NR),
            self.fingerprint_bits or 0,
            slots,
            self,
        )

    def slots_of(self, ids_Nn: np.ndarray, slots: int) -> np.ndarray:
        """int64 [N]: the slot of each n-gram, -1 if it is not hot. slots: of the whole index."""
        if _native.core is not None and _are_ids(ids_Nn):
            return self._native_slots(np.ascontiguousarray(ids_Nn, dtype=np.int32), slots)
        ranks_N = self.perfect.ranks(ids_Nn)
        # Numbers beyond the records, and slots beyond the index, are those of a damaged file.
        found_N = (ranks_N >= 0) & (ranks_N < len(self.records_NR))
        records_NR = self.records_NR[np.where(found_N, ranks_N, 0)]
        marks = _marks(ids_Nn, self.perfect.seed, self.fingerprint_bits)
        found_N &= (records_NR[:, 1:] == marks).all(axis=1) & (records_NR[:, 0] < slots)
        return np.where(found_N, records_NR[:, 0].astype(np.int64), -1)

    def _native_slots(self, ids_Nn: np.ndarray, slots: int) -> np.ndarray:
        slots_N = np.empty(len(ids_Nn), dtype=np.int64)
        if len(ids_Nn):
            address = _native.compiled().address
            self.native(slots).find(address(ids_Nn), len(ids_Nn), address(slots_N))
        return slots_N


class HotIndex:
    """An index of hot n-grams. Immutable; made by `build`, `extended` and `load`.

    Attributes:
        orders: The orders of its n-grams, ascending.
        vocab_digest: Digest of the vocabulary map that gives its ids.
        fingerprint_bits: None: an n-gram is hot if, and only if, the index was built with it. 8 to
            32: others may be taken for hot, about one of 2**fingerprint_bits.
        spec: Its identity and size, for `EngramConfig.hot`.
    """

    def __init__(
        self,
        parts: Mapping[int, HotOrder],
        vocab_digest: str,
        fingerprint_bits: int | None,
        digest: str | None = None,
    ) -> None:
        """For `build` and `load`; digest: as stored, None = it is computed."""
        self._parts = {order: parts[order] for order in sorted(parts)}
        self.orders = tuple(self._parts)
        self.vocab_digest = vocab_digest
        self.fingerprint_bits = fingerprint_bits
        slots = sum(len(part.records_NR) for part in parts.values())
        if not slots:
            raise ConfigError("hot index: expected one n-gram or more, found none")
        self.spec = HotSpec(self._computed_digest() if digest is None else digest, slots)

    @classmethod
    def build(cls, ngrams: Ngrams, fingerprint_bits: int | None = None) -> HotIndex:
        """An index of all these n-grams.

        Slots count up by order, and within an order as the n-grams stand there: by frequency. The
        same n-grams in the same order give the same index, byte for byte.

        Args:
            ngrams: Distinct n-grams, for instance from `count_ngrams`.
            fingerprint_bits: None: exact, 4 bytes for each id of an n-gram. 8 to 32: the membership
                test of the paper; such an index cannot be extended.

        Raises:
            ConfigError: Two n-grams are equal, there is none, or fingerprint_bits is out of range.
        """
        if fingerprint_bits is not None:
            as_int("fingerprint_bits", fingerprint_bits, 8, 32)
        parts: dict[int, HotOrder] = {}
        first = 0
        for order, ids_Nn in ngrams.ids.items():
            if not len(ids_Nn):
                continue
            slots_N = np.arange(first, first + len(ids_Nn))
            parts[order] = _order_of(ids_Nn, slots_N, fingerprint_bits)
            first += len(ids_Nn)
        return cls(parts, ngrams.vocab_digest, fingerprint_bits)

    def extended(self, ngrams: Ngrams) -> HotIndex:
        """An index with these n-grams too. Those that it has keep their slots.

        New slots follow the old ones, counting up by order, then as the n-grams stand there.

        Raises:
            ConfigError: The index keeps fingerprints, not n-grams; or two n-grams are equal.
            DigestMismatch: The ids are those of another vocabulary map.
        """
        if self.fingerprint_bits is not None:
            raise ConfigError(
                "hot index: expected one that keeps its n-grams, to extend it, found one of "
                f"{self.fingerprint_bits}-bit fingerprints"
            )
        if ngrams.vocab_digest != self.vocab_digest:
            raise DigestMismatch(
                f"n-grams: expected ids of vocabulary map {self.vocab_digest}, "
                f"found {ngrams.vocab_digest}"
            )
        parts = dict(self._parts)
        first = self.spec.slots
        for order, ids_Nn in ngrams.ids.items():
            new_Nn = ids_Nn[self.slots_of(ids_Nn) < 0]
            if not len(new_Nn):
                continue
            slots_N = np.arange(first, first + len(new_Nn))
            first += len(new_Nn)
            if order in parts:
                new_Nn = np.concatenate([self.ngrams(order), new_Nn])
                slots_N = np.concatenate([self.slots(order), slots_N])
            parts[order] = _order_of(new_Nn, slots_N, None)
        return HotIndex(parts, self.vocab_digest, None)

    @property
    def digest(self) -> str:
        """Identity: SHA-256, as hex, of everything that decides which n-gram has which slot."""
        return self.spec.digest

    @property
    def bytes(self) -> int:
        """Bytes of the index."""
        arrays = [(part.perfect.blocks_BW, part.records_NR) for part in self._parts.values()]
        return sum(blocks.nbytes + records.nbytes for blocks, records in arrays)

    def part(self, order: int) -> HotOrder:
        """The part of an order. Raises KeyError if the index has no n-gram of the order."""
        return self._parts[order]

    def slots(self, order: int) -> np.ndarray:
        """int64 [N]: the slots of the hot n-grams of an order, in the order of `ngrams`."""
        return self._parts[order].records_NR[:, 0].astype(np.int64)

    def ngrams(self, order: int) -> np.ndarray:
        """int32 [N, n]: the hot n-grams of an order, the oldest id first.

        Raises ConfigError if the index keeps fingerprints.
        """
        if self.fingerprint_bits is not None:
            raise ConfigError("hot index: expected one that keeps its n-grams, found fingerprints")
        return self._parts[order].records_NR[:, 1:].view(np.int32)

    def slots_of(self, ids: np.ndarray) -> np.ndarray:
        """The slots of n-grams.

        Args:
            ids: Compressed ids from 0 on, integers [..., n], the oldest first.

        Returns:
            int64 [...]; -1 if the n-gram is not hot.
        """
        order = ids.shape[-1]
        flat_Nn = ids.reshape(-1, order)
        if order not in self._parts:
            return np.full(ids.shape[:-1], -1, dtype=np.int64)
        slots_N = self._parts[order].slots_of(flat_Nn, self.spec.slots)
        return slots_N.reshape(ids.shape[:-1])

    def false_hits(self, exact: HotIndex, ngrams: Ngrams) -> dict[int, FalseHits]:
        """Counts n-grams that this index takes for hot, and `exact` does not.

        Args:
            exact: The exact index of the same n-grams.
            ngrams: Those to try, for instance all of a corpus.

        Returns:
            Order -> the counts.
        """
        found: dict[int, FalseHits] = {}
        for order, ids_Nn in ngrams.ids.items():
            false_N = (self.slots_of(ids_Nn) >= 0) & (exact.slots_of(ids_Nn) < 0)
            counts = ngrams.counts.get(order)
            reads = 0 if counts is None else int(counts[false_N].sum())
            found[order] = FalseHits(int(false_N.sum()), reads)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, which appears whole.

        Raises:
            WriteFailed: The system refuses.
        """
        blocks = {f"blocks_{n}": part.perfect.blocks_BW for n, part in self._parts.items()}
        records = {f"records_{n}": part.records_NR for n, part in self._parts.items()}
        about = json.dumps(self._about() | {"digest": self.digest})
        write_arrays(path, blocks | records, {"format": _FORMAT, "about": about})

    @classmethod
    def load(cls, path: str | os.PathLike[str], mapped: bool = True) -> HotIndex:
        """Reads what `save` wrote. `verify` checks the content.

        Args:
            path: The file.
            mapped: Map it, one copy for all processes; nobody may change the file meanwhile. False
                = read it into memory.

        Raises:
            ConfigError: The file is missing, damaged, or of another kind.
        """
        arrays, metadata = read_arrays(path, _FORMAT, mapped)
        try:
            about = json.loads(metadata["about"])
            bits = about["fingerprint_bits"]
            if bits is not None:
                as_int("fingerprint_bits", bits, 8, 32)
            parts = {
                int(part["order"]): _stored_order(part, arrays, bits) for part in about["parts"]
            }
            return cls(parts, str(about["vocab_digest"]), bits, about["digest"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            found = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path}: expected a hot index, found {found}") from None

    def verify(self) -> None:
        """Hashes the whole index. Raises DigestMismatch if it is not what was built."""
        found = self._computed_digest()
        if found != self.digest:
            raise DigestMismatch(
                f"hot index: expected content of digest {self.digest}, found {found}: damaged"
            )

    def __repr__(self) -> str:
        sizes = [f"{len(part.records_NR):,} of order {n}" for n, part in self._parts.items()]
        bits = self.fingerprint_bits
        kind = "exact" if bits is None else f"{bits}-bit fingerprints"
        return f"HotIndex({', '.join(sizes)}, {kind}, digest {self.digest[:8]}…)"

    def __copy__(self) -> HotIndex:
        return self

    def __deepcopy__(self, memo: Any) -> HotIndex:
        return self  # it never changes, and may be mapped from a file

    def _about(self) -> dict[str, Any]:
        parts = [
            {"order": n, "seed": part.perfect.seed, "levels": list(part.perfect.sizes)}
            for n, part in self._parts.items()
        ]
        return {
            "vocab_digest": self.vocab_digest,
            "fingerprint_bits": self.fingerprint_bits,
            "parts": parts,
        }

    def _computed_digest(self) -> str:
        about = json.dumps([_FORMAT, self._about()], sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(about.encode())
        for part in self._parts.values():
            for array in (part.perfect.blocks_BW, part.records_NR):
                digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def _marks(ids_Nn: np.ndarray, seed: int, fingerprint_bits: int | None) -> np.ndarray:
    """The n-grams themselves, or uint32 [N, 1], their fingerprints."""
    if fingerprint_bits is None:
        return ids_Nn
    hashes_N = level_hashes(key_hashes(ids_Nn, seed), _FINGERPRINT)
    return (hashes_N >> np.uint64(64 - fingerprint_bits)).astype(np.uint32)[:, None]


def _are_ids(ids_Nn: np.ndarray) -> bool:
    """Whether all are of 31 bits, as the ids of hot n-grams are."""
    return ids_Nn.dtype == np.int32 or (
        bool(ids_Nn.size) and 0 <= int(ids_Nn.min()) and int(ids_Nn.max()) < 2**31
    )


def _order_of(ids_Nn: np.ndarray, slots_N: np.ndarray, fingerprint_bits: int | None) -> HotOrder:
    perfect = PerfectHash.build(ids_Nn)
    count, order = ids_Nn.shape
    width = 1 + (order if fingerprint_bits is None else 1)
    records_NR = np.empty((count, width), dtype=np.uint32)
    made = HotOrder(order, perfect, records_NR, fingerprint_bits)
    if _native.core is not None:
        ids_Nn = np.ascontiguousarray(ids_Nn, dtype=np.int32)
        slots_N = np.ascontiguousarray(slots_N, dtype=np.int64)
        address = _native.compiled().address
        native = made.native(count)
        native.fill(address(ids_Nn), address(slots_N), address(records_NR))
        return made
    ranks_N = perfect.ranks(ids_Nn)
    records_NR[ranks_N, 0] = slots_N
    records_NR[ranks_N, 1:] = _marks(ids_Nn, perfect.seed, fingerprint_bits)
    return made


def _stored_order(
    about: dict[str, Any], arrays: dict[str, np.ndarray], fingerprint_bits: int | None
) -> HotOrder:
    """A part as `save` wrote it. Raises ValueError if its sizes do not fit each other."""
    order = as_int("order", about["order"], 1, MOST_ORDER)
    seed = as_int("seed", about["seed"], 0, MOST_SEEDS - 1)
    sizes = tuple(as_int("levels", size, 1) for size in about["levels"])
    blocks_BW, records_NR = arrays[f"blocks_{order}"], arrays[f"records_{order}"]
    width = 1 + (order if fingerprint_bits is None else 1)
    found = (blocks_BW.shape, records_NR.shape)
    fits = found == ((sum(sizes), WORDS), (len(records_NR), width)) and len(records_NR) > 0
    words = {str(blocks_BW.dtype), str(records_NR.dtype)}
    if not fits or not 0 < len(sizes) <= MOST_LEVELS or words != {"uint32"}:
        raise ValueError(f"order {order}: levels {sizes} beside arrays of {found}, {words}")
    return HotOrder(order, PerfectHash(seed, sizes, blocks_BW), records_NR, fingerprint_bits)
