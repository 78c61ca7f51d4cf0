"""The one way to read rows of a store as numbers: mapped memory in place, else a gather.

This module asks a store for its mapped memory or for a gather, and knows no file. The plain numpy
versions are the specification; the native kernel (`_native/rows_kernel.cpp`) gives the same bits.
"""

# Annotations do not bind users: what they pass in is checked. _native is private to engraphy.
# pyright: reportUnnecessaryIsInstance=false, reportPrivateUsage=false

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
    """What `read` needs of a store (`store.RowStore` is one).

    `read` assumes that a store without the attribute `in_memory` may wait for a disk.
    """

    @property
    def info(self) -> Any: ...
    def reading(self, rows: int = 0) -> AbstractContextManager[Sequence[np.ndarray] | None]:
        """The scope of one read of `rows` rows.

        Gives the mapped shards, or None if the store has none. If two calls give the same first
        array, they must give the same shards.
        """
        ...

    def gather(self, ids_N: np.ndarray, out: np.ndarray | None = None) -> np.ndarray: ...


def read(store: Readable, ids: np.ndarray, fmt: RowFormat, out: np.ndarray) -> np.ndarray:
    """Reads rows of a store as numbers.

    Rows of mapped memory are dequantised from where they lie. Other rows are gathered first. The
    values are the same.

    Args:
        store: The store.
        ids: Row ids, int64 of any shape [...].
        fmt: The format of the store's rows.
        out: float32, or uint16 for bf16 bits; C-contiguous; of shape [..., d], or with the last
            axis of ids folded in: ids [B, T, C] -> out [B, T, C, d] or [B, T, E], E = C*d.

    Returns:
        `out`.

    Raises:
        RowOutOfRange: An id is negative or beyond the last row. Nothing is written.
        InputError: A shape or dtype is invalid, or fmt is not the store's. Nothing is written.
        StoreError: The store is closed or cannot be read. Also if mapped memory was damaged during
            the read; `out` may then be written in part.
        ShardTruncated: A file of the store was truncated during the read.
    """
    info = store.info
    reading = getattr(store, "reading", None)
    if reading is None:
        raise StoreError(
            "rows.read: expected a store with reading(rows), a scope, found a "
            f"{type(store).__name__} without it: derive it from engraphy.store.RowStore"
        )
    if fmt.row_bytes != info.row_bytes:
        raise InputError(
            f"rows.read: expected rows of {fmt.row_bytes} bytes ({fmt.kind}, d = {fmt.d}), "
            f"found {info.row_bytes} in the store"
        )
    if info.format not in (None, fmt):
        raise InputError(f"rows.read: expected the store's format {info.format}, found {fmt}")
    _check_id_type(ids)
    check_out(out, _out_shape(ids, fmt.d, out), (np.float32, np.uint16))
    with reading(ids.size) as shards:
        if shards is not None:
            _read_mapped(shards, info, ids, fmt, out, waits=not getattr(store, "in_memory", False))
            return out
    check_ids(ids, info.rows)
    fmt.decode(store.gather(ids.reshape(-1)), out.reshape(-1, fmt.d))
    return out


def _out_shape(ids: np.ndarray, d: int, out: np.ndarray) -> tuple[int, ...]:
    """The shape that `out` must have: [..., C*d] if `out` has that shape, else [..., C, d]."""
    folded = (d,)
    if ids.ndim:
        folded = (*ids.shape[:-1], ids.shape[-1] * d)
    if isinstance(out, np.ndarray) and out.shape == folded:
        return folded
    return (*ids.shape, d)


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
    """`read` with the native kernel, which checks the ids before it writes."""
    core = _native.compiled()
    at = addresses(shards, info)
    flat = np.ascontiguousarray(ids)
    bad = core.read_rows(
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
    if bad >= 0:
        raise _bad_id(ids, bad, at.rows)


class Addresses(NamedTuple):
    """Where shards lie.

    Attributes:
        shards_S: uint64 [S], the address of each shard.
        address: The address of shards_S itself.
        shard_rows: Rows of every shard but the last.
        rows: Rows of all shards.
        first: The first shard, which identifies them all.
    """

    shards_S: np.ndarray
    address: int
    shard_rows: int
    rows: int
    first: weakref.ref[np.ndarray]


# Cached by id() of the first shard while it lives: asking many shards takes longer than a read.
_KNOWN: dict[int, Addresses] = {}


def addresses(shards: Sequence[np.ndarray], info: Any) -> Addresses:
    """Where shards lie. Checks once what the kernels rely on.

    Raises:
        StoreError: The shards are not what the store says.
    """
    key = id(shards[0])
    known = _KNOWN.get(key)
    if known is not None and known.first() is shards[0] and known.rows == info.rows:
        return known
    sizes = [len(shard) for shard in shards]
    are_rows = all(
        shard.dtype == np.uint8
        and shard.shape[1:] == (info.row_bytes,)
        and shard.flags.c_contiguous
        for shard in shards
    )
    are_equal = all(size == sizes[0] for size in sizes[:-1]) and sizes[-1] <= sizes[0]
    if not (are_rows and are_equal and sum(sizes) == info.rows):
        raise StoreError(
            f"{info.kind} store: expected C-contiguous shards of equal sizes but the last, "
            f"together uint8 [{info.rows}, {info.row_bytes}], "
            f"found {', '.join(map(describe, shards))}"
        )
    core = _native.compiled()
    shards_S = np.array([core.address(shard) for shard in shards], np.uint64)
    first = weakref.ref(shards[0], lambda _, forget=_KNOWN.pop: forget(key, None))
    known = Addresses(shards_S, core.address(shards_S), sizes[0], info.rows, first)
    _KNOWN[key] = known
    return known


def gather_mapped(
    shards: Sequence[np.ndarray],
    info: Any,
    ids_N: np.ndarray,
    out_NR: np.ndarray,
    waits: bool = True,
) -> None:
    """Copies rows of a store's mapped shards.

    Args:
        shards: uint8 [n, row_bytes] each, of equal sizes but the last.
        info: The store's StoreInfo.
        ids_N: Row ids, int64 [N], which the caller has checked.
        out_NR: uint8 [N, row_bytes], C-contiguous, which is written.
        waits: True if reading may have to wait for a disk. If False, a few rows are copied without
            releasing the GIL, which would take longer than the copy.

    Raises:
        StoreError: The shards are not what the store says.
    """
    core = _native.core
    if core is None:
        take(shards, ids_N, out_NR)
        return
    at = addresses(shards, info)
    flat_N = np.ascontiguousarray(ids_N)
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
    """Copies rows of mapped shards, in numpy.

    Args:
        shards: uint8 [n, row_bytes] each, of equal sizes but the last.
        ids_N: Row ids, int64 [N], which the caller has checked.
        out_NR: uint8 [N, row_bytes], which is written.
    """
    for shard, local_n, positions in by_shard(shards, ids_N):
        if isinstance(positions, slice):
            # mode="raise" would buffer the output.
            np.take(shard, local_n, axis=0, out=out_NR, mode="clip")
        else:
            out_NR[positions] = np.take(shard, local_n, axis=0, mode="clip")


def by_shard(
    shards: Sequence[np.ndarray], ids_N: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
    """Groups row ids by the shard that holds them.

    Yields:
        For each shard that has some of the rows: the shard, the ids within it, and their positions
        in ids_N, ascending.
    """
    if len(shards) == 1:
        yield shards[0], ids_N, slice(None)
        return
    number_N, local_N = np.divmod(ids_N, len(shards[0]))
    order_N = np.argsort(number_N, kind="stable")
    bounds = np.searchsorted(number_N[order_N], np.arange(len(shards) + 1))
    for shard, (first, last) in zip(shards, itertools.pairwise(bounds), strict=True):
        if first < last:
            positions_n = order_N[first:last]
            yield shard, local_N[positions_n], positions_n


def check_ids(ids: np.ndarray, rows: int) -> None:
    """Checks row ids of any shape.

    Raises:
        InputError: `ids` is not an int64 array.
        RowOutOfRange: An id is not in 0..rows-1; names the first one and its position.
    """
    _check_id_type(ids)
    core = _native.core
    if core is not None and ids.flags.c_contiguous:
        # Not numpy: it would release the GIL, which takes longer than the check.
        bad = core.first_bad(core.address(ids), ids.size, rows)
    else:
        # Negative ids are the largest unsigned ones.
        bad_F = ids.reshape(-1).view(np.uint64) >= rows
        bad = int(bad_F.argmax()) if bad_F.any() else -1
    if bad >= 0:
        raise _bad_id(ids, bad, rows)


def _check_id_type(ids: np.ndarray) -> None:
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
        raise InputError(f"row ids: expected an int64 array, found {describe(ids)}")


def _bad_id(ids: np.ndarray, flat: int, rows: int) -> RowOutOfRange:
    position = tuple(int(i) for i in np.unravel_index(flat, ids.shape))
    place = position[0] if len(position) == 1 else position
    return RowOutOfRange(f"row id {ids[position]} at position {place}: expected 0 to {rows - 1}")
