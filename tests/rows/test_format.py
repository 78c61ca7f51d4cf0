"""Row formats and reading: exact against torch's own types, bounded where they round, and nothing
silent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engraphy.errors import ConfigError, InputError, RowOutOfRange, StoreError
from engraphy.rows import RowFormat, read
from engraphy.store import RamStore

SCALED = 0.0123
KINDS = ("f32", "f16", "bf16", "fp8", "fp8_scaled", "int8", "int4")
TOP = {"int8": 127, "int4": 7}


def fmt_of(kind: str, d: int = 64) -> RowFormat:
    return RowFormat(kind, d, scale=SCALED if kind == "fp8_scaled" else None)


def normal(count: int, d: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, d)).astype(np.float32)


def bf16_of(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def all_float32_patterns_sampled(count: int, seed: int = 0) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
    return bits.view(np.float32)


def test_row_bytes_are_those_of_the_format_table():
    found = {kind: fmt_of(kind, 256).row_bytes for kind in KINDS}
    assert found == {
        "f32": 1024,
        "f16": 512,
        "bf16": 512,
        "fp8": 264,
        "fp8_scaled": 256,
        "int8": 258,
        "int4": 130,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("fp4", 64),
        ("BF16", 64),
        (None, 64),
        (["f32"], 64),
        ("f32", 0),
        ("f32", -4),
        ("f32", 2.0),
        ("f32", True),
        ("fp8", 48),
        ("int4", 5),
        ("f32", 64, 1.0),
        ("fp8_scaled", 64),
        ("fp8_scaled", 64, 0.0),
        ("fp8_scaled", 64, -1.0),
        ("fp8_scaled", 64, float("nan")),
        ("fp8_scaled", 64, float("inf")),
        ("fp8_scaled", 64, 1e39),
        ("fp8_scaled", 64, 1e-50),
        ("fp8_scaled", 64, "1"),
        ("fp8_scaled", 64, True),
        ("fp8_scaled", 64, 10**400),
    ],
)
def test_a_format_that_cannot_be_meant_is_refused(arguments):
    with pytest.raises(ConfigError, match="expected"):
        RowFormat(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_json_round_trip(kind):
    assert RowFormat.from_json(fmt_of(kind).to_json()) == fmt_of(kind)


@pytest.mark.parametrize(
    "data", [{}, {"kind": "f32"}, {"kind": "f32", "d": 4, "more": 1}, [], "f32", None]
)
def test_json_with_missing_or_unknown_fields_is_refused(data):
    with pytest.raises(ConfigError, match="expected the fields"):
        RowFormat.from_json(data)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_zero_bytes_and_back(kind):
    fmt = fmt_of(kind)
    raw = fmt.encode(np.zeros((3, 64), np.float32))
    assert raw.shape == (3, fmt.row_bytes) and not raw.any()
    assert not fmt.decode(np.zeros((3, fmt.row_bytes), np.uint8)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_fills_a_poisoned_buffer_of_either_dtype(kind):
    fmt, values = fmt_of(kind), normal(9001)  # more than one chunk
    raw = fmt.encode(values)
    plain = fmt.decode(raw)
    poisoned = np.full(values.shape, np.nan, np.float32)
    assert fmt.decode(raw, out=poisoned) is poisoned
    np.testing.assert_array_equal(poisoned, plain)
    bits = np.full(values.shape, 0xFFFF, np.uint16)
    fmt.decode(raw, out=bits)
    np.testing.assert_array_equal(bits, bf16_of(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_values_encode_to_themselves(kind):
    fmt = fmt_of(kind)
    once = fmt.decode(fmt.encode(normal(50)))
    np.testing.assert_array_equal(fmt.decode(fmt.encode(once)), once)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_encoded_one_by_one_whatever_the_batch(kind):
    fmt, values = fmt_of(kind), normal(4099)  # the last chunk is a short one
    raw = fmt.encode(values)
    for row in (0, 1, 4095, 4096, 4098):
        np.testing.assert_array_equal(fmt.encode(values[row : row + 1])[0], raw[row])
    strided = np.asfortranarray(values)
    np.testing.assert_array_equal(fmt.encode(strided), raw)
    assert fmt.encode(values[:0]).shape == (0, fmt.row_bytes)
    assert fmt.decode(raw[:0]).shape == (0, 64)


def test_f32_keeps_every_bit():
    values = all_float32_patterns_sampled(6400).reshape(-1, 64)
    fmt = fmt_of("f32")
    np.testing.assert_array_equal(
        fmt.decode(fmt.encode(values)).view(np.uint32), values.view(np.uint32)
    )


def test_bf16_and_f16_round_as_torch_does():
    odd = np.float32(
        [np.inf, -np.inf, 0.0, -0.0, 1e-45, 2**-133, 65519.996, 1 + 2**-8, 1 + 3 * 2**-8]
    )
    values = np.concatenate([all_float32_patterns_sampled(300_000), normal(300).reshape(-1), odd])
    for kind, dtype, limit in (
        ("bf16", torch.bfloat16, 3.3961e38),
        ("f16", torch.float16, 65519.0),
    ):
        fit = values[(np.abs(values) <= limit) | np.isinf(values)].reshape(-1, 1)
        expected = torch.from_numpy(fit).to(dtype).view(torch.uint8).numpy()
        np.testing.assert_array_equal(RowFormat(kind, 1).encode(fit), expected)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_nan_and_infinities_are_kept_by_the_float_kinds(kind):
    odd = np.array([[np.nan, np.inf, -np.inf, -np.nan]], np.float32)
    odd.view(np.uint32)[0, 3] = 0xFFFFFFFF  # rounding these bits up would wrap around to zero
    for out in (None, np.zeros((1, 4), np.uint16)):
        found = fmt_of(kind, 4).decode(fmt_of(kind, 4).encode(odd), out=out)
        if out is not None:
            found = RowFormat("bf16", 4).decode(found.view(np.uint8))
        np.testing.assert_array_equal(found, odd)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_every_half_pattern_decodes_as_torch_says(kind):
    patterns = np.arange(2**16, dtype=np.uint32).astype(np.uint16)[:, None]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    expected = torch.from_numpy(patterns.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(RowFormat(kind, 1).decode(patterns.view(np.uint8)), expected)


def test_every_fp8_code_under_every_scale_decodes_as_torch_says():
    codes = np.arange(256, dtype=np.uint8)
    raw = np.empty((256, 264), np.uint8)
    raw[:, :256], raw[:, 256:] = codes, codes[:, None]  # row b: all codes under scale byte b
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    scales = torch.from_numpy(codes).view(torch.float8_e8m0fnu).float()
    np.testing.assert_array_equal(
        RowFormat("fp8", 256).decode(raw), (scales[:, None] * values[None]).numpy()
    )
    assert scales[0] == 2.0**-127 and scales[254] == 2.0**127 and scales[255].isnan()
    scaled = RowFormat("fp8_scaled", 256, SCALED).decode(codes[None])
    np.testing.assert_array_equal(scaled[0], (values * torch.tensor(SCALED)).numpy())


def test_fp8_codes_round_as_torch_does():
    rng = np.random.default_rng(3)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    grid = np.sort(grid[np.isfinite(grid)])
    ties = (grid[1:] + grid[:-1]) / 2
    near = np.concatenate(
        [
            grid,
            ties,
            np.nextafter(ties, np.float32(1e9)),
            np.nextafter(ties, np.float32(-1e9)),
            (rng.uniform(-448, 448, 4096) * 2.0 ** rng.integers(-25, 1, 4096)).astype(np.float32),
        ]
    )
    expected = torch.from_numpy(near).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(
        RowFormat("fp8_scaled", 1, 1.0).encode(near[:, None])[:, 0], expected
    )


@given(
    hnp.arrays(
        np.float32, (2, 64), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
@settings(max_examples=200, deadline=None)
def test_fp8_scales_are_the_smallest_powers_of_two_that_hold_the_block(values):
    raw = RowFormat("fp8", 64).encode(values)
    largest = np.abs(values.reshape(2, 2, 32)).max(axis=2).astype(np.float64)
    scale = 2.0 ** (raw[:, 64:].astype(np.float64) - 127)
    assert (largest <= 448 * scale).all()
    assert ((largest > 448 * scale / 2) | (raw[:, 64:] == 0)).all()
    blocks = (values.reshape(2, 2, 32).astype(np.float64) / scale[..., None]).astype(np.float32)
    expected = torch.from_numpy(blocks).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(raw[:, :64].reshape(2, 2, 32), expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@given(
    values=hnp.arrays(np.float32, (3, 6), elements=st.floats(-(2.0**18), 2.0**18, width=32)),
    power=st.sampled_from([1.0, 2.0**-10, 2.0**-30, 2.0**-36, 2.0**-100]),
)
@settings(max_examples=200, deadline=None)
def test_integer_rows_are_off_by_at_most_half_their_scale(kind, values, power):
    values = values * np.float32(power)
    fmt, top = RowFormat(kind, 6), TOP[kind]
    raw = fmt.encode(values)
    scale = raw[:, -2:].copy().view(np.float16).astype(np.float64)
    error = np.abs(fmt.decode(raw).astype(np.float64) - values)
    assert (error <= scale / 2 * (1 + 1e-6)).all()
    # The scale is max/top to f16's precision, 2**-11 relative or one subnormal step, so the bound
    # above is a tight one.
    exact = np.abs(values).max(axis=1, keepdims=True).astype(np.float64) / top
    assert (np.abs(scale - exact) <= np.maximum(exact * 2.0**-11, 2.0**-24)).all()


@pytest.mark.parametrize(("kind", "codes"), [("int8", 255), ("int4", 15)])
def test_integer_codes_are_symmetric_and_use_the_whole_range(kind, codes):
    top = TOP[kind]
    values = np.arange(-top, top + 1, dtype=np.float32)
    values = np.append(values, np.float32(0))[None]  # an even count
    fmt = RowFormat(kind, codes + 1)
    np.testing.assert_array_equal(fmt.decode(fmt.encode(values)), values)
    halves = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, top]], np.float32)
    np.testing.assert_array_equal(
        RowFormat(kind, 6).decode(RowFormat(kind, 6).encode(halves)), [[0, 2, 2, 0, -2, top]]
    )


def test_int4_puts_value_2i_in_the_low_nibble_of_byte_i():
    raw = RowFormat("int4", 4).encode(np.array([[1, -2, 7, -7]], np.float32))
    assert raw.tolist() == [[0xE1, 0x97, *np.float16(1).tobytes()]]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-45, 2.0**-126, 2.0**-32, 2.0**-25, 1e-6, 6e-6])
def test_rows_whose_scale_is_subnormal_or_underflows_stay_finite_and_close(kind, size):
    values = np.array([[size, -size, size / 2, 0]], np.float32)
    found = RowFormat(kind, 4).decode(RowFormat(kind, 4).encode(values))
    assert np.isfinite(found).all()
    assert np.abs(found - values).max() <= max(
        2.0**-25, size / TOP[kind] / 2 * (1 + 2.0**-10) + 2.0**-25
    )


@pytest.mark.parametrize("kind", ["fp8", "fp8_scaled", "int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_the_scaled_kinds_with_its_place(kind, bad):
    values = np.zeros((5000, 64), np.float32)
    values[4997, 13] = bad
    with pytest.raises(InputError, match=r"row 4997, column 13"):
        fmt_of(kind).encode(values)


@pytest.mark.parametrize(
    ("kind", "last", "first_bad"),
    [
        ("f16", 65519.996, 65520.0),
        ("bf16", 3.396177e38, 3.39618e38),
        ("fp8_scaled", 464 * SCALED * 0.999999, 464.1 * SCALED),
        ("int8", 65504.0 * 127, 65504.0 * 127 + 1),
        ("int4", 65504.0 * 7, 65505.0 * 7),
    ],
)
def test_a_value_beyond_the_kind_is_refused_not_clipped(kind, last, first_bad):
    fmt = fmt_of(kind, 32)
    values = np.zeros((1, 32), np.float32)
    values[0, 3] = -last
    found = fmt.decode(fmt.encode(values))
    assert np.isfinite(found).all() and abs(found[0, 3] + last) <= 0.04 * last
    values[0, 3] = -first_bad
    with pytest.raises(InputError, match=r"expected values within .* in row 0, column 3"):
        fmt.encode(values)


@pytest.mark.parametrize(
    "values", [np.zeros((2, 64)), np.zeros((2, 63), np.float32), np.zeros(64, np.float32), [[0.0]]]
)
def test_values_of_another_shape_or_dtype_are_refused(values):
    with pytest.raises(InputError, match="values: expected float32"):
        fmt_of("bf16").encode(values)


@pytest.mark.parametrize(
    "raw", [np.zeros((2, 127), np.uint8), np.zeros((2, 128), np.int8), np.zeros(128, np.uint8)]
)
def test_records_of_another_width_or_dtype_are_refused(raw):
    with pytest.raises(InputError, match="raw: expected uint8"):
        fmt_of("bf16").decode(raw)


@pytest.mark.parametrize(
    "out",
    [
        np.ones((2, 64), np.float16),
        np.ones((3, 64), np.float32),
        np.ones((64, 2), np.float32).T,
        np.ones((2, 128), np.float32)[:, ::2],
        np.ones((2, 64), np.int16),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused_and_left_alone(out):
    before = out.copy()
    with pytest.raises(InputError, match="out: expected"):
        fmt_of("bf16").decode(np.zeros((2, 128), np.uint8), out=out)
    np.testing.assert_array_equal(out, before)


def filled_store(fmt: RowFormat, rows: int = 40) -> RamStore:
    store = RamStore(rows, fmt.row_bytes)
    store.scatter(np.arange(rows, dtype=np.int64), fmt.encode(normal(rows, fmt.d)))
    return store


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3, 4), (2, 0, 4), (1, 1)])
def test_read_takes_ids_of_any_shape_and_folds_columns_on_demand(shape):
    fmt = fmt_of("bf16")
    store = filled_store(fmt)
    every = fmt.decode(store.gather(np.arange(40, dtype=np.int64)))
    ids = np.random.default_rng(1).integers(0, 40, shape)
    out = np.full((*shape, 64), np.nan, np.float32)
    assert read(store, ids, fmt, out) is out
    np.testing.assert_array_equal(out, every[ids])
    if shape:
        folded = np.full((*shape[:-1], shape[-1] * 64), np.nan, np.float32)
        read(store, ids, fmt, folded)
        np.testing.assert_array_equal(folded.reshape(out.shape), out)


def test_read_takes_ids_that_are_not_contiguous():
    fmt = fmt_of("int8")
    store = filled_store(fmt)
    ids = np.arange(40, dtype=np.int64).reshape(4, 10).T[::2]
    out = np.empty((5, 4, 64), np.float32)
    read(store, ids, fmt, out)
    np.testing.assert_array_equal(out.reshape(20, 64), fmt.decode(store.gather(ids.reshape(-1))))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (
            np.array([[1, 2], [40, 3]]),
            RowOutOfRange,
            r"row id 40 at position \(1, 0\): expected 0 to 39",
        ),
        (np.array([3, -1]), RowOutOfRange, r"row id -1 at position 1: expected 0 to 39"),
        (np.array([-(2**63)]), RowOutOfRange, "at position 0"),
        (np.array([1], np.int32), InputError, "expected an int64 array, found int32"),
        (np.array([1.0]), InputError, "float64"),
        ([1, 2], InputError, "found list"),
    ],
)
def test_read_refuses_ids_before_it_writes(ids, error, message):
    fmt = fmt_of("f32")
    out = np.full((*np.shape(ids), 64), 7, np.float32)
    with pytest.raises(error, match=message):
        read(filled_store(fmt), ids, fmt, out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((2, 63), np.float32),
        np.zeros((2, 64)),
        np.zeros((64, 2), np.float32).T,
        np.zeros((3, 64), np.float32),
        np.zeros((2, 64), np.uint8),
        None,
    ],
)
def test_read_refuses_a_buffer_that_does_not_fit(out):
    with pytest.raises(InputError, match="out: expected"):
        read(filled_store(fmt_of("f32")), np.array([1, 2]), fmt_of("f32"), out)


def test_read_refuses_a_read_only_buffer():
    out = np.zeros((1, 64), np.float32)
    out.flags.writeable = False
    with pytest.raises(InputError, match="writeable"):
        read(filled_store(fmt_of("f32")), np.array([1]), fmt_of("f32"), out)


def test_read_refuses_a_format_of_another_width_and_a_closed_store():
    store = filled_store(fmt_of("f32"))
    with pytest.raises(InputError, match=r"expected rows of 128 bytes \(bf16, d = 64\), found 256"):
        read(store, np.array([1]), fmt_of("bf16"), np.zeros((1, 64), np.float32))
    store.close()
    with pytest.raises(StoreError, match="closed"):
        read(store, np.array([1]), fmt_of("f32"), np.zeros((1, 64), np.float32))


def test_the_repr_of_a_format_makes_it_again():
    for kind in KINDS:
        assert eval(repr(fmt_of(kind))) == fmt_of(kind)
