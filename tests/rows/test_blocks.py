"""The row kinds of GGUF files: as numbers and as bytes they are those of the `gguf` package."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engraphy import _native
from engraphy.errors import ConfigError, InputError
from engraphy.rows import RowFormat

gguf = pytest.importorskip("gguf")
from tests.tools.gguf_files import BLOCK_KINDS, TYPES, drawn_rows, oracle  # noqa: E402

ENCODED = ("q8_0", "q4_0")
BYTES = {"q8_0": 34, "q4_0": 18, "iq4_nl": 18, "mxfp4": 17}
BYTES |= {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176}
ROW_OF_256 = {"q8_0": 272, "q4_0": 144, "iq4_nl": 144, "mxfp4": 136}
ROW_OF_256 |= {kind: size for kind, size in BYTES.items() if kind.endswith("_k")}


def multiple(kind: str) -> int:
    return 256 if kind.endswith("_k") else 32


def plain(fmt: RowFormat, raw: np.ndarray) -> np.ndarray:
    with _native.forced("off"):
        return fmt.decode(raw)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_blocks_have_the_sizes_of_the_format(kind):
    assert RowFormat(kind, multiple(kind)).row_bytes == BYTES[kind]
    assert gguf.GGML_QUANT_SIZES[TYPES[kind]] == (multiple(kind), BYTES[kind])
    assert RowFormat(kind, 256).row_bytes == ROW_OF_256[kind]
    for d in (multiple(kind) // 2, multiple(kind) + 1):
        with pytest.raises(ConfigError, match=f"multiple of {multiple(kind)}, found {d}"):
            RowFormat(kind, d)


@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize("units", [1, 3])
def test_values_are_those_of_the_oracle_bit_for_bit(kind, units):
    d = units * multiple(kind)
    raw = drawn_rows(kind, 1500, d)
    assert_same_bits(plain(RowFormat(kind, d), raw), oracle(kind, raw))


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_every_code_in_every_place_is_that_of_the_oracle(kind):
    d = multiple(kind)
    raw = np.repeat(drawn_rows(kind, 1, d), 256 * BYTES[kind], axis=0)
    places = np.repeat(np.arange(BYTES[kind]), 256)
    raw[np.arange(len(raw)), places] = np.tile(np.arange(256), BYTES[kind])
    expected = oracle(kind, raw)
    finite = np.isfinite(expected).all(axis=1)
    found = plain(RowFormat(kind, d), raw)
    assert finite.mean() > 0.9
    assert_same_bits(found[finite], expected[finite])
    np.testing.assert_array_equal(found, expected)  # NaN is NaN


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_a_scale_that_is_not_finite_gives_one_kind_of_nan(kind):
    raw = np.random.default_rng(0).integers(0, 256, (3000, BYTES[kind]), np.uint8)
    found = plain(RowFormat(kind, multiple(kind)), raw)
    assert np.isnan(found).any() or kind == "mxfp4"
    assert set(found[np.isnan(found)].view(np.uint32).tolist()) <= {0x7FC00000}


def test_zero_bytes_are_zeros():
    for kind in BLOCK_KINDS:
        fmt = RowFormat(kind, multiple(kind))
        assert not fmt.decode(np.zeros((2, fmt.row_bytes), np.uint8)).any()


@pytest.mark.parametrize("kind", ENCODED)
@pytest.mark.parametrize("power", [1.0, 1e-3, 1e-7, 1e-12, 1e4])
def test_encoded_bytes_are_those_of_the_oracle(kind, power):
    values = np.random.default_rng(1).standard_normal((900, 96)).astype(np.float32)
    values[:20, :32] = 0
    values[20:40] = np.float32(0.37)
    values[40:60, ::2] = -values[40:60, 1::2]  # the largest value occurs with both signs
    values[60:80] = np.round(values[60:80] * 4) / 8  # halves, which are rounded
    values *= np.float32(power)
    expected = gguf.quants.quantize(values, TYPES[kind])
    np.testing.assert_array_equal(RowFormat(kind, 96).encode(values), expected)


@pytest.mark.parametrize("kind", ENCODED)
@given(
    values=hnp.arrays(
        np.float32,
        (2, 32),
        elements=st.floats(-(2.0**18), 2.0**18, width=32, allow_subnormal=False),
    )
)
def test_any_values_encode_as_the_oracle_encodes_them(kind, values):
    size = np.abs(values)
    values = np.where(size < 1e-30, np.float32(0), values)  # 1 / d would overflow there
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(values, TYPES[kind])
    np.testing.assert_array_equal(RowFormat(kind, 32).encode(values), expected)


@pytest.mark.parametrize("kind", ENCODED)
def test_values_too_small_for_a_scale_become_zeros(kind):
    values = np.full((1, 32), 1e-42, np.float32)
    assert not RowFormat(kind, 32).decode(RowFormat(kind, 32).encode(values)).any()


@pytest.mark.parametrize("kind", ENCODED)
def test_decoded_values_encode_to_themselves(kind):
    fmt = RowFormat(kind, 64)
    values = np.random.default_rng(2).standard_normal((500, 64)).astype(np.float32)
    once = fmt.decode(fmt.encode(values))
    np.testing.assert_array_equal(fmt.decode(fmt.encode(once)), once)
    assert np.abs(once - values).max() < (0.02 if kind == "q8_0" else 0.6)


@pytest.mark.parametrize(("kind", "last"), [("q8_0", 65504.0 * 127), ("q4_0", 65504.0 * 8)])
def test_a_value_beyond_the_kind_is_refused(kind, last):
    fmt = RowFormat(kind, 32)
    values = np.zeros((1, 32), np.float32)
    values[0, 3] = -last
    assert abs(fmt.decode(fmt.encode(values))[0, 3] + last) <= 0.001 * last
    for bad in (-last * 1.001, np.nan, np.inf):
        values[0, 3] = bad
        with pytest.raises(InputError, match=r"expected values within .* in row 0, column 3"):
            fmt.encode(values)


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_KINDS if kind not in ENCODED])
def test_kinds_that_are_only_read_say_so(kind):
    fmt = RowFormat(kind, multiple(kind))
    with pytest.raises(ConfigError, match=f"expected a kind that can be made .*found {kind}"):
        fmt.encode(np.zeros((1, fmt.d), np.float32))
    with pytest.raises(ConfigError, match="only read"):
        fmt.check_encodes()
