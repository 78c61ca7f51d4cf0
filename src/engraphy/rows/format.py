"""How one record of bytes stands for d values.

A row is `row_bytes` bytes, its scales included. This module knows neither tokens nor files nor
tensors. codecs.py has the kinds of rows in plain numpy, which is the specification; the native
kernel (`_native/rows_kernel.cpp`) gives the same bits. numpy has no bfloat16: bf16 values are their
bits as uint16.
"""

# Annotations do not bind users: what they pass in is checked. _native is private to engraphy.
# pyright: reportUnnecessaryIsInstance=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _native
from ..errors import ConfigError, InputError
from ..system.checks import as_int, check_array, check_out, is_number
from .codecs import CODECS, to_bf16

_F32_MIN = float(np.finfo(np.float32).smallest_subnormal)
_F32_MAX = float(np.finfo(np.float32).max)
_FIELDS = {"kind", "d", "scale"}
_CHUNK_VALUES = 1 << 18  # temporaries of decode stay in the cache: 1 MiB of float32


@dataclass(frozen=True)
class RowFormat:
    """How a row of d values lies in `row_bytes` bytes.

    | kind | record | encode |
    |---|---|---|
    | f32, f16, bf16 | 4d, 2d, 2d | round to nearest even; NaN and infinities kept |
    | fp8 | d e4m3 + d/32 ue8m0 | the smallest power of two that brings 32 values within 448 |
    | fp8_scaled | d e4m3 | divided by `scale`, one float32 for the whole table |
    | int8 | d + one f16 scale | -127..127, round half to even, scale = max/127 |
    | int4 | d/2 + one f16 scale | -7..7, scale = max/7 |
    | q8_0 | d/32 blocks of 34 | GGUF: -127..127, halves away from zero, f16 scale = max/127 |
    | q4_0 | d/32 blocks of 18 | GGUF: -8..7, f16 scale = -max/8, with the sign of max |
    | iq4_nl, mxfp4 | d/32 blocks of 18, 17 | GGUF, only read |
    | q2_k, q3_k, q4_k, q5_k | d/256 blocks of 84, 110, 144, 176 | GGUF, only read |

    Integer codes are in two's complement; value 2i of int4 lies in the low nibble of byte i. The
    f16 scale is rounded to nearest, or up if the nearest would clip (only below 2**-14), and codes
    are of the rounded scale: the error of a value is at most scale / 2. Zeros are zero bytes in
    every kind.

    Attributes:
        kind: One of the kinds above.
        d: Values of a row: a multiple of 32 for fp8, even for int4.
        scale: The table's scale, a positive float32, for fp8_scaled; None for the other kinds.

    Raises:
        ConfigError: The kind is unknown, or d or scale do not fit it.
    """

    kind: str
    d: int
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in CODECS:
            raise ConfigError(
                f"row format: expected one of {', '.join(CODECS)}, found {self.kind!r}"
            )
        d = as_int(f"row format {self.kind}: d", self.d, 1)
        multiple = CODECS[self.kind].multiple
        if d % multiple:
            raise ConfigError(
                f"row format {self.kind}: expected d a multiple of {multiple}, found {d}"
            )
        object.__setattr__(self, "d", d)
        object.__setattr__(self, "scale", self._checked_scale())

    def _checked_scale(self) -> float | None:
        scale = self.scale
        if self.kind != "fp8_scaled":
            if scale is not None:
                raise ConfigError(
                    f"row format {self.kind}: expected no table scale, found {scale!r}"
                )
            return None
        if scale is None or not is_number(scale) or not _F32_MIN <= scale <= _F32_MAX:
            raise ConfigError(
                f"row format fp8_scaled: expected a positive float32 scale, found {scale!r}"
            )
        return float(np.float32(scale))

    @property
    def row_bytes(self) -> int:
        """Bytes of one record."""
        return CODECS[self.kind].row_bytes(self.d)

    def check_encodes(self) -> None:
        """Raises ConfigError if rows of this kind are only read, and never made."""
        self._encoder()

    def _encoder(self) -> Callable[[np.ndarray, float], np.ndarray]:
        encoder = CODECS[self.kind].encode
        if encoder is None:
            kinds = ", ".join(kind for kind, codec in CODECS.items() if codec.encode)
            raise ConfigError(
                f"row format: expected a kind that can be made of values ({kinds}), found "
                f"{self.kind}, whose rows are only read from GGUF files"
            )
        return encoder

    def encode(self, values_Nd: np.ndarray) -> np.ndarray:
        """Makes records of values. Nothing is clipped: a value that does not fit is an error.

        Args:
            values_Nd: float32 [N, d].

        Returns:
            uint8 [N, row_bytes].

        Raises:
            ConfigError: Rows of this kind are only read.
            InputError: The kind cannot hold a value (too large, or NaN and infinities in the fp8
                and integer kinds); names row and column. Or the shape or dtype is another.
        """
        encoder = self._encoder()
        check_array("values", values_Nd, (None, self.d), (np.float32,))
        raw_NR = np.empty((len(values_Nd), self.row_bytes), np.uint8)
        step = chunk_rows(self.d)
        with np.errstate(over="ignore", under="ignore"):
            for first in range(0, len(values_Nd), step):
                values_nd = np.ascontiguousarray(values_Nd[first : first + step])
                self._check_values(values_nd, first)
                raw_NR[first : first + step] = encoder(values_nd, self.scale or 1.0)
        return raw_NR

    def decode(self, raw_NR: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Makes values of records. Exact in float32 for every kind.

        Args:
            raw_NR: uint8 [N, row_bytes].
            out: [N, d], C-contiguous: float32, or uint16 for bf16 bits, to nearest even. By default
                a new float32 array.

        Returns:
            `out`.

        Raises:
            InputError: A shape or dtype is another. Nothing is written then.
        """
        check_array("raw", raw_NR, (None, self.row_bytes), (np.uint8,))
        count = len(raw_NR)
        if out is None:
            out = np.empty((count, self.d), np.float32)
        check_out(out, (count, self.d), (np.float32, np.uint16))
        core = _native.core
        if core is None:
            self.decode_plain(raw_NR, out)
            return out
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
        """`decode` in numpy, without checks: the specification of the native kernel."""
        if self.is_stored_as(out.dtype):
            out.view(np.uint8)[...] = raw_NR
            return
        count = len(raw_NR)
        step = chunk_rows(self.d)
        scratch_nd = None
        if out.dtype == np.uint16:
            scratch_nd = np.empty((min(step, count), self.d), np.float32)
        # A record may hold 448 * 2**127, or NaN.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for first in range(0, count, step):
                raw_nR = np.ascontiguousarray(raw_NR[first : first + step])
                out_nd = out[first : first + step]
                values_nd = out_nd if scratch_nd is None else scratch_nd[: len(out_nd)]
                CODECS[self.kind].decode(raw_nR, values_nd, self.scale or 1.0)
                if scratch_nd is not None:
                    out_nd[...] = to_bf16(values_nd)

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
        bad_nd = ~(size_nd <= limit)
        if codec.keeps_nan:
            bad_nd = (size_nd > limit) & (size_nd < np.inf)
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
        """Plain JSON values. `scale` is there only if the kind has one."""
        data: dict[str, Any] = {"kind": self.kind, "d": self.d}
        if self.scale is not None:
            data["scale"] = self.scale
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowFormat:
        """The inverse of `to_json`.

        Raises:
            ConfigError: A field is unknown, missing or invalid.
        """
        if not isinstance(data, Mapping) or not {"kind", "d"} <= set(data) <= _FIELDS:
            raise ConfigError(
                f"RowFormat: expected the fields kind, d and at most scale, found {data!r}"
            )
        return cls(**data)


def chunk_rows(d: int) -> int:
    """Rows that are decoded at a time."""
    return max(1, _CHUNK_VALUES // d)
