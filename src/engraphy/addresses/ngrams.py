"""The most frequent n-grams of a corpus, with their counts: a value, and a file.

The ids are those that are hashed: compressed, with the filler where look-back may not reach.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError
from ..system.checks import as_int, describe
from .arrays import read_arrays, write_arrays

MOST_ORDER = 32
"""The longest n-gram: the limit of hash specs, and of the native kernels."""

_FORMAT = "engraphy-ngrams-1"


@dataclass(frozen=True, eq=False)
class Ngrams:
    """Distinct n-grams of some orders, the most frequent of each order first.

    Attributes:
        ids: order n -> int32 [N, n], compressed ids, the oldest first.
        vocab_digest: Digest of the vocabulary map that gives these ids.
        counts: order -> int64 [N], how often the corpus has each. An order may be missing.
        tokens: Live tokens of the corpus, each of which ends one n-gram of every order; 0 = not
            known.

    Raises:
        ConfigError: An array has another shape or dtype, or negative ids; or an order is not within
            1..32.
    """

    ids: Mapping[int, np.ndarray]
    vocab_digest: str
    counts: Mapping[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])
    tokens: int = 0

    def __post_init__(self) -> None:
        ids: dict[int, np.ndarray] = {}
        for order in sorted(self.ids):
            values = np.asarray(self.ids[order])
            fits = values.ndim == 2 and values.shape[1] == order and values.dtype.kind in "iu"
            fits &= 1 <= order <= MOST_ORDER
            if not fits or (values.size and not 0 <= values.min() <= values.max() < 2**31):
                raise ConfigError(
                    f"n-grams of order {order}: expected an order from 1 to {MOST_ORDER} and ids "
                    f"from 0 on, int32 [N, {order}], found {describe(values)}"
                )
            ids[order] = np.ascontiguousarray(values, dtype=np.int32)
        for order, counts in self.counts.items():
            if order not in ids or counts.shape != (len(ids[order]),):
                raise ConfigError(
                    f"counts of order {order}: expected one for each n-gram, "
                    f"found {describe(counts)}"
                )
        object.__setattr__(self, "ids", ids)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(ids):,} of order {order}" for order, ids in self.ids.items())
        return f"Ngrams({sizes}; {self.tokens:,} tokens, vocab {self.vocab_digest[:8]}…)"

    def top(self, most: int | Mapping[int, int]) -> Ngrams:
        """The first n-grams of each order.

        Args:
            most: Their number, or one for each order; an order that is missing is left out.
        """
        sizes = most if isinstance(most, Mapping) else dict.fromkeys(self.ids, most)
        ends = {order: as_int("most", size, 0) for order, size in sizes.items()}
        ids = {order: self.ids[order][:end] for order, end in ends.items() if order in self.ids}
        counts = {order: self.counts[order][: ends[order]] for order in ids if order in self.counts}
        return Ngrams(ids, self.vocab_digest, counts, self.tokens)

    def coverage(self) -> dict[int, float]:
        """Order -> the share of the corpus's n-grams that these are. Needs counts and tokens."""
        return {order: int(n.sum()) / max(1, self.tokens) for order, n in self.counts.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, which appears whole: safetensors with `counts_n` and `ids_n`.

        Raises:
            WriteFailed: The system refuses.
        """
        counts = {f"counts_{order}": n.astype("<i8") for order, n in self.counts.items()}
        ids = {f"ids_{order}": values for order, values in self.ids.items()}
        about = {"vocab_digest": self.vocab_digest, "tokens": str(self.tokens)}
        write_arrays(path, counts | ids, {"format": _FORMAT} | about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ngrams:
        """Maps what `save` wrote.

        Raises:
            ConfigError: The file is missing, damaged, or of another kind.
        """
        arrays, about = read_arrays(path, _FORMAT)
        try:
            ids = {int(k[4:]): values for k, values in arrays.items() if k.startswith("ids_")}
            counts = {int(k[7:]): n for k, n in arrays.items() if k.startswith("counts_")}
            return cls(ids, about["vocab_digest"], counts, int(about["tokens"]))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{path}: expected n-grams, found {error}") from None
