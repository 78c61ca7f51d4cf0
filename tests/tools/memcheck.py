"""The native kernels under valgrind's memcheck: no read or write outside of what they are given,
and no branch on memory that nobody wrote. `make valgrind`.

valgrind knows no AVX-512: the kernels of scalar and AVX2 are run, on small inputs of odd sizes, and
are compared with the plain versions as everywhere. What memcheck says of Python and numpy
themselves is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import numpy as np

from engraphy import HashSpec, VocabMap, _native
from engraphy.addresses import HotIndex, Ngrams
from engraphy.addresses.addresser import Addresser
from engraphy.addresses.hot import HotOrder
from engraphy.addresses.perfect_hash import PerfectHash
from engraphy.rows import RowFormat, read
from engraphy.store import CacheStore, RamStore
from tests.tools.guard_kernels import TokenIds

SPECS = (
    HashSpec.demo((1, 4), (2, 3), 3, 101, vocab_size=40, pad_id=0),
    HashSpec.qwen4((1, 4), (2, 3), 2, 61, vocab_size=40, eos_id=5),
    HashSpec.deepseek_v41((1,), (2, 3, 4), 2, 997, vocab_size=40, pad_id=2),
)
FORMATS = [RowFormat(kind, 34) for kind in ("f32", "f16", "bf16", "int8", "int4")]
FORMATS.append(RowFormat("fp8", 64))
BLOCKS = [RowFormat(kind, 64) for kind in ("q8_0", "q4_0", "iq4_nl", "mxfp4")]
BLOCKS += [RowFormat(kind, 512) for kind in ("q2_k", "q3_k", "q4_k", "q5_k")]
COUNTS = (0, 1, 7, 9, 33)


def plainly(function):
    with _native.forced("off"):
        return function()


def hashes(level: str, rng: np.random.Generator) -> None:
    vocab = VocabMap(np.arange(60) % 40)
    for spec in SPECS:
        for tokens in COUNTS:
            ids_BT = rng.integers(0, 60, (3, tokens))
            live = rng.random((3, tokens)) < 0.8
            starts = rng.random((3, tokens)) < 0.2

            def rows(spec=spec, ids_BT=ids_BT, live=live, starts=starts) -> np.ndarray:
                return Addresser(spec, vocab).all_rows(ids_BT, live=live, starts=starts)

            expected = plainly(rows)
            with _native.forced(level):
                np.testing.assert_array_equal(rows(), expected)


def stores(level: str, rng: np.random.Generator) -> None:
    for fmt in (*FORMATS, *BLOCKS):
        store = RamStore(101, fmt.row_bytes)
        values = rng.standard_normal((101, fmt.d)).astype(np.float32)
        raw_NR = rng.integers(0, 100, (101, fmt.row_bytes), np.uint8)  # all scales are finite
        if fmt not in BLOCKS:
            raw_NR = plainly(lambda fmt=fmt, values=values: fmt.encode(values))
        store.scatter(np.arange(101), raw_NR)
        cached = CacheStore(store, 1 << 14)
        for count in COUNTS:
            ids_N = rng.integers(0, 101, count)

            def numbers(source, fmt=fmt, ids_N=ids_N) -> np.ndarray:
                return read(source, ids_N, fmt, np.empty((len(ids_N), fmt.d), np.float32))

            expected = plainly(lambda store=store, numbers=numbers: numbers(store))
            raw = plainly(lambda store=store, ids_N=ids_N: store.gather(ids_N))
            with _native.forced(level):
                np.testing.assert_array_equal(numbers(store), expected)
                for _ in range(2):  # missed, then found
                    np.testing.assert_array_equal(cached.gather(ids_N), raw)


def batches(level: str, rng: np.random.Generator) -> None:
    """Chunks of tokens, and single ones, through both readers; row ids and rows are compared."""
    vocab = VocabMap(np.arange(60) % 40)
    for spec, fmt in zip(SPECS, (FORMATS[0], FORMATS[3], FORMATS[-1]), strict=True):
        addresser = Addresser(spec, vocab)
        counts = [spec.row_count(layer) for layer in spec.layer_ids]
        tables = [rng.standard_normal((count, fmt.d)).astype(np.float32) for count in counts]
        records = [plainly(partial(fmt.encode, table)) for table in tables]
        shards = [np.array([_at(record)], np.uint64) for record in records]
        where = [_at(shard) for shard in shards], counts, counts
        for tokens in COUNTS[1:]:
            ids_BT = rng.integers(0, 40, (2, tokens))
            history = rng.integers(0, 40, (2, spec.order - 1))
            ids_LBTC = plainly(partial(addresser.all_rows, ids_BT, history))
            expected = [
                plainly(partial(fmt.decode, record[ids_BTC.ravel()]))
                for record, ids_BTC in zip(records, ids_LBTC, strict=True)
            ]
            outs = [np.empty_like(values) for values in expected]
            found_LBTC = np.empty_like(ids_LBTC)
            with _native.forced(level):
                core = _native.core
                reader = core.BatchReader(addresser.plan, 0, fmt.kind, fmt.d, 1.0, *where)
                given = _at(ids_BT), 2, tokens, _at(history), 0, 0
                reader.read(*given, [*map(_at, outs)], False, _at(found_LBTC), False)
            np.testing.assert_array_equal(found_LBTC, ids_LBTC)
            for out, values in zip(outs, expected, strict=True):
                np.testing.assert_array_equal(out, values)
            one_by_one(level, addresser, fmt, where, np.hstack([history, ids_BT]), expected)


def one_by_one(
    level: str,
    addresser: Addresser,
    fmt: RowFormat,
    where: tuple[list[int], ...],
    columns_BN: np.ndarray,
    expected: list[np.ndarray],
) -> None:
    """The same tokens through a cursor, over ids that are there already."""
    layers, batch = len(expected), len(columns_BN)
    count, before = columns_BN.shape[1], addresser.spec.order - 1
    with _native.forced(level):
        core = _native.core
        sizes = fmt.kind, fmt.d, 1.0, fmt.row_bytes
        files = [0] * layers, [[]] * layers, []
        reader = core.TokenReader(addresser.plan, *sizes, *where, *files)
        core.know_tensors(TokenIds, TokenIds.KINDS, lambda: False, None)
        place = [_at(columns_BN), _at(columns_BN) + 8 * before, count, 8, count - before, 1, 0]
        cursor = core.Cursor(batch, place, [])
        for t in range(count - before):
            rows = reader.read_scoped(TokenIds(columns_BN[:, before + t].copy()), cursor)
            cursor.advance()
            assert rows is not None
            found_LBE = np.frombuffer(rows, np.float32).reshape(layers, batch, -1)
            for found_BE, values in zip(found_LBE, expected, strict=True):
                values_BTE = values.reshape(batch, count - before, -1)
                np.testing.assert_array_equal(found_BE, values_BTE[:, t])


def fusion(level: str, rng: np.random.Generator) -> None:
    """One token of three sequences; its values are compared where there is torch, in the tests."""
    batch, streams, hidden, width, taps, order = 3, 2, 37, 19, 4, 3
    before = (taps - 1) * order

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    weights = [
        values(streams * hidden, width),
        values(streams * hidden),
        values(hidden, width),
        values(hidden),
        *(values(streams, hidden) for _ in range(3)),
        values(streams, hidden, taps),
    ]
    x, rows = values(batch, streams, hidden), values(batch, width)
    columns = values(batch, before + 1, streams, hidden)
    out, gate = np.empty_like(x), np.empty((batch, streams), np.float32)
    inputs = _at(columns) + before * columns.strides[1]
    sizes = 0, streams, hidden, width, taps, order, 1e-6, 1e-6, False
    pointers = _at(x), _at(rows), _at(columns), inputs, columns[0].size, 0, _at(out), _at(gate)
    with _native.forced(level):
        _native.core.FusePlan(*sizes, *map(_at, weights)).fuse(batch, *pointers)
    assert np.isfinite(out).all() and ((gate > 0) & (gate < 1)).all()


def chunks(level: str, rng: np.random.Generator) -> None:
    """Chunks of three sequences, forward and backward; float32 is compared with float64, and the
    values where there is torch, in the tests."""
    batch, streams, hidden, taps, order = 3, 2, 37, 4, 3
    before = (taps - 1) * order
    for tokens in (1, 5, 140):  # 140: more than one piece of the work
        shape = (batch, tokens, streams, hidden)
        conv_shape = (taps, streams, hidden)
        exact = {
            "scale": rng.standard_normal((streams, hidden)),
            "conv_norm": rng.standard_normal((streams, hidden)),
            "conv": rng.standard_normal(conv_shape),
            "x": rng.standard_normal(shape),
            "key": rng.standard_normal(shape),
            "value": rng.standard_normal((batch, tokens, hidden)),
            "window": rng.standard_normal((batch, before, streams, hidden)),
        }
        exact["normed_conv"] = exact["conv"] * exact["conv_norm"]
        flags = {
            "live": rng.random((batch, tokens)) < 0.8,
            "starts": rng.random((batch, tokens)) < 0.1,
        }
        exact_grads = {
            "out_grad": rng.standard_normal(shape),
            "gate_grad": rng.standard_normal(shape[:3]),
            "inputs_grad": rng.standard_normal(shape),
        }
        sizes = {
            "batch": batch,
            "tokens": tokens,
            "streams": streams,
            "hidden": hidden,
            "taps": taps,
            "dilation": order,
            "eps": 1e-6,
            "conv_eps": 1e-6,
            "residual": True,
            "columns": tokens,
            "masked": False,
            "threads": 1,
        }
        found = []
        for kind, dtype in ((4, np.float64), (0, np.float32)):
            reads = {name: values.astype(dtype) for name, values in exact.items()} | flags
            kept = {"gate": np.empty(shape[:3], dtype), "stats": np.empty((*shape[:3], 4), dtype)}
            outputs = {"out": np.empty(shape, dtype), "inputs": np.empty(shape, dtype)}
            grads = {name: values.astype(dtype) for name, values in exact_grads.items()}
            made = {f"{name}_grad": np.empty_like(reads[name]) for name in ("x", "key", "value")}
            made["window_grad"] = np.empty_like(reads["window"])
            made["sums"] = np.empty((2 + 2 * taps, streams, hidden), dtype)
            with _native.forced(level):
                fusion = _native.core.ChunkFusion(kind=kind, **sizes, **_all_at(reads | kept))
                fusion.forward(**_all_at(outputs))
                fusion.backward(**_all_at(grads | made))
            found.append([*outputs.values(), kept["gate"], *made.values()])
        for one, other in zip(*found, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3 * np.abs(one).max())


def paged(level: str, rng: np.random.Generator) -> None:
    """Tokens with their lines in a cache of just these lines; the values are compared in the
    tests."""
    streams, hidden, taps = 2, 37, 3
    for tokens in (1, 40):  # 40: more than one piece of the work
        stride = (streams + 1) * hidden
        weights = {
            "scale": rng.standard_normal((streams, hidden)).astype(np.float32),
            "conv_norm": rng.standard_normal((streams, hidden)).astype(np.float32),
            "conv": rng.standard_normal((taps, streams, hidden)).astype(np.float32),
        }
        x = rng.standard_normal((tokens, streams, hidden)).astype(np.float32)
        projected = rng.standard_normal((tokens, stride)).astype(np.float32)
        places = np.arange(tokens)[:, None] - np.arange(taps)[::-1]
        offsets = np.where(places >= 0, places * streams * hidden, -1)
        arrays = {
            "x": x,
            "key": projected,
            "live": rng.random(tokens) < 0.8,
            "offsets": offsets,
            "cache": np.empty(x.size, np.float32),
            "out": np.empty_like(x),
        }
        sizes = {"tokens": tokens, "stride": stride, "cache_values": x.size, "threads": 1}
        value = _at(projected) + streams * hidden * projected.itemsize
        with _native.forced(level):
            fusion = _native.core.PagedFusion(
                bf16=False,
                streams=streams,
                hidden=hidden,
                taps=taps,
                eps=1e-6,
                conv_eps=1e-6,
                **_all_at(weights),
            )
            fusion.fuse(value=value, **sizes, **_all_at(arrays))
        assert np.isfinite(arrays["out"]).all() and np.isfinite(arrays["cache"]).all()


def updates(level: str, rng: np.random.Generator) -> None:
    """A step of RowAdam on rows and moments in bf16; its values are compared in the tests."""
    rows, dim, key = 31, 21, 12345
    moments, factors = 2 * dim, (0.1, 0.001, 0.01, 1e-8)

    for count in COUNTS[1:]:
        ids_N = rng.integers(0, rows, count)
        grad_Nd = rng.standard_normal((count, dim)).astype(np.float32)
        order_N, ids_U, starts = (np.empty(count + more, np.int64) for more in (0, 0, 1))
        grads, firsts = np.array([_at(grad_Nd)], np.uint64), np.zeros(1, np.int64)
        tables = [np.zeros((rows, width), np.uint16) for width in (dim, moments)]
        addresses = [np.array([_at(table)], np.uint64) for table in tables]
        places = [(_at(address), rows, rows, True, False) for address in addresses]
        with _native.forced(level):
            core = _native.core
            distinct, several = core.sort_rows(
                _at(ids_N), count, _at(order_N), _at(ids_U), _at(starts)
            )
            sums_Md = np.empty((several, dim), np.float32)
            runs = (_at(grads), _at(firsts), 1, _at(order_N), _at(starts), distinct, dim)
            is_finite, _ = core.survey(runs, _at(sums_Md), True)
            assert is_finite and distinct == len(np.unique(ids_N))
            given = (_at(sums_Md), 1.0, _at(ids_U), *places, True, key)
            assert core.update_rows("adam", factors, runs, *given) == -1


def hot_indexes(level: str, rng: np.random.Generator) -> None:
    """Indexes are built and looked up; then with bits of them changed, as a damaged file has."""
    for order in (1, 2, 5):
        for count in (1, 7, 65, 5000):
            numbers = rng.permutation(4 * count)
            tried = np.empty((len(numbers), order), np.int32)
            tried[:, 0] = numbers
            tried[:, 1:] = rng.integers(0, 9, (len(tried), order - 1))
            ngrams = Ngrams({order: tried[:count]}, "0" * 64)
            for bits in (None, 9):
                expected = plainly(lambda ngrams=ngrams, bits=bits: HotIndex.build(ngrams, bits))
                slots = plainly(lambda expected=expected, tried=tried: expected.slots_of(tried))
                with _native.forced(level):
                    found = HotIndex.build(ngrams, bits)
                    assert found.digest == expected.digest
                    np.testing.assert_array_equal(found.slots_of(tried), slots)
                    for _ in range(3):
                        changed = _damaged(found.part(order), rng)
                        assert changed.slots_of(tried, count).max() < count


def _damaged(part: HotOrder, rng: np.random.Generator) -> HotOrder:
    """The same with some bits changed, in arrays of its own that end where they end."""
    blocks_BW, records_NR = part.perfect.blocks_BW.copy(), part.records_NR.copy()
    for array in (blocks_BW, records_NR):
        places = rng.integers(0, array.size, 1 + array.size // 50)
        array.reshape(-1)[places] ^= rng.integers(0, 2**32, len(places), np.uint32)
    perfect = PerfectHash(part.perfect.seed, part.perfect.sizes, blocks_BW)
    return HotOrder(part.order, perfect, records_NR, part.fingerprint_bits)


def _at(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _all_at(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: _at(array) for name, array in arrays.items()}


RUNS = (hashes, stores, batches, fusion, chunks, paged, updates, hot_indexes)


def kernels() -> None:
    """Run by valgrind."""
    for level in _native.core.levels():
        for number, run in enumerate(RUNS):
            run(level, np.random.default_rng(number))
            print(f"{level}: {run.__name__}", flush=True)


def of_ours(error: ET.Element) -> bool:
    """Whether an error is no leak, and a frame of its first stack lies in the native core."""
    stack = error.find("stack")
    if stack is None or (error.findtext("kind") or "").startswith("Leak_"):
        return False
    return any("/_native/_core." in (obj.text or "") for obj in stack.iter("obj"))


def main() -> int:
    if _native.core is None:
        print(
            f"make valgrind: expected the native core, found none: {_native.reason}",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "memcheck.xml"
        command = ["valgrind", "--xml=yes", f"--xml-file={found}", "--leak-check=no"]
        command += [sys.executable, "-m", "tests.tools.memcheck", "--kernels"]
        given = {"PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1", "ENGRAPHY_THREADS": "1"}
        done = subprocess.run(
            command, env={**os.environ, **given, "ENGRAPHY_NATIVE": "auto"}, check=False
        )
        errors = [error for error in ET.parse(found).iter("error") if of_ours(error)]
    for error in errors:
        frames = [
            f"{frame.findtext('fn')} ({frame.findtext('file')}:{frame.findtext('line')})"
            for frame in error.find("stack").iter("frame")
        ]
        what = error.findtext("what") or error.findtext("xwhat/text")
        print(what, *frames[:6], sep="\n    ")
    print(f"memcheck: {len(errors)} errors in the native core, exit code {done.returncode}")
    return int(bool(errors or done.returncode))


if __name__ == "__main__":
    sys.exit(kernels() if "--kernels" in sys.argv else main())
