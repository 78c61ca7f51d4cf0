"""Uninitialised buffers are poisoned while tests run: see tests/tools/poison.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engraphy import _native
from engraphy.addresses.addresser import Addresser
from engraphy.addresses.vocab import VocabMap
from engraphy.memory.buffers import BufferPool
from engraphy.rows import RowFormat
from engraphy.rows.codecs import CODECS
from engraphy.spec import HashSpec
from engraphy.store import RamStore
from tests.tools import poison


def test_rows_that_a_decoder_leaves_out_are_nan(monkeypatch):
    idle = CODECS["f16"]._replace(decode=lambda raw_NR, out_Nd, scale: None)
    monkeypatch.setitem(CODECS, "f16", idle)
    with _native.forced("off"):
        values_Nd = RowFormat("f16", 4).decode(np.zeros((3, 8), np.uint8))
    assert np.isnan(values_Nd).all()


@pytest.mark.parametrize("kind", CODECS)
def test_records_that_a_store_leaves_out_are_no_numbers_in_any_kind(kind, monkeypatch):
    fmt = RowFormat(kind, 256, scale=0.5 if kind == "fp8_scaled" else None)
    monkeypatch.setattr(RamStore, "_gather", lambda store, ids_N, out_NR: None)
    raw_NR = RamStore(10, fmt.row_bytes).gather(np.arange(3))
    assert not np.isfinite(fmt.decode(raw_NR)).any()  # mxfp4 has no NaN: infinite


def test_a_buffer_that_is_used_again_holds_no_old_rows():
    pool = BufferPool(1 << 20)
    rows = pool.take((8, 4))
    assert np.isnan(rows).all()
    address = rows.ctypes.data
    rows.fill(1.0)
    del rows
    rows = pool.take((8, 4))
    assert rows.ctypes.data == address
    assert np.isnan(rows).all()


def test_row_ids_that_nobody_computes_are_no_rows(monkeypatch):
    addresser = Addresser(HashSpec.demo((1,), (2, 3), 2, 20, 50, 0), VocabMap.identity(50))
    monkeypatch.setattr(Addresser, "_plain", lambda addresser, call, layers, out_LBTC: None)
    with _native.forced("off"):
        rows_LBTC = addresser.all_rows(np.zeros((1, 3), np.int64))
    assert (rows_LBTC < 0).all()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64],
)
def test_floats_are_nan(dtype):
    tensor = poison.fill_tensor(torch.zeros(3, dtype=dtype))
    assert tensor.to(torch.complex64).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("uint8", 0xFF),
        ("uint16", 0xFFFF),
        ("int16", -0x5A5B),
        ("int32", -0x5A5A5A5B),
        ("int64", -0x5A5A5A5A5A5A5A5B),
        ("bool", True),
    ],
)
def test_integers_have_the_pattern_of_their_dtype(dtype, pattern):
    assert (poison.fill_array(np.zeros(3, dtype)) == pattern).all()
    assert (poison.fill_tensor(torch.zeros(3, dtype=getattr(torch, dtype))) == pattern).all()


def test_libraries_large_buffers_and_meta_tensors_are_left_alone(monkeypatch):
    filled = []
    empty = poison._filling(np, np.zeros, filled.append)
    exec("empty(3)", {"__name__": "engraphy.rows", "empty": empty})
    exec("empty(3)", {"__name__": "library", "empty": empty})
    assert len(filled) == 1
    monkeypatch.setattr(poison, "LIMIT", 16)
    assert (poison.fill_array(np.zeros(3)) == 0).all()
    assert (poison.fill_tensor(torch.zeros(5)) == 0).all()
    assert np.isnan(poison.fill_array(np.zeros(2))).all()
    assert poison.fill_tensor(torch.empty(3, device="meta")).device.type == "meta"


def test_the_device_of_a_with_block_still_counts():
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
        assert torch.nn.Linear(3, 3).weight.device.type == "meta"
