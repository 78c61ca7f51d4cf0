"""Rows copied by the native part are those that numpy copies, at every level and with any number of
threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engraphy import _native
from engraphy.errors import ConfigError, RowOutOfRange
from engraphy.rows.read import check_ids, gather_mapped, read
from engraphy.store import CacheStore, RamStore
from tests.native.test_rows import Guarded, any_bytes, assert_same_bits, decoded, fmt_of, in_shards
from tests.tools.store_builders import check_in_child, shards_of

LEVELS = _native.core.levels() if _native.core else ()
pytestmark = pytest.mark.skipif(not LEVELS, reason=_native.reason)
every_level = pytest.mark.parametrize("level", LEVELS)
U8 = np.dtype(np.uint8)
LARGE = 8 << 20  # bytes: an output from here on is written past the caches


def gathered(level: str, store, ids: np.ndarray, width: int, skip: int = 0) -> np.ndarray:
    out = Guarded((len(ids), width), U8, skip)
    with _native.forced(level):
        gather_mapped(shards_of(store), store.info, ids, out.array)
    assert out.intact()
    return out.array


@every_level
@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 300) | st.sampled_from([64, 128, 160, 256, 264, 512, 5000]),
    shard_rows=st.integers(1, 50),
    total=st.integers(1, 120),
    count=st.sampled_from([0, 1, 7, 8, 9, 40]),
    skip=st.integers(0, 3),
)
def test_rows_of_any_width_are_copied_from_and_to_any_byte(
    level, seed, width, shard_rows, total, count, skip
):
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (total, width), np.uint8)
    ids = Guarded((count,), np.dtype(np.int64), skip)
    ids.array[...] = rng.integers(0, total, count)
    found = gathered(level, in_shards(raw, shard_rows), ids.array, width, skip)
    np.testing.assert_array_equal(found, raw[ids.array])


@every_level
@pytest.mark.parametrize("count", [4095, 4096, 4097, 10_001])
@pytest.mark.parametrize("used", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_rows(level, count, used, threads):
    threads(used)
    fmt = fmt_of("int8", 62)
    raw = any_bytes(3000, fmt)
    store, ids = in_shards(raw, 700), np.random.default_rng(1).integers(0, 3000, count)
    np.testing.assert_array_equal(gathered(level, store, ids, 64), raw[ids])
    out, plain = (
        Guarded((count, 62), np.dtype(np.float32)),
        decoded("off", fmt, raw[ids], np.dtype(np.float32)),
    )
    with _native.forced(level):
        read(store, ids, fmt, out.array)
    assert out.intact()
    assert_same_bits(out.array, plain)
    assert_same_bits(decoded(level, fmt, raw[ids], np.dtype(np.float32)), plain)


@every_level
@pytest.mark.parametrize(
    ("width", "skip"),
    [
        (64, 0),
        (64, 16),
        (128, 0),
        (160, 0),
        (192, 0),
        (256, 0),
        (264, 0),
        (512, 0),
        (63, 0),
        (4096, 0),
    ],
)
def test_a_large_output_is_written_whole_wherever_it_begins(level, width, skip, threads):
    threads(3)
    raw = np.random.default_rng(0).integers(0, 256, (999, width), np.uint8)
    count = -(-LARGE // width) + 1
    memory = np.full(count * width + 256, 0xA5, np.uint8)
    begin = -_native.core.address(memory) % 64 + 64 + skip
    out = memory[begin : begin + count * width].reshape(count, width)
    ids, store = np.random.default_rng(1).integers(0, 999, count), in_shards(raw, 100)
    with _native.forced(level):
        gather_mapped(shards_of(store), store.info, ids, out)
    np.testing.assert_array_equal(out, raw[ids])
    assert (memory[:begin] == 0xA5).all() and (memory[begin + count * width :] == 0xA5).all()


@every_level
@pytest.mark.parametrize("bad", [0, 5000, 9999])
def test_an_id_out_of_range_in_any_part_of_a_batch_leaves_the_output_alone(level, bad, threads):
    threads(4)
    fmt = fmt_of("fp8", 32)
    ids = np.ones(10_000, np.int64)
    ids[bad] = 30
    out = Guarded((10_000, 32), np.dtype(np.float32))
    with (
        _native.forced(level),
        pytest.raises(RowOutOfRange, match=f"row id 30 at position {bad}: expected 0 to 29"),
    ):
        read(in_shards(any_bytes(30, fmt), 8), ids, fmt, out.array)
    assert out.untouched()


def test_many_callers_share_the_threads(threads):
    threads(3)
    raw = any_bytes(2000, fmt_of("bf16", 64))
    store, wrong = in_shards(raw, 300), []

    def work(seed: int) -> None:
        for step in range(20):
            ids = np.random.default_rng(seed * 100 + step).integers(0, 2000, 9000)
            out = np.full((9000, 128), 0xA5, np.uint8)
            gather_mapped(shards_of(store), store.info, ids, out)
            if not np.array_equal(out, raw[ids]):
                wrong.append(seed)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.slow
def test_children_forked_while_the_threads_work_have_threads_of_their_own(threads):
    threads(4)
    store, stop = RamStore(5000, 128), threading.Event()
    store.scatter(np.arange(5000), any_bytes(5000, fmt_of("bf16", 64)))
    ids = np.random.default_rng(0).integers(0, 5000, 20_000)
    expected = store.gather(ids)

    def keep_busy() -> None:
        out = np.empty_like(expected)
        while not stop.is_set():
            store.gather(ids, out=out)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(20):
            check_in_child(
                lambda: all(np.array_equal(store.gather(ids), expected) for _ in range(2))
            )
    finally:
        stop.set()
        busy.join()


# How many threads.


def test_the_number_of_threads_is_bounded_and_told(threads):
    threads(3)
    assert _native.threads() == 3
    with _native.forced("off"):
        assert _native.threads() == 1
    for wrong in (0, -1, 1025, 2.0, "2", True, None):
        with pytest.raises(ConfigError, match="threads: expected an integer from 1 to 1024"):
            _native.set_threads(wrong)
    with pytest.raises(ValueError, match="positive"):
        _native.core.set_threads(0)
    assert _native.threads() == 3


@pytest.mark.parametrize(
    ("wanted", "printed"), [("5", "5"), ("", str(min(8, len(os.sched_getaffinity(0)))))]
)
def test_the_environment_says_how_many_threads(wanted, printed):
    code = "from engraphy import _native; print(_native.threads())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ENGRAPHY_THREADS": wanted},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == printed, run.stderr


@pytest.mark.parametrize("wanted", ["0", "many", "-2", "1.5", "9999"])
def test_a_number_of_threads_that_cannot_be_meant_is_an_error_at_first_use(wanted):
    code = """
from engraphy import _native
from engraphy.errors import ConfigError
try:
    _native.threads()
except ConfigError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ENGRAPHY_THREADS": wanted},
        capture_output=True,
        text=True,
    )
    assert (
        run.stdout.strip() == f"ENGRAPHY_THREADS={wanted!r}: expected an integer from 1 to 1024"
    ), run.stderr


@pytest.mark.parametrize(
    "wrong", [{"shard_rows": 0}, {"rows": -1}, {"row_bytes": 0}, {"count": -1}, {"ids": 0}]
)
def test_the_kernel_refuses_what_cannot_be_meant(wrong):
    address, buffer = _native.core.address, Guarded((64,), U8)
    call = {
        "shards": address(np.zeros(1, np.uint64)),
        "shard_rows": 1,
        "rows": 1,
        "row_bytes": 8,
        "ids": address(np.zeros(1, np.int64)),
        "count": 1,
        "out": address(buffer.array),
        "waits": True,
    }
    with pytest.raises(ValueError, match="must"):
        _native.core.gather_rows(**call | wrong)
    assert buffer.untouched()


def others_ran(work: Callable[[], object], seconds: float) -> bool:
    """Whether another thread of Python ran during one of the calls of `work`, made for so long if
    none did."""
    turns, over, switches = [0], threading.Event(), sys.getswitchinterval()

    def other() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)

    thread, until = threading.Thread(target=other), time.monotonic() + seconds
    sys.setswitchinterval(60)  # nobody is made to let others run
    try:
        thread.start()
        before = turns[0]
        while turns[0] == before and time.monotonic() < until:
            work()
        return turns[0] > before
    finally:
        over.set()
        sys.setswitchinterval(switches)
        thread.join()


@pytest.mark.parametrize("cached", [False, True])
def test_few_rows_in_memory_are_read_at_once_and_many_or_those_of_a_file_while_others_run(
    cached, monkeypatch
):
    store = RamStore(5000, 264)
    store = CacheStore(store, 8 << 20) if cached else store
    few, many, out = np.arange(1024), np.arange(4096), np.empty((4096, 264), np.uint8)
    store.gather(many)
    assert not others_ran(lambda: store.gather(few, out=out[:1024]), 0.5)
    assert others_ran(lambda: store.gather(many, out=out), 20)
    if not cached:
        monkeypatch.setattr(RamStore, "in_memory", False)
        assert others_ran(lambda: store.gather(few, out=out[:1024]), 20)


@pytest.mark.parametrize("count", [0, 1, 1000, 1 << 17])
def test_the_first_bad_id_is_found_wherever_it_is(count):
    ids = np.random.default_rng(0).integers(0, 2**62, (count, 2))[:, 0]
    for array in (ids, ids.copy()):  # not one piece, and one
        check_ids(array, 2**62)
        for at in {0, count // 2, count - 1} if count else ():
            bad = array.copy() if array.flags.c_contiguous else np.repeat(array, 2)[::2]
            bad[at:] = -1
            with pytest.raises(
                RowOutOfRange, match=f"row id -1 at position {at}: expected 0 to {2**62 - 1}"
            ):
                check_ids(bad, 2**62)
