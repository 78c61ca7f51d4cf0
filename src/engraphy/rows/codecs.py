"""How the bytes of a row are made and read, kind by kind, in plain numpy.

These versions are the specification of the native kernels. `CODECS` lists the kinds; those of GGUF
files are in blocks.py. Encoders take float32 [N, d], C-contiguous, which `RowFormat` has checked;
decoders write float32 and are exact. Both may overflow and underflow on purpose. Numbers are
little-endian; numpy has no bfloat16: its bits are uint16.

Sources: OCP 8-bit floating point (E4M3) and microscaling (E8M0) formats; record layouts in
docs/guide/table-format.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import blocks as gguf

BLOCK = 32  # values under one ue8m0 scale


class Codec(NamedTuple):
    """One kind of row. `scale` is the table's one scale: 1 in all kinds but fp8_scaled.

    Attributes:
        row_bytes: Gives the bytes of a row from d.
        encode: (values_Nd float32, scale) -> uint8 [N, row_bytes]; None if rows of this kind are
            only read.
        decode: (raw_NR uint8, out_Nd float32, scale); writes to out_Nd.
        limit: The largest size of a finite value that can be encoded at scale 1.
        keeps_nan: Whether NaN and infinities can be encoded too.
        multiple: d has to be a multiple of this.
    """

    row_bytes: Callable[[int], int]
    encode: Callable[[np.ndarray, float], np.ndarray] | None
    decode: Callable[[np.ndarray, np.ndarray, float], None]
    limit: float = 0.0
    keeps_nan: bool = False
    multiple: int = 1


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits (uint16) of the same shape, to nearest even.

    A NaN stays a NaN and keeps its sign.
    """
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(values)
    if nan.any():
        quiet = (bits >> 16) | 0x40  # as hardware does: else it could become infinity
        rounded = np.where(nan, quiet, rounded)
    return rounded.astype(np.uint16)


def _encode_f32(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    return values_Nd.copy().view(np.uint8)


def _decode_f32(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    out_Nd[...] = raw_NR.view(np.float32)


def _encode_f16(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    return values_Nd.astype(np.float16).view(np.uint8)


def _decode_f16(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    out_Nd[...] = raw_NR.view(np.float16)


def _encode_bf16(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    return to_bf16(values_Nd).view(np.uint8)


def _decode_bf16(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    np.left_shift(raw_NR.view(np.uint16), 16, out=out_Nd.view(np.uint32), dtype=np.uint32)


def _e4m3_values() -> np.ndarray:
    code = np.arange(256)
    exponent = (code >> 3) & 15
    mantissa = code & 7
    subnormal = mantissa * 2.0**-9
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    size = np.where(exponent == 0, subnormal, normal)
    size[(code & 127) == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


def _ue8m0_values() -> np.ndarray:
    powers = np.ldexp(1.0, np.arange(256) - 127)
    powers[255] = np.nan
    return powers.astype(np.float32)


_E4M3 = _e4m3_values()
_UE8M0 = _ue8m0_values()


def _to_e4m3(values: np.ndarray) -> np.ndarray:
    """Codes of float32 values within 464, to nearest even.

    464, the tie between 448 and the NaN code, still becomes 448.
    """
    size = np.abs(values)
    bits = size.view(np.uint32)
    normal = (bits - np.uint32(120 << 23) + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20
    # float32 values from 2**14 on have a spacing of 2**-9, which is the step of e4m3 below 2**-6:
    # the addition rounds.
    small = (size + np.float32(2**14)).view(np.uint32) - np.float32(2**14).view(np.uint32)
    sign = np.signbit(values).astype(np.uint8) << 7
    return np.where(size < 2.0**-6, small, normal).astype(np.uint8) | sign


def _encode_fp8(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    count, d = values_Nd.shape
    blocks = values_Nd.reshape(count, d // BLOCK, BLOCK)
    largest = np.abs(blocks).max(axis=2)
    mantissa, exponent = np.frexp(largest)  # largest <= 448 * 2**k, and 448 = 0.875 * 2**9
    power = np.where(largest > 0, exponent - 9 + (mantissa > 0.875), -127).clip(-127)
    codes = _to_e4m3(blocks * np.ldexp(np.float32(1), -power)[..., None])
    return np.concatenate([codes.reshape(count, d), (power + 127).astype(np.uint8)], axis=1)


def _decode_fp8(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    count, d = out_Nd.shape
    np.take(_E4M3, raw_NR[:, :d], out=out_Nd, mode="clip")
    blocks = out_Nd.reshape(count, d // BLOCK, BLOCK)
    scales = _UE8M0[raw_NR[:, d:]]
    unknown = np.isnan(scales)
    blocks *= np.where(unknown, np.float32(1), scales)[..., None]
    if unknown.any():
        # Versions of numpy differ in which NaN a product of two keeps. Here it is the code's.
        rows = blocks[unknown]
        blocks[unknown] = np.where(np.isnan(rows), rows, np.float32(np.nan))


def _encode_fp8_scaled(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    return _to_e4m3(values_Nd / np.float32(scale))


def _decode_fp8_scaled(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    np.take(_E4M3 * np.float32(scale), raw_NR, out=out_Nd, mode="clip")


def _integer_codes(values_Nd: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes [N, d] within -top..top, and the f16 scales as bytes [N, 2]."""
    largest_N1 = np.abs(values_Nd).max(axis=1, keepdims=True)
    half_N1 = (largest_N1 / np.float32(top)).astype(np.float16)
    first_clipped_N1 = np.float32(top + 0.5) * half_N1.astype(np.float32)
    clips_N1 = (largest_N1 > 0) & (largest_N1 >= first_clipped_N1)
    np.copyto(half_N1, np.nextafter(half_N1, np.float16(np.inf)), where=clips_N1)
    scale_N1 = half_N1.astype(np.float32)
    divisor_N1 = np.where(scale_N1 > 0, scale_N1, np.float32(1))
    codes_Nd = np.rint(values_Nd / divisor_N1).clip(-top, top)
    return codes_Nd.astype(np.int8), half_N1.view(np.uint8)


def _encode_int8(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    codes_Nd, scale_N2 = _integer_codes(values_Nd, 127)
    return np.concatenate([codes_Nd.view(np.uint8), scale_N2], axis=1)


def _decode_int8(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    d = out_Nd.shape[1]
    codes_Nd = raw_NR[:, :d].view(np.int8)
    scale_N1 = raw_NR[:, d:].view(np.float16)
    np.multiply(codes_Nd, scale_N1, out=out_Nd, dtype=np.float32)


_NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1)  # low, high
_INT4_PAIRS = np.where(_NIBBLES < 8, _NIBBLES, _NIBBLES - 16).astype(np.float32)  # [256, 2]


def _encode_int4(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    codes_Nd, scale_N2 = _integer_codes(values_Nd, 7)
    nibbles_Nd = codes_Nd.view(np.uint8) & 15
    bytes_Nh = nibbles_Nd[:, 0::2] | (nibbles_Nd[:, 1::2] << 4)
    return np.concatenate([bytes_Nh, scale_N2], axis=1)


def _decode_int4(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    count, d = out_Nd.shape
    pairs_Nh2 = out_Nd.reshape(count, d // 2, 2)
    np.take(_INT4_PAIRS, raw_NR[:, : d // 2], axis=0, out=pairs_Nh2, mode="clip")
    out_Nd *= raw_NR[:, d // 2 :].view(np.float16).astype(np.float32)


_F32_MAX = float(np.finfo(np.float32).max)
# 65520 is the tie between 65504 and infinity.
_F16_LIMIT = float(np.nextafter(np.float32(65520), np.float32(0)))
# Just below the tie between the last bf16 and infinity.
_BF16_LIMIT = float(np.uint32(0x7F7F7FFF).view(np.float32))


def _four_each(d: int) -> int:
    return 4 * d


def _two_each(d: int) -> int:
    return 2 * d


def _one_each(d: int) -> int:
    return d


def _one_each_and_block_scales(d: int) -> int:
    return d + d // BLOCK


def _one_each_and_scale(d: int) -> int:
    return d + 2


def _half_each_and_scale(d: int) -> int:
    return d // 2 + 2


CODECS = {
    "f32": Codec(_four_each, _encode_f32, _decode_f32, _F32_MAX, keeps_nan=True),
    "f16": Codec(_two_each, _encode_f16, _decode_f16, _F16_LIMIT, keeps_nan=True),
    "bf16": Codec(_two_each, _encode_bf16, _decode_bf16, _BF16_LIMIT, keeps_nan=True),
    "fp8": Codec(_one_each_and_block_scales, _encode_fp8, _decode_fp8, _F32_MAX, multiple=BLOCK),
    "fp8_scaled": Codec(_one_each, _encode_fp8_scaled, _decode_fp8_scaled, 464.0),
    "int8": Codec(_one_each_and_scale, _encode_int8, _decode_int8, 65504.0 * 127),
    "int4": Codec(_half_each_and_scale, _encode_int4, _decode_int4, 65504.0 * 7, multiple=2),
    "q8_0": Codec(
        gguf.block_bytes(32, 34),
        gguf.encode_q8_0,
        gguf.decode_q8_0,
        65504.0 * 127,
        multiple=32,
    ),
    "q4_0": Codec(
        gguf.block_bytes(32, 18), gguf.encode_q4_0, gguf.decode_q4_0, 65504.0 * 8, multiple=32
    ),
    "iq4_nl": Codec(gguf.block_bytes(32, 18), None, gguf.decode_iq4_nl, multiple=32),
    "mxfp4": Codec(gguf.block_bytes(32, 17), None, gguf.decode_mxfp4, multiple=32),
    "q2_k": Codec(gguf.block_bytes(256, 84), None, gguf.decode_q2_k, multiple=256),
    "q3_k": Codec(gguf.block_bytes(256, 110), None, gguf.decode_q3_k, multiple=256),
    "q4_k": Codec(gguf.block_bytes(256, 144), None, gguf.decode_q4_k, multiple=256),
    "q5_k": Codec(gguf.block_bytes(256, 176), None, gguf.decode_q5_k, multiple=256),
}
"""The kinds of rows, by name."""
