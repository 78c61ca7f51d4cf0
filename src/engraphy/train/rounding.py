"""How float32 values become bf16 rows and moments: to nearest, or stochastically.

bf16 keeps 8 bits of a value. A step that is below half of the last one is lost if it is rounded to
nearest, however often it is made. Stochastic rounding goes up or down at random, up with the
probability of the part that is cut off. So it keeps the mean of many small steps.

The random bits are a pure function of (seed, step, layer, row, column): the result depends on no
order, no number of threads, and no other row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..rows.codecs import to_bf16
from ..rows.init import splitmix64
from ..system.checks import as_int

MODES = ("stochastic", "nearest")

# Which 16 random bits a value gets, of those that belong to its row and column.
ROW = 0
FIRST_MOMENT = 2  # the next d moments have 3, and so on

_PARTS_APART = 1 << 16  # more than the columns of a row

_GOLDEN = np.uint32(0x9E3779B1)
# The finalizer of MurmurHash3 (public domain): github.com/aappleby/smhasher.
_FIRST_FACTOR = np.uint32(0x85EBCA6B)
_SECOND_FACTOR = np.uint32(0xC2B2AE35)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Rounding:
    """How a row optimiser rounds to bf16.

    Attributes:
        mode: one of MODES.
        seed: of the random bits, from 0 to 2**64 - 1. "nearest" has none, and the seed is 0.

    Raises:
        ConfigError: the mode is unknown, or the seed is out of range.
    """

    mode: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"rounding: expected one of {MODES}, found {self.mode!r}")
        seed = as_int("rounding: seed", self.seed, 0, 2**64 - 1)
        object.__setattr__(self, "seed", seed if self.mode == "stochastic" else 0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"mode": self.mode, "seed": self.seed}

    def key(self, step: int, layer: int) -> int:
        """The random key of a step and layer, a uint64."""
        key = splitmix64(np.array([self.seed], np.uint64))
        for number in (step, layer):
            key = splitmix64(key ^ np.uint64(number))
        return int(key[0])

    def to_bf16(self, values_Nd: np.ndarray, ids_N: np.ndarray, key: int, part: int) -> np.ndarray:
        """bf16 bits of values.

        Args:
            values_Nd: float32 [N, d].
            ids_N: int64 [N], their rows.
            key: of this step and layer.
            part: ROW, or FIRST_MOMENT + how many times d moments come before these.

        Returns:
            uint16 [N, d].
        """
        values_Nd = np.ascontiguousarray(values_Nd)
        if self.mode == "nearest":
            return to_bf16(values_Nd)
        return stochastic_bf16(values_Nd, random_bits(key, ids_N, values_Nd.shape[1], part))


def random_bits(key: int, ids_N: np.ndarray, dim: int, part: int) -> np.ndarray:
    """uint32 [N, dim]: 16 random bits for each value of these rows."""
    row_N = splitmix64(np.uint64(key) ^ ids_N.astype(np.uint64))
    low_N1 = (row_N & _LOW).astype(np.uint32)[:, None]
    high_N1 = (row_N >> np.uint64(32)).astype(np.uint32)[:, None]
    counter_d = np.arange(dim, dtype=np.uint32) + np.uint32((part >> 1) * _PARTS_APART)
    bits_Nd = low_N1 + counter_d * _GOLDEN
    bits_Nd = (bits_Nd ^ (bits_Nd >> np.uint32(16))) * _FIRST_FACTOR
    bits_Nd = (bits_Nd ^ (bits_Nd >> np.uint32(13))) + high_N1
    bits_Nd = bits_Nd * _SECOND_FACTOR
    bits_Nd ^= bits_Nd >> np.uint32(16)
    # A draw of 32 bits serves two parts, an even one and the next.
    return bits_Nd >> np.uint32(16) if part & 1 else bits_Nd & np.uint32(0xFFFF)


def stochastic_bf16(values: np.ndarray, random: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits (uint16) of the same shape, rounded up in `random` of 65536 cases.

    A value that bf16 can hold stays as it is. A NaN stays a NaN and keeps its sign.

    Args:
        values: float32, C-contiguous.
        random: uint32 of the same shape, below 65536.
    """
    bits = values.view(np.uint32)
    rounded = (bits + random) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
