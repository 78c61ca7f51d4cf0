"""Native rows are those of the plain version bit for bit, at every level this CPU runs, and nothing
else is written."""

from __future__ import annotations

import contextlib
import gc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import _native
from engraphy.errors import InputError, RowOutOfRange, StoreError
from engraphy.rows import RowFormat
from engraphy.rows.read import _KNOWN, read
from engraphy.store import RamStore

LEVELS = _native.core.levels() if _native.core else ()
pytestmark = pytest.mark.skipif(not LEVELS, reason=_native.reason)
every_level = pytest.mark.parametrize("level", LEVELS)

BLOCK_BYTES = {  # of the kinds of GGUF files
    "q8_0": 34,
    "q4_0": 18,
    "iq4_nl": 18,
    "mxfp4": 17,
    "q2_k": 84,
    "q3_k": 110,
    "q4_k": 144,
    "q5_k": 176,
}
SCALES_AT = {"q8_0": (0,), "q4_0": (0,), "iq4_nl": (0,), "q2_k": (80, 82)}
SCALES_AT |= {"q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2)}
KINDS = ("f32", "f16", "bf16", "fp8", "fp8_scaled", "int8", "int4", *BLOCK_BYTES)
MULTIPLE = {"fp8": 32, "int4": 2}
MULTIPLE |= {kind: 256 if kind.endswith("_k") else 32 for kind in BLOCK_BYTES}
SCALED = 0.0123
DTYPES = (np.dtype(np.float32), np.dtype(np.uint16))  # uint16: the bits of bf16
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16"))
POISON, GUARD, LINE = 0xA5, 64, 64
AROUND_THE_PREFETCH = (0, 1, 2, 7, 8, 9, 16, 40)


def fmt_of(kind: str, d: int, scale: float = SCALED) -> RowFormat:
    return RowFormat(kind, d, scale=scale if kind == "fp8_scaled" else None)


def any_bytes(count: int, fmt: RowFormat, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, fmt.row_bytes), np.uint8)


class Guarded:
    """A poisoned array that begins `skip` bytes after a line, with poison before and behind it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, skip: int = 0):
        size = int(np.prod(shape)) * dtype.itemsize
        self._bytes = np.full(GUARD + LINE + skip + size + GUARD, POISON, np.uint8)
        to_line = -(self._bytes.ctypes.data + GUARD) % LINE
        self._begin = GUARD + to_line + skip
        self._end = self._begin + size
        self.array = self._bytes[self._begin : self._end].view(dtype).reshape(shape)

    def intact(self) -> bool:
        return bool(
            (self._bytes[: self._begin] == POISON).all()
            and (self._bytes[self._end :] == POISON).all()
        )

    def untouched(self) -> bool:
        return bool((self._bytes == POISON).all())


def decoded(
    level: str, fmt: RowFormat, raw: np.ndarray, dtype: np.dtype, skip: int = 0
) -> np.ndarray:
    out = Guarded((len(raw), fmt.d), dtype, skip)
    with _native.forced(level):
        assert fmt.decode(raw, out=out.array) is out.array
    assert out.intact()
    return out.array


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    unsigned = np.dtype(f"u{expected.dtype.itemsize}")
    np.testing.assert_array_equal(found.view(unsigned), expected.view(unsigned))


def store_of(shards: list[np.ndarray], row_bytes: int, total: int) -> SimpleNamespace:
    """As much of a store as `read` needs."""
    info = SimpleNamespace(kind="test", rows=total, row_bytes=row_bytes, format=None)
    return SimpleNamespace(info=info, reading=lambda rows=0: contextlib.nullcontext(tuple(shards)))


def in_shards(raw: np.ndarray, shard_rows: int) -> SimpleNamespace:
    shards = [raw[first : first + shard_rows].copy() for first in range(0, len(raw), shard_rows)]
    return store_of(shards, raw.shape[1], len(raw))


# Every byte that a record can hold.


def every_record(kind: str) -> list[tuple[RowFormat, np.ndarray]]:
    codes = np.arange(256, dtype=np.uint8)
    halves = np.arange(2**16, dtype=np.uint16)
    if kind in ("f16", "bf16"):
        return [(fmt_of(kind, 64), halves.view(np.uint8).reshape(-1, 128))]
    # Kernels take another way if a code is NaN.
    numbers = np.where((codes & 0x7F) == 0x7F, codes - 1, codes).astype(np.uint8)
    if kind == "fp8":  # row b: all codes under scale byte b
        scales = np.repeat(codes[:, None], 8, axis=1)
        return [
            (fmt_of(kind, 256), np.concatenate([np.tile(some, (256, 1)), scales], axis=1))
            for some in (codes, numbers)
        ]
    if kind == "fp8_scaled":
        scales = (SCALED, 1.0, 2.0**-149, 2.0**-140 * 3, 2.0**-126, 3.4028234e38, 1e36)
        return [
            (fmt_of(kind, 256, scale), some[None]) for scale in scales for some in (codes, numbers)
        ]
    if kind == "f32":
        bits = np.random.default_rng(0).integers(0, 2**32, 2**18, np.uint32)
        highs = (halves.astype(np.uint32) << 16)[
            :, None
        ]  # every upper half, with lower halves where rounding turns
        lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        return [
            (
                fmt_of(kind, 64),
                np.concatenate([bits, (highs | lows).reshape(-1)]).view(np.uint8).reshape(-1, 256),
            )
        ]
    if kind in BLOCK_BYTES:
        return [
            (fmt, any_blocks(fmt)) for fmt in (fmt_of(kind, n * MULTIPLE[kind]) for n in (1, 5))
        ]
    some = np.array(
        [0, 1, 2, 3, 100, 126, 127, 128, 129, 130, 200, 254, 255, 0x7F, 0x80, 0xF8], np.uint8
    )
    few_scales = halves[::257] | np.uint16(1)
    values = 2 if kind == "int4" else 1  # of a byte
    return [
        (fmt_of(kind, some.size * values), with_scales(some, halves)),
        (fmt_of(kind, 4 * some.size * values), with_scales(np.tile(some, 4), halves)),
        (fmt_of(kind, codes.size * values), with_scales(codes, few_scales)),
    ]


def any_blocks(fmt: RowFormat) -> np.ndarray:
    """So many that each byte of a block takes every value; some scales are infinite."""
    raw = any_bytes(4000, fmt)
    infinity = np.array([np.inf], np.float16).view(np.uint8)
    for at in SCALES_AT.get(fmt.kind, ()):
        raw[at :: 50 + at, at : at + 2] = infinity
    return raw


def with_scales(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.tile(codes, (len(scales), 1)), scales[:, None].view(np.uint8)], axis=1
    )


@every_level
@every_kind
@every_dtype
def test_every_code_under_every_scale_decodes_to_the_bits_of_the_plain_version(level, kind, dtype):
    for fmt, raw in every_record(kind):
        assert_same_bits(decoded(level, fmt, raw, dtype), decoded("off", fmt, raw, dtype))


def test_the_patterns_hold_what_is_hard():
    values = {
        kind: np.concatenate([fmt.decode(raw).reshape(-1) for fmt, raw in every_record(kind)])
        for kind in KINDS
    }
    large = ("f16", "int8", "int4", *BLOCK_BYTES)  # scales of f16 cannot be as small
    for kind, found in values.items():
        # Every scale of mxfp4 is a number, and its codes have no negative zero.
        assert np.isnan(found).any() or kind == "mxfp4", kind
        assert (np.signbit(found) & (found == 0)).any() or kind == "mxfp4", kind
        tiny = (found != 0) & (np.abs(found) < 2.0**-126)
        assert tiny.any() or kind in large, kind
        assert np.isinf(found).any(), kind


@every_level
@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    units=st.integers(1, 70),
    skip=st.integers(0, 3),
    count=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_rows_of_any_width_decode_from_and_to_any_byte(
    level, kind, dtype, units, skip, count, seed
):
    fmt = fmt_of(kind, units * MULTIPLE.get(kind, 1))
    raw = Guarded((count, fmt.row_bytes), np.dtype(np.uint8), skip)
    raw.array[...] = any_bytes(count, fmt, seed)
    assert_same_bits(
        decoded(level, fmt, raw.array, dtype, skip), decoded("off", fmt, raw.array, dtype)
    )


@every_level
@every_kind
def test_records_that_are_not_contiguous_decode_alike(level, kind):
    fmt = fmt_of(kind, 256)
    raw = any_bytes(30, fmt)
    assert_same_bits(
        decoded(level, fmt, raw[::-3], DTYPES[0]), decoded("off", fmt, raw[::-3].copy(), DTYPES[0])
    )


@every_level
@pytest.mark.parametrize("kind", ["f16", "fp8_scaled", "fp8"])
def test_small_codes_survive_a_mode_that_flushes_subnormal_numbers(level, kind):
    fmt, raw = every_record(kind)[0]
    if kind == "fp8":
        raw = raw[127:128]  # scale 1
    expected = decoded("off", fmt, raw, DTYPES[0]).copy()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    try:
        found = decoded(level, fmt, raw, DTYPES[0])
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(found, expected)


@every_level
@every_kind
def test_what_overflows_in_a_record_warns_nobody(level, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fmt, raw in every_record(kind):
            decoded(level, fmt, raw, DTYPES[0])
            np.add(np.ones(8, np.float32), 1)


# Reading rows of mapped memory.


@every_level
@settings(max_examples=150)
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shard_rows=st.integers(1, 50),
    count=st.sampled_from(AROUND_THE_PREFETCH),
    units=st.integers(1, 40),
    skip=st.integers(0, 3),
)
def test_rows_of_several_shards_are_read_as_the_plain_version_reads_them(
    level, data, kind, dtype, shard_rows, count, units, skip
):
    fmt, total = fmt_of(kind, units * MULTIPLE.get(kind, 1)), data.draw(st.integers(1, 120))
    store = in_shards(any_bytes(total, fmt), shard_rows)
    edges = [0, total - 1, min(shard_rows, total) - 1, min(shard_rows, total - 1)]
    numbers = data.draw(
        st.lists(st.integers(0, total - 1) | st.sampled_from(edges), min_size=count, max_size=count)
    )
    ids = Guarded((count,), np.dtype(np.int64), skip)
    ids.array[...] = numbers
    out, plain = Guarded((count, fmt.d), dtype, skip), np.empty((count, fmt.d), dtype)
    with _native.forced("off"):
        read(store, ids.array, fmt, plain)
    with _native.forced(level):
        assert read(store, ids.array, fmt, out.array) is out.array
    assert out.intact()
    assert_same_bits(out.array, plain)


@every_level
@every_kind
@every_dtype
@pytest.mark.parametrize("skip", [0, 4])
def test_a_large_output_has_the_same_bits_and_ends_where_it_should(level, kind, dtype, skip):
    """Kernels write it past the caches if its rows begin with a line, that is, if `skip` is 0."""
    fmt, raw = every_record(kind)[-1]
    count = (8 << 20) // (fmt.d * dtype.itemsize) + 3
    store = in_shards(raw, len(raw) // 3 + 1)
    ids = np.random.default_rng(0).integers(0, len(raw), count)
    out = Guarded((count, fmt.d), dtype, skip)
    with _native.forced(level):
        read(store, ids, fmt, out.array)
    assert out.intact()
    assert_same_bits(out.array, decoded("off", fmt, raw, dtype)[ids])


@every_level
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)])
def test_ids_of_any_shape_and_stride_are_read(level, shape):
    fmt = fmt_of("int8", 10)
    raw = any_bytes(40, fmt)
    ids = np.random.default_rng(1).integers(0, 40, shape)
    for given_ids in (ids, ids.T, ids[..., ::-1] if shape else ids):
        out = Guarded((*given_ids.shape, 10), DTYPES[0])
        with _native.forced(level):
            read(in_shards(raw, 16), given_ids, fmt, out.array)
        assert out.intact()
        assert_same_bits(out.array, decoded("off", fmt, raw, DTYPES[0])[given_ids])


@every_level
def test_ids_beyond_32_bits_find_their_shard(level):
    fmt, shard_rows = fmt_of("bf16", 4), 2**33
    first, second = any_bytes(3, fmt, 1), any_bytes(3, fmt, 2)
    shards = np.array([_native.core.address(first), _native.core.address(second)], np.uint64)
    ids, out = np.array([2, shard_rows + 1, 0, shard_rows + 2]), Guarded((4, 4), DTYPES[1])
    with _native.forced(level):
        code = _native.core.read_rows(
            "bf16",
            4,
            1.0,
            _native.core.address(shards),
            shard_rows,
            2 * shard_rows,
            _native.core.address(ids),
            4,
            True,
            _native.core.address(out.array),
            True,
        )
    assert code == -1 and out.intact()
    np.testing.assert_array_equal(
        out.array.view(np.uint8), np.stack([first[2], second[1], first[0], second[2]])
    )


@every_level
@pytest.mark.parametrize("bad", [-1, -(2**63), 30, 2**63 - 1])
def test_an_id_out_of_range_is_named_as_the_plain_version_names_it_and_nothing_is_written(
    level, bad
):
    fmt = fmt_of("fp8", 32)
    store = in_shards(any_bytes(30, fmt), 8)
    ids = np.ones((5, 20), np.int64)
    ids[3, 7] = ids[4, 19] = bad
    messages = []
    for used in ("off", level):
        out = Guarded((5, 20, 32), DTYPES[0])
        with (
            _native.forced(used),
            pytest.raises(RowOutOfRange, match=r"position \(3, 7\)") as refused,
        ):
            read(store, ids, fmt, out.array)
        assert out.untouched()
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@every_level
@pytest.mark.parametrize(
    "ids", [np.array([1], np.int32), np.array([1.0]), np.array([1], ">i8"), [1]]
)
def test_ids_of_another_type_are_refused_and_nothing_is_written(level, ids):
    out = Guarded((1, 32), DTYPES[0])
    with _native.forced(level), pytest.raises(InputError, match="int64"):
        read(in_shards(any_bytes(30, fmt_of("fp8", 32)), 8), ids, fmt_of("fp8", 32), out.array)
    assert out.untouched()


# What the kernel has to be able to rely on.


def zeros(*sizes: int, width: int = 128) -> list[np.ndarray]:
    return [np.zeros((size, width), np.uint8) for size in sizes]


@every_level
@pytest.mark.parametrize(
    "shards",
    [
        zeros(4, 4),
        zeros(4, 5, 1),
        zeros(4, 4, 1, 1),
        zeros(5, 5, 1),
        zeros(4, 6),
        zeros(10, width=127),
        [*zeros(4, 4), *zeros(2, width=127)],
        [np.zeros((10, 128), np.int8)],
        [np.zeros((10, 256), np.uint8)[:, ::2]],
        [np.zeros((20, 128), np.uint8)[::2]],
        [np.zeros(1280, np.uint8)],
    ],
    ids=range(11),
)
def test_shards_that_are_not_what_the_store_says_are_refused(level, shards):
    out = Guarded((1, 64), DTYPES[0])
    with (
        _native.forced(level),
        pytest.raises(StoreError, match=r"test store: expected .* \[10, 128\], found"),
    ):
        read(store_of(shards, 128, 10), np.array([0]), fmt_of("bf16", 64), out.array)
    assert out.untouched()


@every_level
def test_a_store_over_the_same_shards_that_says_fewer_rows_is_refused(level):
    shards, out = zeros(10), np.empty((1, 64), np.float32)
    with _native.forced(level):
        read(store_of(shards, 128, 10), np.array([9]), fmt_of("bf16", 64), out)
        with pytest.raises(StoreError, match=r"\[9, 128\]"):
            read(store_of(shards, 128, 9), np.array([9]), fmt_of("bf16", 64), out)


@every_level
def test_what_is_known_of_shards_dies_with_them(level):
    gc.collect()  # what earlier tests left
    fmt, known = fmt_of("bf16", 64), len(_KNOWN)
    with _native.forced(level):
        for turn in range(20):  # memory is given out again: each turn has to see its own rows
            raw = np.full((10, 128), turn, np.uint8)
            out = np.empty((10, 64), np.uint16)
            store = RamStore(10, 128)
            store.scatter(np.arange(10), raw)
            read(store, np.arange(10), fmt, out)
            np.testing.assert_array_equal(out.view(np.uint8), raw)
            store.close()
    gc.collect()
    assert len(_KNOWN) == known


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "fp4"},
        {"kind": "fp8", "d": 48},
        {"kind": "int4", "d": 3},
        {"d": 0},
        {"count": -1},
        {"shard_rows": 0},
        {"rows": -1},
        {"ids": 0},
    ],
)
def test_the_kernel_refuses_what_cannot_be_meant(wrong):
    address, buffer = _native.core.address, Guarded((64,), DTYPES[0])
    call = {
        "kind": "f32",
        "d": 32,
        "scale": 1.0,
        "shards": address(np.zeros(1, np.uint64)),
        "shard_rows": 1,
        "rows": 1,
        "ids": address(np.zeros(1, np.int64)),
        "count": 1,
        "to_bf16": False,
        "out": address(buffer.array),
        "waits": True,
    }
    with pytest.raises(ValueError, match="must|unknown"):
        _native.core.read_rows(**call | wrong)
    if set(wrong) <= {"kind", "d", "count"}:
        raw = {name: call[name] for name in ("kind", "d", "scale", "count", "to_bf16", "out")} | {
            "raw": 0
        }
        with pytest.raises(ValueError, match="must|unknown"):
            _native.core.decode_rows(**raw | wrong)
    assert buffer.untouched()


def test_addresses_are_those_that_numpy_names():
    for array in (np.arange(5), np.zeros((0, 3)), np.zeros((3, 4), np.uint8)[1:], np.array(3.0)):
        assert _native.core.address(array) == array.ctypes.data
    for wrong in (np.arange(10)[::2], [1, 2], None):
        with pytest.raises((ValueError, TypeError, BufferError)):
            _native.core.address(wrong)
