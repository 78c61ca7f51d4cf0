"""The row kinds of GGUF files, in plain numpy: a row is a sequence of blocks with their own scales.

    kind      values, bytes    a block                          value
    q8_0      32, 34           d f16; q[32] int8                d q
    q4_0      32, 18           d f16; q[16]                     d (q - 8)
    iq4_nl    32, 18           d f16; q[16]                     d NONLINEAR[q]
    mxfp4     32, 17           e ue8m0; q[16]                   2^(e-128) E2M1[q]
    q2_k      256, 84          s[16]; q[64]; d, m f16           d (s & 15) q - m (s >> 4)
    q3_k      256, 110         h[32]; q[64]; s[12]; d f16       d (s - 32) (q + 4 h - 4)
    q4_k      256, 144         d, m f16; s[12]; q[128]          d s q - m t
    q5_k      256, 176         d, m f16; s[12]; h[32]; q[128]   d s (q + 16 h) - m t

In a block of 32, the low nibble of byte i is value i and the high nibble is value i + 16. A block
of 256 (a "superblock") has parts with scales of a few bits each: 16 parts of 16 values, or 8 parts
of 32 in q4_k and q5_k.

Decoding is exact but for one rounding to float32, of the last difference. If a scale is not finite,
values may be infinite or NaN; a NaN is always the positive quiet one, so that it does not depend on
the processor. Encoders exist for q8_0 and q4_0 and are those of llama.cpp: codes are of the exact
scale, which is then rounded to f16. Rows of the other kinds are taken from files as they are.

Source: ggml-quants.c of the ggml project; the oracle of the tests is its `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BLOCK = 32
SUPERBLOCK = 256

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled

_QUIET_NAN = np.uint32(0x7FC00000)


def block_bytes(values: int, size: int) -> Callable[[int], int]:
    """Gives the bytes of a row from d, for blocks of `values` values in `size` bytes."""

    def row_bytes(d: int) -> int:
        return d // values * size

    return row_bytes


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 scale at a byte of each block, float32 [n, 1]."""
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def _settle(out: np.ndarray, *scales: np.ndarray) -> None:
    """Makes NaNs of values the same, where scales [n, 1] of blocks out [n, ...] are not finite."""
    odd_n = ~np.all([np.isfinite(scale_n1).all(axis=1) for scale_n1 in scales], axis=0)
    if odd_n.any():
        values = out[odd_n]
        values.view(np.uint32)[np.isnan(values)] = _QUIET_NAN
        out[odd_n] = values


def decode_q8_0(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """q8_0 -> float32 [N, d]."""
    blocks = raw_NR.reshape(-1, 34)
    out = out_Nd.reshape(-1, BLOCK)
    d_n1 = _halves(blocks, 0)
    np.multiply(blocks[:, 2:].view(np.int8), d_n1, out=out, dtype=np.float32)
    _settle(out, d_n1)


def encode_q8_0(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    """float32 [N, d] -> q8_0. Rounds halves away from zero."""
    blocks = values_Nd.reshape(-1, BLOCK)
    d_n1 = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(d_n1)
    size = np.abs(scaled)
    whole = np.floor(size)
    codes = np.sign(scaled) * (whole + np.floor(2 * (size - whole)))
    return _joined(len(values_Nd), d_n1, codes.astype(np.int8).view(np.uint8))


def decode_q4_0(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """q4_0 -> float32 [N, d]."""
    _decode_nibbles(raw_NR, out_Nd, np.arange(-8, 8))


def encode_q4_0(values_Nd: np.ndarray, scale: float) -> np.ndarray:
    """float32 [N, d] -> q4_0. The largest value of a block, with its sign, becomes code -8."""
    blocks = values_Nd.reshape(-1, BLOCK)
    at_n1 = np.abs(blocks).argmax(axis=1, keepdims=True)
    d_n1 = np.take_along_axis(blocks, at_n1, axis=1) / np.float32(-8)
    shifted = np.trunc(blocks * _inverse(d_n1) + np.float32(8.5))
    codes = shifted.astype(np.uint8).clip(0, 15)
    half = BLOCK // 2
    return _joined(len(values_Nd), d_n1, codes[:, :half] | (codes[:, half:] << 4))


def _inverse(d_n1: np.ndarray) -> np.ndarray:
    """1 / d; 0 where that is infinite: the scale is then 0 in f16."""
    with np.errstate(divide="ignore"):
        inverse_n1 = np.float32(1) / d_n1
    return np.where(np.isinf(inverse_n1), np.float32(0), inverse_n1)


def _joined(rows: int, d_n1: np.ndarray, codes: np.ndarray) -> np.ndarray:
    half_n2 = d_n1.astype(np.float16).view(np.uint8)
    return np.concatenate([half_n2, codes], axis=1).reshape(rows, -1)


def decode_iq4_nl(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """iq4_nl -> float32 [N, d]."""
    _decode_nibbles(raw_NR, out_Nd, np.array(NONLINEAR))


def _decode_nibbles(raw_NR: np.ndarray, out_Nd: np.ndarray, values_16: np.ndarray) -> None:
    """Blocks of an f16 scale and 32 codes of four bits, which stand for integers."""
    blocks = raw_NR.reshape(-1, 18)
    out = out_Nd.reshape(-1, BLOCK)
    d_n1 = _halves(blocks, 0)
    np.multiply(_looked_up(blocks[:, 2:], values_16), d_n1, out=out)
    _settle(out, d_n1)


def decode_mxfp4(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """mxfp4 -> float32 [N, d]. Every scale byte is a number, 255 too."""
    blocks = raw_NR.reshape(-1, 17)
    e_n1 = blocks[:, :1].astype(np.int32)
    power_n1 = np.ldexp(np.float32(1), e_n1 - 128)  # half of 2^(e - 127): values are doubled
    np.multiply(_looked_up(blocks[:, 1:], np.array(E2M1)), power_n1, out=out_Nd.reshape(-1, BLOCK))


def _looked_up(nibbles: np.ndarray, values_16: np.ndarray) -> np.ndarray:
    """float32 [n, 32] of bytes [n, 16]: low nibbles first."""
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    return values_16.astype(np.float32)[codes]


def decode_q2_k(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """q2_k -> float32 [N, d]."""
    blocks = raw_NR.reshape(-1, 84)
    d_n1 = _halves(blocks, 80)
    m_n1 = _halves(blocks, 82)
    high_np = d_n1 * (blocks[:, :16] & 15)
    low_np = m_n1 * (blocks[:, :16] >> 4)
    codes = _pairs(blocks[:, 16:80]).reshape(-1, 16, 16)
    out = out_Nd.reshape(-1, 16, 16)
    np.multiply(codes, high_np[:, :, None], out=out)
    out -= low_np[:, :, None]
    _settle(out, d_n1, m_n1)


def decode_q3_k(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """q3_k -> float32 [N, d]."""
    blocks = raw_NR.reshape(-1, 110)
    d_n1 = _halves(blocks, 108)
    nibbles = blocks[:, 96:104]
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    pairs = blocks[:, 104:108]
    high = np.concatenate([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale_np = d_n1 * ((low | (high << 4)).astype(np.int8) - 32)
    bits = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _pairs(blocks[:, 32:96]) + 4 * bits.reshape(-1, SUPERBLOCK).astype(np.float32) - 4
    out = out_Nd.reshape(-1, 16, 16)
    np.multiply(codes.reshape(out.shape), scale_np[:, :, None], out=out)
    _settle(out, d_n1)


def decode_q4_k(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """q4_k -> float32 [N, d]."""
    blocks = raw_NR.reshape(-1, 144)
    _decode_parts_of_32(blocks, _nibbles_of_32(blocks[:, 16:]), out_Nd)


def decode_q5_k(raw_NR: np.ndarray, out_Nd: np.ndarray, scale: float) -> None:
    """q5_k -> float32 [N, d]."""
    blocks = raw_NR.reshape(-1, 176)
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    _decode_parts_of_32(blocks, _nibbles_of_32(blocks[:, 48:]) | (bits << 4), out_Nd)


def _nibbles_of_32(raw: np.ndarray) -> np.ndarray:
    """uint8 [n, 8, 32] of bytes [n, 128]: of 32 bytes the low nibbles, then the high ones."""
    shifted = raw.reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8)
    return (shifted & 15).reshape(-1, 8, 32)


def _decode_parts_of_32(blocks: np.ndarray, codes: np.ndarray, out_Nd: np.ndarray) -> None:
    """Blocks that begin as those of q4_k, of codes uint8 [n, 8, 32]."""
    d_n1 = _halves(blocks, 0)
    m_n1 = _halves(blocks, 2)
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales_np = np.concatenate([first & 63, (third & 15) | ((first >> 2) & 48)], axis=1)
    lows_np = np.concatenate([second & 63, (third >> 4) | ((second >> 2) & 48)], axis=1)
    out = out_Nd.reshape(-1, 8, 32)
    np.multiply(codes, (d_n1 * scales_np)[:, :, None], out=out, dtype=np.float32)
    out -= (m_n1 * lows_np)[:, :, None]
    _settle(out, d_n1, m_n1)


def _pairs(raw: np.ndarray) -> np.ndarray:
    """float32 [n, 256] of bytes [n, 64]: of 32 bytes the lowest bits first, then the next ones."""
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    codes = (raw.reshape(-1, 2, 1, 32) >> shifts) & 3
    return codes.reshape(-1, SUPERBLOCK).astype(np.float32)
