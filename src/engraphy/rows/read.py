"""The one way to read rows of a store as numbers: mapped memory in place, else a gather.

Asks a store for its mapped memory or for a gather, and knows no file. The plain numpy versions are
the specification; the native kernel beside them (`_native/rows_kernel.cpp`) gives the same bits.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import _native
from ..errors import InputError, RowOutOfRange, StoreError
from ..system.checks import check_out, describe
from .format import RowFormat, chunk_rows


class Readable(Protocol):
    """What `read` needs of a store (`store.RowStore` is one). Where it has no `in_memory`, it may
    wait for a disk."""

    @property
    def info(self) -> Any: ...
    def reading(self, rows: int = 0) -> AbstractContextManager[Sequence[np.ndarray] | None]:
        """The scope of one read of `rows` rows: gives mapped memory, of which a first array is
        followed by the same others each time, or None."""
        ...

    def gather(self, ids_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray: ...


def read(store: Readable, ids: np.ndarray, fmt: RowFormat, out: np.ndarray) -> np.ndarray:
    """Rows `ids` of a store as numbers, in `out`, which is returned.

    ids: int64 of any shape [...]. out: float32, or uint16 for bf16 bits; C-contiguous; of shape
    [..., d], or with the last axis of ids folded in: ids [B, T, C] -> out [B, T, C, d] or [B, T,
    E], E = C*d. Where the store is mapped memory rows are dequantised straight from it, else
    gathered first: the bytes are the same. Raises RowOutOfRange, InputError or StoreError before
    anything is written, and ShardTruncated or StoreError if the memory that was read turns out to
    be damaged.
    """
    info, reading = store.info, getattr(store, "reading", None)
    if reading is None:
        raise StoreError(
            f"rows.read: expected a store with reading(rows), a scope, found a {type(store).__name__} "
            "without it: derive it from engraphy.store.RowStore"
        )
    if fmt.row_bytes != info.row_bytes:
        raise InputError(
            f"rows.read: the store's rows have {info.row_bytes} bytes, "
            f"rows of format {fmt.kind} with d = {fmt.d} have {fmt.row_bytes}"
        )
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


def _read_mapped(
    shards: Sequence[np.ndarray],
    info: Any,
    ids: np.ndarray,
    fmt: RowFormat,
    out: np.ndarray,
    waits: bool,
) -> None:
    if _native.core is not None:
        _read_native(shards, info, ids, fmt, out, waits)  # the kernel checks the ids
    else:
        check_ids(ids, info.rows)
        _read_plain(shards, ids.reshape(-1), fmt, out.reshape(-1, fmt.d))


def _read_plain(
    shards: Sequence[np.ndarray], ids_N: np.ndarray, fmt: RowFormat, out_Nd: np.ndarray
) -> None:
    if fmt.is_stored_as(out_Nd.dtype):
        take(shards, ids_N, out_Nd.view(np.uint8))
        return
    step = chunk_rows(fmt.d)
    raw_nR = np.empty((min(step, len(ids_N)), fmt.row_bytes), np.uint8)
    for first in range(0, len(ids_N), step):
        ids_n = ids_N[first : first + step]
        take(shards, ids_n, raw_nR[: len(ids_n)])
        fmt.decode_plain(raw_nR[: len(ids_n)], out_Nd[first : first + step])


def _read_native(
    shards: Sequence[np.ndarray],
    info: Any,
    ids: np.ndarray,
    fmt: RowFormat,
    out: np.ndarray,
    waits: bool,
) -> None:
    """Ids of any shape; the kernel checks them before it writes."""
    core, at, flat = _native.core, addresses(shards, info), np.ascontiguousarray(ids)
    wrong = core.read_rows(
        fmt.kind,
        fmt.d,
        fmt.scale or 1.0,
        at.address,
        at.shard_rows,
        at.rows,
        core.address(flat),
        flat.size,
        out.dtype == np.uint16,
        core.address(out),
        waits,
    )
    if wrong >= 0:
        raise _bad_id(ids, wrong, at.rows)


class _Addresses(NamedTuple):
    """Where shards lie: u64 [S], the address of this array itself, and the first shard, to know
    them by."""

    shards_S: np.ndarray
    address: int
    shard_rows: int
    rows: int
    first: weakref.ref[np.ndarray]


_KNOWN: dict[
    int, _Addresses
] = {}  # by id of the first shard, while it lives; asking many takes longer than a read


def addresses(shards: Sequence[np.ndarray], info: Any) -> _Addresses:
    """Where shards lie. Checks what kernels rely on, once. Raises StoreError where they are not
    what the store says."""
    key = id(shards[0])
    known = _KNOWN.get(key)
    if known is not None and known.first() is shards[0] and known.rows == info.rows:
        return known
    sizes = [len(shard) for shard in shards]
    fit = all(
        shard.dtype == np.uint8
        and shard.shape[1:] == (info.row_bytes,)
        and shard.flags.c_contiguous
        for shard in shards
    )
    if not fit or sum(sizes) != info.rows or {*sizes[:-1], max(sizes)} != {sizes[0]}:
        raise StoreError(
            f"{info.kind} store: expected C-contiguous shards of equal sizes but the last, together uint8 "
            f"[{info.rows}, {info.row_bytes}], found {', '.join(map(describe, shards))}"
        )
    shards_S = np.array([_native.core.address(shard) for shard in shards], np.uint64)
    first = weakref.ref(shards[0], lambda _, forget=_KNOWN.pop: forget(key, None))
    _KNOWN[key] = known = _Addresses(
        shards_S, _native.core.address(shards_S), sizes[0], info.rows, first
    )
    return known


def gather_mapped(
    shards: Sequence[np.ndarray],
    info: Any,
    ids_N: np.ndarray,
    out_NR: np.ndarray,
    waits: bool = True,
) -> None:
    """Copy rows `ids_N` (checked by the caller) of a store's mapped shards into out_NR,
    C-contiguous.

    waits: reading may have to wait for a disk; else few rows are copied without letting other
    threads of Python run, which takes longer. Raises StoreError where the shards are not what the
    store says.
    """
    if (core := _native.core) is None:
        take(shards, ids_N, out_NR)
    else:
        at, flat_N = addresses(shards, info), np.ascontiguousarray(ids_N)
        core.gather_rows(
            at.address,
            at.shard_rows,
            at.rows,
            info.row_bytes,
            core.address(flat_N),
            len(flat_N),
            core.address(out_NR),
            waits,
        )


def take(shards: Sequence[np.ndarray], ids_N: np.ndarray, out_NR: np.ndarray) -> None:
    """Copy rows `ids_N` (checked by the caller) of mapped shards, u8 [n, row_bytes] each, into
    out_NR."""
    for shard, local_n, where in by_shard(shards, ids_N):
        if isinstance(where, slice):
            np.take(
                shard, local_n, axis=0, out=out_NR, mode="clip"
            )  # "raise" would buffer the output
        else:
            out_NR[where] = np.take(shard, local_n, axis=0, mode="clip")


def by_shard(
    shards: Sequence[np.ndarray], ids_N: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """(shard, ids within it, their positions in ids_N) for each shard that is touched; positions
    ascend."""
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
    """Raise InputError unless ids is an int64 array, RowOutOfRange unless all of it lies in
    0..rows-1."""
    _check_id_type(ids)
    if (
        core := _native.core
    ) is not None and ids.flags.c_contiguous:  # numpy would let other threads run for this
        bad = core.first_bad(core.address(ids), ids.size, rows)
    else:
        bad_F = (
            ids.reshape(-1).view(np.uint64) >= rows
        )  # negative ids are the largest unsigned ones
        bad = int(bad_F.argmax()) if bad_F.any() else -1
    if bad >= 0:
        raise _bad_id(ids, bad, rows)


def _check_id_type(ids: np.ndarray) -> None:
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
        raise InputError(f"row ids: expected an int64 array, found {describe(ids)}")


def _bad_id(ids: np.ndarray, flat: int, rows: int) -> RowOutOfRange:
    where = tuple(int(i) for i in np.unravel_index(flat, ids.shape))
    return RowOutOfRange(
        f"row id {ids[where]} at position {where[0] if len(where) == 1 else where}: "
        f"expected 0 to {rows - 1}"
    )
