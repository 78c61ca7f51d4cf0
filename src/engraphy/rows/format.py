"""Rows: how one record of bytes stands for d values, and the one way to read rows of a store as
numbers.

A row is `row_bytes` bytes, its scales included. Knows neither tokens, files nor tensors; `read`
asks a store for its mapped memory or for a gather. The kinds of rows stand in codecs.py. The plain
numpy versions are the specification; the native kernel beside them (`_native/rows_kernel.cpp`)
gives the same bits. numpy has no bfloat16: bf16 values are their bits as uint16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _native
from ..errors import ConfigError, InputError
from ..system.checks import check_array, check_out
from .codecs import CODECS, to_bf16

_F32_MIN, _F32_MAX = float(np.finfo(np.float32).smallest_subnormal), float(np.finfo(np.float32).max)
_CHUNK_VALUES = 1 << 18  # temporaries of decode stay in the cache: 1 MiB of float32


@dataclass(frozen=True)
class RowFormat:
    """How a row of d values lies in `row_bytes` bytes.

    | kind | record | encode |
    |---|---|---|
    | f32, f16, bf16 | 4d, 2d, 2d | round to nearest even; NaN and infinities kept |
    | fp8 | d e4m3 + d/32 ue8m0 | per 32 values the smallest power of two that brings them within 448 |
    | fp8_scaled | d e4m3 | divided by `scale`, one float32 for the whole table |
    | int8 | d + one f16 scale | -127..127, round half to even, scale = max/127 |
    | int4 | d/2 + one f16 scale | -7..7, scale = max/7, value 2i in the low nibble of byte i, two's complement |

    The f16 scale is rounded to nearest, or up where the nearest would clip (only below 2**-14), and
    codes are of the rounded scale: the error of a value is at most scale / 2. Zeros are zero bytes
    in every kind. Raises ConfigError for an unknown kind, a d that does not fit (a multiple of 32
    for fp8, even for int4), and a scale that is missing, not a positive float32, or not used by the
    kind.
    """

    kind: str
    d: int
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in CODECS:
            raise ConfigError(
                f"row format: expected one of {', '.join(CODECS)}, found {self.kind!r}"
            )
        if isinstance(self.d, bool) or not isinstance(self.d, (int, np.integer)) or self.d < 1:
            raise ConfigError(
                f"row format {self.kind}: expected a positive integer d, found {self.d!r}"
            )
        if self.d % CODECS[self.kind].multiple:
            raise ConfigError(
                f"row format {self.kind}: expected d a multiple of {CODECS[self.kind].multiple}, "
                f"found {self.d}"
            )
        object.__setattr__(self, "d", int(self.d))
        object.__setattr__(self, "scale", self._checked_scale())

    def _checked_scale(self) -> float | None:
        if self.kind != "fp8_scaled":
            if self.scale is not None:
                raise ConfigError(
                    f"row format {self.kind}: expected no table scale, found {self.scale!r}"
                )
            return None
        if isinstance(self.scale, (int, float, np.floating)) and not isinstance(self.scale, bool):
            if _F32_MIN <= self.scale <= _F32_MAX:
                return float(np.float32(self.scale))
        raise ConfigError(
            f"row format fp8_scaled: expected a positive float32 scale, found {self.scale!r}"
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one record."""
        return CODECS[self.kind].row_bytes(self.d)

    def encode(self, values_Nd: np.ndarray) -> np.ndarray:
        """float32 [N, d] -> uint8 [N, row_bytes].

        Nothing is clipped: raises InputError naming row and column for a finite value that the kind
        cannot hold, for NaN and infinities in the fp8 and integer kinds, and for another shape or
        dtype.
        """
        check_array("values", values_Nd, (None, self.d), (np.float32,))
        raw_NR = np.empty((len(values_Nd), self.row_bytes), np.uint8)
        step = chunk_rows(self.d)
        with np.errstate(over="ignore", under="ignore"):
            for first in range(0, len(values_Nd), step):
                values_nd = np.ascontiguousarray(values_Nd[first : first + step])
                self._check_values(values_nd, first)
                raw_NR[first : first + step] = CODECS[self.kind].encode(
                    values_nd, self.scale or 1.0
                )
        return raw_NR

    def decode(self, raw_NR: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [N, row_bytes] -> `out` [N, d]: float32 (the default), or uint16 for bf16 bits, to
        nearest even.

        Exact in float32 for every kind. `out` has to be C-contiguous. Raises InputError before
        anything is written.
        """
        check_array("raw", raw_NR, (None, self.row_bytes), (np.uint8,))
        count = len(raw_NR)
        if out is None:
            out = np.empty((count, self.d), np.float32)
        check_out(out, (count, self.d), (np.float32, np.uint16))
        if (core := _native.core) is None:
            self.decode_plain(raw_NR, out)
        else:
            raw_NR = np.ascontiguousarray(raw_NR)
            core.decode_rows(
                self.kind,
                self.d,
                self.scale or 1.0,
                core.address(raw_NR),
                count,
                out.dtype == np.uint16,
                core.address(out),
            )
        return out

    def decode_plain(self, raw_NR: np.ndarray, out: np.ndarray) -> None:
        if self.is_stored_as(out.dtype):
            out.view(np.uint8)[...] = raw_NR
            return
        count = len(raw_NR)
        step, scratch_nd = chunk_rows(self.d), None
        if out.dtype == np.uint16:
            scratch_nd = np.empty((min(step, count), self.d), np.float32)
        with np.errstate(
            over="ignore", under="ignore", invalid="ignore"
        ):  # a record may say 448 * 2**127, or NaN
            for first in range(0, count, step):
                raw_nR, out_nd = (
                    np.ascontiguousarray(raw_NR[first : first + step]),
                    out[first : first + step],
                )
                values_nd = out_nd if scratch_nd is None else scratch_nd[: len(out_nd)]
                CODECS[self.kind].decode(raw_nR, values_nd, self.scale or 1.0)
                if scratch_nd is not None:
                    out_nd[...] = to_bf16(values_nd)

    def _check_values(self, values_nd: np.ndarray, first: int) -> None:
        codec = CODECS[self.kind]
        limit = codec.limit * (self.scale or 1.0)
        size_nd = np.abs(values_nd)
        if size_nd.max() <= limit:  # false for NaN
            return
        bad_nd = (size_nd > limit) & (size_nd < np.inf) if codec.keeps_nan else ~(size_nd <= limit)
        if bad_nd.any():
            row, column = (int(i) for i in np.argwhere(bad_nd)[0])
            raise InputError(
                f"row format {self.kind}: expected values within {limit:g}, "
                f"found {values_nd[row, column]} in row {first + row}, column {column}"
            )

    def is_stored_as(self, dtype: np.dtype) -> bool:
        """Whether the record is the values of an `out` of this dtype, byte for byte."""
        return (self.kind, dtype) in (("f32", np.dtype(np.float32)), ("bf16", np.dtype(np.uint16)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `scale` only where the kind has one."""
        return {"kind": self.kind, "d": self.d} | (
            {} if self.scale is None else {"scale": self.scale}
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowFormat:
        """Inverse of `to_json`. Raises ConfigError on unknown or missing fields."""
        if not isinstance(data, Mapping) or not {"kind", "d"} <= set(data) <= {
            "kind",
            "d",
            "scale",
        }:
            raise ConfigError(
                f"RowFormat: expected the fields kind, d and at most scale, found {data!r}"
            )
        return cls(**data)


def chunk_rows(d: int) -> int:
    return max(1, _CHUNK_VALUES // d)
