"""Rows: how one record of bytes stands for d values, and the one way to read rows of a store as numbers.

A row is `row_bytes` bytes, its scales included. Knows neither tokens, files nor tensors; `read` asks a store for its
mapped memory or for a gather. The kinds of rows stand in codecs.py. The plain numpy versions are the specification; the
native kernel beside them (`_native/rows_kernel.cpp`) gives the same bits. numpy has no bfloat16: bf16 values are their
bits as uint16.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import _native
from .codecs import CODECS, to_bf16
from .errors import ConfigError, InputError, RowOutOfRange, StoreError

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

    The f16 scale is rounded to nearest, or up where the nearest would clip (only below 2**-14), and codes are of the
    rounded scale: the error of a value is at most scale / 2. Zeros are zero bytes in every kind.
    Raises ConfigError for an unknown kind, a d that does not fit (a multiple of 32 for fp8, even for int4), and a scale
    that is missing, not a positive float32, or not used by the kind.
    """

    kind: str
    d: int
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in CODECS:
            raise ConfigError(f"row format: expected one of {', '.join(CODECS)}, found {self.kind!r}")
        if isinstance(self.d, bool) or not isinstance(self.d, (int, np.integer)) or self.d < 1:
            raise ConfigError(f"row format {self.kind}: expected a positive integer d, found {self.d!r}")
        if self.d % CODECS[self.kind].multiple:
            raise ConfigError(f"row format {self.kind}: expected d a multiple of {CODECS[self.kind].multiple}, "
                              f"found {self.d}")
        object.__setattr__(self, "d", int(self.d))
        object.__setattr__(self, "scale", self._checked_scale())

    def _checked_scale(self) -> float | None:
        if self.kind != "fp8_scaled":
            if self.scale is not None:
                raise ConfigError(f"row format {self.kind}: expected no table scale, found {self.scale!r}")
            return None
        if isinstance(self.scale, (int, float, np.floating)) and not isinstance(self.scale, bool):
            if _F32_MIN <= self.scale <= _F32_MAX:
                return float(np.float32(self.scale))
        raise ConfigError(f"row format fp8_scaled: expected a positive float32 scale, found {self.scale!r}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one record."""
        return CODECS[self.kind].row_bytes(self.d)

    def encode(self, values_Nd: np.ndarray) -> np.ndarray:
        """float32 [N, d] -> uint8 [N, row_bytes].

        Nothing is clipped: raises InputError naming row and column for a finite value that the kind cannot hold, for
        NaN and infinities in the fp8 and integer kinds, and for another shape or dtype.
        """
        check_array("values", values_Nd, (None, self.d), (np.float32,))
        raw_NR = np.empty((len(values_Nd), self.row_bytes), np.uint8)
        step = _chunk_rows(self.d)
        with np.errstate(over="ignore", under="ignore"):
            for first in range(0, len(values_Nd), step):
                values_nd = np.ascontiguousarray(values_Nd[first:first + step])
                self._check_values(values_nd, first)
                raw_NR[first:first + step] = CODECS[self.kind].encode(values_nd, self.scale or 1.0)
        return raw_NR

    def decode(self, raw_NR: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [N, row_bytes] -> `out` [N, d]: float32 (the default), or uint16 for bf16 bits, to nearest even.

        Exact in float32 for every kind. `out` has to be C-contiguous. Raises InputError before anything is written.
        """
        check_array("raw", raw_NR, (None, self.row_bytes), (np.uint8,))
        count = len(raw_NR)
        if out is None:
            out = np.empty((count, self.d), np.float32)
        check_out(out, (count, self.d), (np.float32, np.uint16))
        if (core := _native.core) is None:
            self._decode_plain(raw_NR, out)
        else:
            raw_NR = np.ascontiguousarray(raw_NR)
            core.decode_rows(self.kind, self.d, self.scale or 1.0, core.address(raw_NR), count,
                             out.dtype == np.uint16, core.address(out))
        return out

    def _decode_plain(self, raw_NR: np.ndarray, out: np.ndarray) -> None:
        if self.is_stored_as(out.dtype):
            out.view(np.uint8)[...] = raw_NR
            return
        count = len(raw_NR)
        step, scratch_nd = _chunk_rows(self.d), None
        if out.dtype == np.uint16:
            scratch_nd = np.empty((min(step, count), self.d), np.float32)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # a record may say 448 * 2**127, or NaN
            for first in range(0, count, step):
                raw_nR, out_nd = np.ascontiguousarray(raw_NR[first:first + step]), out[first:first + step]
                values_nd = out_nd if scratch_nd is None else scratch_nd[:len(out_nd)]
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
            raise InputError(f"row format {self.kind}: expected values within {limit:g}, "
                             f"found {values_nd[row, column]} in row {first + row}, column {column}")

    def is_stored_as(self, dtype: np.dtype) -> bool:
        """Whether the record is the values of an `out` of this dtype, byte for byte."""
        return (self.kind, dtype) in (("f32", np.dtype(np.float32)), ("bf16", np.dtype(np.uint16)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `scale` only where the kind has one."""
        return {"kind": self.kind, "d": self.d} | ({} if self.scale is None else {"scale": self.scale})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowFormat:
        """Inverse of `to_json`. Raises ConfigError on unknown or missing fields."""
        if not isinstance(data, Mapping) or not {"kind", "d"} <= set(data) <= {"kind", "d", "scale"}:
            raise ConfigError(f"RowFormat: expected the fields kind, d and at most scale, found {data!r}")
        return cls(**data)


class Readable(Protocol):
    """What `read` needs of a store (`store.RowStore` is one). Where it has no `in_memory`, it may wait for a disk."""

    @property
    def info(self) -> Any: ...
    def reading(self, rows: int = 0) -> AbstractContextManager[Sequence[np.ndarray] | None]:
        """The scope of one read of `rows` rows: gives mapped memory, of which a first array is followed by the same
        others each time, or None."""
        ...
    def gather(self, ids_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray: ...


def read(store: Readable, ids: np.ndarray, fmt: RowFormat, out: np.ndarray) -> np.ndarray:
    """Rows `ids` of a store as numbers, in `out`, which is returned.

    ids: int64 of any shape [...]. out: float32, or uint16 for bf16 bits; C-contiguous; of shape [..., d], or with the
    last axis of ids folded in: ids [B, T, C] -> out [B, T, C, d] or [B, T, E], E = C*d. Where the store is mapped
    memory rows are dequantised straight from it, else gathered first: the bytes are the same.
    Raises RowOutOfRange, InputError or StoreError before anything is written, and ShardTruncated or StoreError if the
    memory that was read turns out to be damaged.
    """
    info, reading = store.info, getattr(store, "reading", None)
    if reading is None:
        raise StoreError(f"rows.read: expected a store with reading(rows), a scope, found a {type(store).__name__} "
                         "without it: derive it from engraphy.store.RowStore")
    if fmt.row_bytes != info.row_bytes:
        raise InputError(f"rows.read: the store's rows have {info.row_bytes} bytes, "
                         f"rows of format {fmt.kind} with d = {fmt.d} have {fmt.row_bytes}")
    if info.format not in (None, fmt):
        raise InputError(f"rows.read: the store's rows are of {info.format}, found {fmt}")
    _check_id_type(ids)
    folded = ids.shape[:-1] + (ids.shape[-1] * fmt.d,) if ids.ndim else (fmt.d,)
    shape = folded if isinstance(out, np.ndarray) and out.shape == folded else ids.shape + (fmt.d,)
    check_out(out, shape, (np.float32, np.uint16))
    with reading(ids.size) as shards:
        if shards is not None:
            _read_mapped(shards, info, ids, fmt, out, waits=not getattr(store, "in_memory", False))
            return out
    check_ids(ids, info.rows)
    fmt.decode(store.gather(ids.reshape(-1)), out.reshape(-1, fmt.d))
    return out


def _read_mapped(shards: Sequence[np.ndarray], info: Any, ids: np.ndarray, fmt: RowFormat, out: np.ndarray,
                 waits: bool) -> None:
    if _native.core is not None:
        _read_native(shards, info, ids, fmt, out, waits)  # the kernel checks the ids
    else:
        check_ids(ids, info.rows)
        _read_plain(shards, ids.reshape(-1), fmt, out.reshape(-1, fmt.d))


def _read_plain(shards: Sequence[np.ndarray], ids_N: np.ndarray, fmt: RowFormat, out_Nd: np.ndarray) -> None:
    if fmt.is_stored_as(out_Nd.dtype):
        take(shards, ids_N, out_Nd.view(np.uint8))
        return
    step = _chunk_rows(fmt.d)
    raw_nR = np.empty((min(step, len(ids_N)), fmt.row_bytes), np.uint8)
    for first in range(0, len(ids_N), step):
        ids_n = ids_N[first:first + step]
        take(shards, ids_n, raw_nR[:len(ids_n)])
        fmt._decode_plain(raw_nR[:len(ids_n)], out_Nd[first:first + step])


def _read_native(shards: Sequence[np.ndarray], info: Any, ids: np.ndarray, fmt: RowFormat, out: np.ndarray,
                 waits: bool) -> None:
    """Ids of any shape; the kernel checks them before it writes."""
    core, at, flat = _native.core, addresses(shards, info), np.ascontiguousarray(ids)
    wrong = core.read_rows(fmt.kind, fmt.d, fmt.scale or 1.0, at.address, at.shard_rows, at.rows, core.address(flat),
                           flat.size, out.dtype == np.uint16, core.address(out), waits)
    if wrong >= 0:
        raise _bad_id(ids, wrong, at.rows)


class _Addresses(NamedTuple):
    """Where shards lie: u64 [S], the address of this array itself, and the first shard, to know them by."""

    shards_S: np.ndarray
    address: int
    shard_rows: int
    rows: int
    first: weakref.ref[np.ndarray]


_KNOWN: dict[int, _Addresses] = {}  # by id of the first shard, while it lives; asking many takes longer than a read


def addresses(shards: Sequence[np.ndarray], info: Any) -> _Addresses:
    """Where shards lie. Checks what kernels rely on, once. Raises StoreError where they are not what the store says."""
    key = id(shards[0])
    known = _KNOWN.get(key)
    if known is not None and known.first() is shards[0] and known.rows == info.rows:
        return known
    sizes = [len(shard) for shard in shards]
    fit = all(shard.dtype == np.uint8 and shard.shape[1:] == (info.row_bytes,) and shard.flags.c_contiguous
              for shard in shards)
    if not fit or sum(sizes) != info.rows or {*sizes[:-1], max(sizes)} != {sizes[0]}:
        raise StoreError(f"{info.kind} store: expected C-contiguous shards of equal sizes but the last, together uint8 "
                         f"[{info.rows}, {info.row_bytes}], found {', '.join(map(_describe, shards))}")
    shards_S = np.array([_native.core.address(shard) for shard in shards], np.uint64)
    first = weakref.ref(shards[0], lambda _, forget=_KNOWN.pop: forget(key, None))
    _KNOWN[key] = known = _Addresses(shards_S, _native.core.address(shards_S), sizes[0], info.rows, first)
    return known


def gather_mapped(shards: Sequence[np.ndarray], info: Any, ids_N: np.ndarray, out_NR: np.ndarray,
                  waits: bool = True) -> None:
    """Copy rows `ids_N` (checked by the caller) of a store's mapped shards into out_NR, C-contiguous.

    waits: reading may have to wait for a disk; else few rows are copied without letting other threads of Python run,
    which takes longer. Raises StoreError where the shards are not what the store says.
    """
    if (core := _native.core) is None:
        take(shards, ids_N, out_NR)
    else:
        at, flat_N = addresses(shards, info), np.ascontiguousarray(ids_N)
        core.gather_rows(at.address, at.shard_rows, at.rows, info.row_bytes, core.address(flat_N), len(flat_N),
                         core.address(out_NR), waits)


def take(shards: Sequence[np.ndarray], ids_N: np.ndarray, out_NR: np.ndarray) -> None:
    """Copy rows `ids_N` (checked by the caller) of mapped shards, u8 [n, row_bytes] each, into out_NR."""
    for shard, local_n, where in by_shard(shards, ids_N):
        if isinstance(where, slice):
            np.take(shard, local_n, axis=0, out=out_NR, mode="clip")  # "raise" would buffer the output
        else:
            out_NR[where] = np.take(shard, local_n, axis=0, mode="clip")


def by_shard(shards: Sequence[np.ndarray], ids_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """(shard, ids within it, their positions in ids_N) for each shard that is touched; positions ascend."""
    if len(shards) == 1:
        yield shards[0], ids_N, slice(None)
        return
    number_N, local_N = np.divmod(ids_N, len(shards[0]))
    order_N = np.argsort(number_N, kind="stable")
    bounds = np.searchsorted(number_N[order_N], np.arange(len(shards) + 1))
    for shard, (first, last) in zip(shards, itertools.pairwise(bounds), strict=True):
        if first < last:
            where = order_N[first:last]
            yield shard, local_N[where], where


def check_ids(ids: np.ndarray, rows: int) -> None:
    """Raise InputError unless ids is an int64 array, RowOutOfRange unless all of it lies in 0..rows-1."""
    _check_id_type(ids)
    if (core := _native.core) is not None and ids.flags.c_contiguous:  # numpy would let other threads run for this
        bad = core.first_bad(core.address(ids), ids.size, rows)
    else:
        bad_F = ids.reshape(-1).view(np.uint64) >= rows  # negative ids are the largest unsigned ones
        bad = int(bad_F.argmax()) if bad_F.any() else -1
    if bad >= 0:
        raise _bad_id(ids, bad, rows)


def _check_id_type(ids: np.ndarray) -> None:
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
        raise InputError(f"row ids: expected an int64 array, found {_describe(ids)}")


def _bad_id(ids: np.ndarray, flat: int, rows: int) -> RowOutOfRange:
    where = tuple(int(i) for i in np.unravel_index(flat, ids.shape))
    return RowOutOfRange(f"row id {ids[where]} at position {where[0] if len(where) == 1 else where}: "
                         f"expected 0 to {rows - 1}")


def check_out(out: np.ndarray, shape: tuple[int, ...], dtypes: tuple[type, ...]) -> None:
    """Raise InputError unless `out` can be written in place: shape, dtype, C-contiguous, writeable."""
    check_array("out", out, shape, dtypes)
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise InputError(f"out: expected a writeable, C-contiguous array, found strides {out.strides}, "
                         f"writeable {out.flags.writeable}")


def check_array(name: str, array: Any, shape: tuple[int | None, ...], dtypes: tuple[type, ...]) -> None:
    """Raise InputError naming the array unless its shape (None = any size) and dtype are as expected."""
    fits = isinstance(array, np.ndarray) and array.dtype in dtypes and (
        array.shape == shape or array.ndim == len(shape) and all(
            want is None or want == found for want, found in zip(shape, array.shape, strict=True)))
    if not fits:
        wanted = ", ".join("N" if size is None else str(size) for size in shape)
        raise InputError(f"{name}: expected {' or '.join(t.__name__ for t in dtypes)} [{wanted}], "
                         f"found {_describe(array)}")


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


def _chunk_rows(d: int) -> int:
    return max(1, _CHUNK_VALUES // d)
