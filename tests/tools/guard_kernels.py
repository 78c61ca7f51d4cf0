"""The native kernels whose instructions `make guard` counts: each once, on fixed inputs.

callgrind runs this module. It clears its counters at getppid and writes them at getpgrp, two calls
of the system that nothing else here makes. A kernel is one line of KERNELS, and a function that
prepares its inputs and returns the call. Inputs begin with a page, so that loops are cut the same
way in every run. There is no torch here: under callgrind its import takes minutes.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engraphy import HashSpec, RowFormat, VocabMap, _native
from engraphy.addresses.addresser import Addresser
from engraphy.rows import read
from engraphy.store import CacheStore, RamStore

Call = Callable[[], object]

VOCAB, ROWS, COUNT = 400, 5_000, 1024
SPECS = {
    "demo": HashSpec.demo((1, 4), (2, 3), 4, 10_007, vocab_size=VOCAB, pad_id=0),
    "DeepSeek-V4.1": HashSpec.deepseek_v41(
        (1, 4), (2, 3, 4), 8, 10_007, vocab_size=VOCAB, pad_id=2
    ),
    "Qwen4-Exp": HashSpec.qwen4((1, 4), (2, 3), 8, 10_007, vocab_size=VOCAB, eos_id=5),
}


def paged(values: np.ndarray) -> np.ndarray:
    """A copy that begins with a page."""
    memory = np.frombuffer(mmap.mmap(-1, max(values.nbytes, 1)), np.uint8)
    copy = memory[: values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def normal(*shape: int) -> np.ndarray:
    """f32, the same in every run."""
    seed = np.random.default_rng(math.prod(shape))
    return paged(seed.standard_normal(shape, dtype=np.float32))


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return paged((values.view(np.uint32) >> 16).astype(np.uint16))


def stored(bf16: bool, *shape: int) -> np.ndarray:
    """f32, or the bits of bf16; the same in every run."""
    return bf16_bits(normal(*shape)) if bf16 else normal(*shape)


def at(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def some_ids(below: int, *shape: int) -> np.ndarray:
    return paged(np.random.default_rng(0).integers(0, below, shape))


def addresses(dialect: str) -> Call:
    """Row ids of both layers for 4 sequences of 256 tokens."""
    addresser = Addresser(SPECS[dialect], VocabMap.identity(VOCAB))
    ids_BT = some_ids(VOCAB, 4, 256)
    out = paged(np.empty((2, 4, 256, SPECS[dialect].columns), np.int64))
    return lambda: addresser.all_rows(ids_BT, out=out)


def filled(fmt: RowFormat) -> RamStore:
    store = RamStore(ROWS, fmt.row_bytes)
    store.scatter(np.arange(ROWS), fmt.encode(normal(ROWS, fmt.d)))
    return store


def rows(kind: str, dtype: type = np.float32) -> Call:
    """1,024 rows of width 64 from RAM, as float32, or as the bits of bf16."""
    fmt = RowFormat(kind, 64)
    store, ids_N, out = filled(fmt), some_ids(ROWS, COUNT), paged(np.empty((COUNT, 64), dtype))
    return lambda: read(store, ids_N, fmt, out)


def gather() -> Call:
    """The bytes of 1,024 rows of 264 bytes."""
    store, ids_N = filled(RowFormat("fp8", 256)), some_ids(ROWS, COUNT)
    out = paged(np.empty((COUNT, 264), np.uint8))
    return lambda: store.gather(ids_N, out)


def cache() -> Call:
    """1,024 rows of 264 bytes, all of them cached."""
    fmt = RowFormat("fp8", 256)
    store, ids_N = CacheStore(filled(fmt), 4 << 20), some_ids(200, COUNT)
    out = paged(np.empty((COUNT, 264), np.uint8))
    store.gather(ids_N, out)
    return lambda: store.gather(ids_N, out)


class Tables:
    """A table of width 64 for each layer of a dialect, and where it lies, as native readers ask."""

    def __init__(self, spec: HashSpec, fmt: RowFormat) -> None:
        self.plan = Addresser(spec, VocabMap.identity(VOCAB)).plan
        count = max(spec.row_count(layer) for layer in spec.layer_ids)
        self._tables = [paged(fmt.encode(normal(count, 64))) for _ in spec.layer_ids]
        self._shards = [np.array([at(table)], np.uint64) for table in self._tables]
        self.where = [at(shard) for shard in self._shards], [count] * 2, [count] * 2


def batch_rows(kind: str, to_bf16: bool) -> Call:
    """The rows of 4 sequences of 256 tokens, 2 layers of 16 rows of width 64, from RAM."""
    spec, fmt = SPECS["Qwen4-Exp"], RowFormat(kind, 64)
    tables = Tables(spec, fmt)
    core = _native.compiled()
    reader = core.BatchReader(tables.plan, 0, fmt.kind, fmt.d, 1.0, *tables.where)
    ids_BT = some_ids(VOCAB, 4, 256)
    dtype = np.uint16 if to_bf16 else np.float32
    outs = [paged(np.empty((4, 256, spec.columns * 64), dtype)) for _ in spec.layer_ids]

    def call() -> object:
        assert tables  # which the reader has addresses of
        return reader.read(at(ids_BT), 4, 256, 0, 0, 0, [*map(at, outs)], to_bf16, 0, False)

    return call


class TokenIds:
    """Ids [B, 1] with the attributes of a tensor: torch is not imported here."""

    KINDS = [np.float32, np.float64, None, np.int64]
    is_cpu = True
    dtype = np.int64

    def __init__(self, ids_B: np.ndarray) -> None:
        self.shape = (len(ids_B), 1)
        self._ids = ids_B

    def is_contiguous(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return at(self._ids)


def token_rows(kind: str) -> Call:
    """The rows of one token, 2 layers of 16 rows of width 64, from RAM."""
    spec, fmt = SPECS["Qwen4-Exp"], RowFormat(kind, 64)
    tables = Tables(spec, fmt)
    sizes = fmt.kind, fmt.d, 1.0, fmt.row_bytes
    reader = _native.compiled().TokenReader(
        tables.plan, *sizes, *tables.where, [False] * 2, [[], []], []
    )
    ids, columns = TokenIds(some_ids(VOCAB, 1)), some_ids(VOCAB, 4)
    _native.compiled().know_tensors(TokenIds, TokenIds.KINDS, lambda: False, None)

    def call() -> object:
        assert tables  # which the reader has addresses of
        place = [at(columns), at(columns) + 8 * (spec.order - 1), 4, 8, 1, 1, 0]
        cursor = _native.compiled().Cursor(1, place, [])
        rows = reader.read_scoped(ids, cursor)
        assert rows is not None
        return rows

    return call


def new_chunk(bf16: bool) -> tuple[Any, dict[str, np.ndarray]]:
    """The native fusion of 2 sequences of 64 tokens, hidden size 128, a convolution of 4 taps, and
    the arrays that it has addresses of."""
    batch, tokens, hidden, taps = 2, 64, 128, 4
    sizes = {"batch": batch, "tokens": tokens, "streams": 1, "hidden": hidden, "taps": taps}
    arrays = {
        "scale": normal(1, hidden),
        "conv_norm": normal(hidden),
        "conv": normal(taps, hidden),
        "normed_conv": normal(taps, 1, hidden),
        "x": stored(bf16, batch, tokens, 1, hidden),
        "key": stored(bf16, batch, tokens, 1, hidden),
        "value": stored(bf16, batch, tokens, hidden),
        "gate": normal(batch, tokens),
        "stats": normal(batch, tokens, 4),
    }
    fusion = _native.compiled().ChunkFusion(
        kind=2 if bf16 else 0,
        **sizes,
        dilation=3,
        eps=1e-6,
        conv_eps=1e-6,
        residual=True,
        columns=9,
        masked=False,
        **{name: at(array) for name, array in arrays.items()},
        window=0,
        live=0,
        starts=0,
        threads=1,
    )
    return fusion, arrays


def chunk_fusion(bf16: bool, backward: bool) -> Call:
    """A pass of `new_chunk`, without projections."""
    fusion, arrays = new_chunk(bf16)
    out, columns = paged(arrays["x"]), normal(2, 9, 128)

    def forward() -> object:
        assert arrays  # which the fusion has addresses of
        return fusion.forward(out=at(out), inputs=at(columns))

    if not backward:
        return forward
    forward()
    grads = {f"{name}_grad": paged(arrays[name]) for name in ("x", "key", "value")}
    out_grad, sums = stored(bf16, 2, 64, 1, 128), normal(5, 128)

    def call() -> object:
        assert arrays
        return fusion.backward(
            out_grad=at(out_grad),
            gate_grad=0,
            inputs_grad=0,
            **{name: at(grad) for name, grad in grads.items()},
            window_grad=0,
            sums=at(sums),
        )

    return call


def token_fusion(bf16: bool) -> Call:
    """One token: hidden size 576, one stream, rows of 1,024 values, a convolution of 4 taps."""
    hidden, width, taps, dilation = 576, 1024, 4, 3
    shapes = (
        [(hidden, width), (hidden,), (hidden, width), (hidden,)]
        + 3 * [(1, hidden)]
        + [(1, hidden, taps)]
    )

    weights, x = [stored(bf16, *shape) for shape in shapes], stored(bf16, hidden)
    table_rows = normal(width)
    columns = normal((taps - 1) * dilation + 1, hidden)
    out, gate = paged(np.empty_like(x)), normal(1)
    plan = _native.compiled().FusePlan(
        2 if bf16 else 0, 1, hidden, width, taps, dilation, 1e-6, 1e-6, False, *map(at, weights)
    )
    last = at(columns[-1:])

    def call() -> object:
        assert weights  # which the plan has addresses of
        arguments = at(x), at(table_rows), at(columns), last, columns.size, 0, at(out), at(gate)
        return plan.fuse(1, *arguments)

    return call


def sorted_rows() -> Call:
    """1,024 row ids, about half of them distinct, sorted with their positions."""
    ids_N = some_ids(700, COUNT)
    order, distinct, starts = (paged(np.zeros(COUNT + 1, np.int64)) for _ in range(3))
    core = _native.compiled()
    return lambda: core.sort_rows(at(ids_N), COUNT, at(order), at(distinct), at(starts))


def row_update(rule: str, moments_a_row: int, bf16: bool = False) -> Call:
    """Rows of width 64 get 1,024 gradients, surveyed and summed by row. bf16: rows and moments,
    rounded stochastically."""
    core = _native.compiled()
    grads_Nd, ids_N = normal(COUNT, 64), some_ids(700, COUNT)
    order, distinct, starts = (paged(np.zeros(COUNT + 1, np.int64)) for _ in range(3))
    count, several = core.sort_rows(at(ids_N), COUNT, at(order), at(distinct), at(starts))
    sums = normal(several, 64)
    firsts = np.zeros(1, np.int64)
    arrays = [np.array([at(grads_Nd)], np.uint64), firsts, order, starts, distinct]
    arrays.append(grads_Nd)
    runs = (at(arrays[0]), at(firsts), 1, at(order), at(starts), count, 64)
    places = []
    for width in (64, moments_a_row):
        values = paged(np.zeros((700, width), np.uint16 if bf16 else np.float32))
        address = np.array([at(values)], np.uint64)
        arrays += [values, address]
        places.append((at(address), 700, 700, bf16, False))
    factors = (0.1, 0.001, 0.01, 1e-8)

    def call() -> object:
        assert arrays  # which the addresses belong to
        core.survey(runs, at(sums), True)
        return core.update_rows(rule, factors, runs, at(sums), 1.0, at(distinct), *places, bf16, 7)

    return call


KERNELS: dict[str, Callable[[], Call]] = {
    **{
        f"fusion of a chunk, {kind}{back}": partial(chunk_fusion, kind == "bf16", bool(back))
        for kind in ("float32", "bf16")
        for back in ("", ", backward")
    },
    **{f"addresses of 4 x 256 tokens, {name}": partial(addresses, name) for name in SPECS},
    **{
        f"1,024 rows of width 64, {kind} to float32": partial(rows, kind)
        for kind in ("f32", "f16", "bf16", "fp8", "int8", "int4")
    },
    **{
        f"1,024 rows of width 64, {kind} to bf16": partial(rows, kind, np.uint16)
        for kind in ("f32", "bf16", "fp8", "int8", "int4")
    },
    "1,024 rows of 264 bytes, gathered": gather,
    "1,024 rows of 264 bytes, from a cache": cache,
    **{
        f"rows of 4 x 256 tokens, fp8 to {name}": partial(batch_rows, "fp8", name == "bf16")
        for name in ("float32", "bf16")
    },
    **{f"rows of one token, {kind}": partial(token_rows, kind) for kind in ("bf16", "fp8", "int8")},
    "1,024 row ids, sorted": sorted_rows,
    "1,024 gradients, RowAdam, float32": partial(row_update, "adam", 128),
    "1,024 gradients, RowAdam, bf16": partial(row_update, "adam", 128, True),
    "1,024 gradients, RowAdagrad, float32": partial(row_update, "adagrad", 1),
    "1,024 gradients, RowNesterov, bf16": partial(row_update, "nesterov", 64, True),
    "fusion of one token, float32": partial(token_fusion, False),
    "fusion of one token, bf16": partial(token_fusion, True),
}


def main() -> None:
    for make in KERNELS.values():
        call = make()
        call()  # what is made at first use does not count
        os.getppid()
        call()
        os.getpgrp()


if __name__ == "__main__":
    main()
