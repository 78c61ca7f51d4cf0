"""tests/tools/guard.py: counts are read right, compared within their band, and complete."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engraphy import _native
from engraphy.memory.buffers import BufferPool
from tests.tools.guard import COUNTS, INSTRUCTIONS, band_of, exceeded, in_module
from tests.tools.guard_counts import CountingCore, counted_buffers
from tests.tools.guard_kernels import KERNELS
from tests.tools.numpy_allocations import numpy_allocations

DUMP = """\
events: Ir
summary: 77

ob=/usr/lib/libc.so.6
fn=memcpy
0 1000

ob=/venv/engraphy/_native/_core.cpython-311-x86_64-linux-gnu.so
fl=???
fn=0x0000000000012340
0 30
+4 12
cob=/usr/lib/libc.so.6
cfn=memcpy
calls=2 0
0 5000
-2 4
fn=0x0000000000012350
* 1
ob=/usr/lib/libpython3.11.so
fn=call
0 7
"""


def test_instructions_are_those_of_the_compiled_module_without_its_callees():
    assert in_module(DUMP) == 30 + 12 + 4 + 1


def test_counts_beyond_their_band_and_missing_ones_are_named():
    bands = {INSTRUCTIONS: 0.1, "native calls": 0, "torch allocations": 0.05}
    committed = {
        INSTRUCTIONS: {"a": 1000, "b": 1000, "gone": 5},
        "step": {"native calls, x": 2, "torch allocations, bytes": 100},
    }
    found = {
        INSTRUCTIONS: {"a": 1100, "b": 1101, "new": 5},
        "step": {"native calls, x": 3, "torch allocations, bytes": 105},
    }
    assert exceeded(found, committed, bands) == [
        "instructions, b: expected at most 1000, found 1101",
        "instructions, gone: expected 5, found None",
        "instructions, new: expected None, found 5",
        "step, native calls, x: expected at most 2, found 3",
    ]
    assert exceeded(committed, committed, bands) == []


def test_every_kernel_is_committed_and_every_count_has_a_band():
    committed = json.loads(COUNTS.read_text())
    assert list(committed["counts"][INSTRUCTIONS]) == list(KERNELS)
    for part, counts in committed["counts"].items():
        assert counts and {band_of(part, name) for name in counts} <= set(committed["bands"])


@pytest.mark.skipif(_native.core is None, reason="needs native code")
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_the_guard_does_its_work_each_time(name):
    call = KERNELS[name]()
    first = call()
    np.testing.assert_array_equal(call(), first)
    assert first is not False  # a reader that gives up


@pytest.mark.skipif(_native.core is None, reason="needs native code")
def test_native_calls_are_counted_methods_too_and_do_what_they_did(monkeypatch):
    core = CountingCore(_native.compiled())
    expected = KERNELS["addresses of 4 x 256 tokens, demo"]()()
    monkeypatch.setattr(_native, "core", core)
    for _ in range(2):
        np.testing.assert_array_equal(KERNELS["addresses of 4 x 256 tokens, demo"]()(), expected)
    assert core.calls["HashPlan.rows"] == 2


def test_numpy_arrays_are_counted_with_their_bytes_and_outlive_the_count():
    with numpy_allocations() as counts:
        array = np.empty(1000, np.uint8)
        part = array[:10]
    assert counts == {"number": 1, "bytes": 1000} and part.base is array
    with numpy_allocations() as counts:
        del part, array
    assert counts == {"number": 0, "bytes": 0}


def test_buffers_of_a_pool_are_counted_and_new_ones_apart():
    pool = BufferPool(1 << 20)
    with counted_buffers() as counts:
        kept = [pool.take((10,)) for _ in range(2)]
        kept.clear()
        pool.take((10,))
    assert counts == {"pool buffers, taken": 3, "pool buffers, new": 2}
