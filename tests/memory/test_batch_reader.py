"""A chunk that one native call looks up has the rows, row ids, gradients, counts and errors of the
separate steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap, _native
from engraphy.errors import InputError, ShardTruncated, StoreError
from engraphy.memory.batch_reader import Batch, BatchReader
from engraphy.memory.lookup import Trace
from engraphy.rows import RowFormat, read
from engraphy.store import RamStore
from engraphy.table.table import Table

LAYERS, VOCAB, DEAD, EOS = (1, 4, 9), 60, 7, 5
SPECS = {
    "demo": HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=40, pad_id=0),
    "deepseek_v41": HashSpec.deepseek_v41(LAYERS, (2, 3, 4), 2, 7001, vocab_size=40, pad_id=2),
    "qwen4": HashSpec.qwen4(LAYERS, (2, 3, 4), 3, 61, vocab_size=40, eos_id=EOS),
    "one order": HashSpec.demo(LAYERS, (2,), 3, 97, vocab_size=40, pad_id=2),
}
FORMATS = {kind: RowFormat(kind, 32) for kind in ("f32", "f16", "bf16", "fp8", "int8", "int4")}
FORMATS["fp8_scaled"] = RowFormat("fp8_scaled", 32, scale=0.37)
SHAPES = [(1, 1), (3, 70), (2, 64), (1, 513), (5, 2), (2, 0), (0, 3)]


def make_memory(spec: HashSpec, fmt: RowFormat = FORMATS["f32"], **arguments) -> EngramMemory:
    table = np.arange(VOCAB) % 40
    table[DEAD] = -1
    width = spec.columns * fmt.d
    config = EngramConfig(spec, LayerSpec(16, width, 1, order=spec.order), fmt.d)
    memory = EngramMemory(config, VocabMap(table), row_format=fmt, **arguments)
    if "store" not in arguments:
        memory.init_rows(std=1.0, seed=0)
    return memory.eval()


def chunk_of(memory: EngramMemory, rng: np.random.Generator, batch: int, tokens: int):
    ids = rng.integers(0, VOCAB, (batch, tokens))
    history = rng.integers(-1, VOCAB, (batch, memory.config.hash.order - 1))
    live = rng.random(ids.shape) < 0.8
    ids[~live] = rng.choice([-5, VOCAB, 2**40], (~live).sum())
    starts = rng.random(ids.shape) < 0.1
    given = [history, live, starts]
    for index in np.flatnonzero(rng.random(3) < 0.3):
        given[index] = None
    if given[1] is None:
        ids = np.where(live, ids, EOS)
    return memory.addresser.chunk(ids, *given)


def expected_rows(memory: EngramMemory, chunk, dtype: torch.dtype):
    """Row ids and rows by the separate steps, in Python alone."""
    with _native.forced("off"):
        ids_LBTC = memory.addresser.all_rows(chunk.ids_BT, chunk.history, chunk.live, chunk.starts)
        rows = []
        for layer, ids_BTC in zip(memory.layers, ids_LBTC, strict=True):
            shape = (*ids_BTC.shape[:2], ids_BTC.shape[2] * memory.format.d)
            out = np.empty(shape, np.float32)
            rows.append(torch.from_numpy(read(memory.stores[layer], ids_BTC, memory.format, out)))
    return ids_LBTC, [values.to(dtype) for values in rows]


def read_chunk(memory: EngramMemory, chunk, layers: tuple[int, ...], dtype: torch.dtype):
    spec = memory.config.hash
    width = spec.columns * memory.format.d
    kind = np.uint16 if dtype is torch.bfloat16 else np.float32
    outs = [np.full((*chunk.ids_BT.shape, width), 77, kind) for _ in layers]
    ids = np.full((len(layers), *chunk.ids_BT.shape, spec.columns), -77)
    BatchReader(memory.addresser, memory.stores).read(Batch(chunk, layers, outs, ids))
    return ids, [torch.from_numpy(out).view(dtype) for out in outs]


@pytest.fixture(params=["off", *(_native.core.levels() if _native.core else ())])
def level(request):
    with _native.forced(request.param):
        yield request.param


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SPECS)
def test_rows_and_row_ids_are_those_of_the_separate_steps(name, kind, level):
    memory = make_memory(SPECS[name], FORMATS[kind])
    rng = np.random.default_rng(1)
    for batch, tokens in SHAPES:
        chunk = chunk_of(memory, rng, batch, tokens)
        for dtype in (torch.float32, torch.bfloat16):
            ids_LBTC, rows = expected_rows(memory, chunk, dtype)
            for layers in (LAYERS, LAYERS[1:2], LAYERS[1:]):
                first = LAYERS.index(layers[0])
                found_ids, found = read_chunk(memory, chunk, layers, dtype)
                part = slice(first, first + len(layers))
                np.testing.assert_array_equal(found_ids, ids_LBTC[part])
                assert all(map(torch.equal, found, rows[part]))


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_rows(count):
    memory = make_memory(SPECS["demo"])
    chunk = chunk_of(memory, np.random.default_rng(2), 3, 2500)
    ids_LBTC, rows = expected_rows(memory, chunk, torch.float32)
    before = _native.threads()
    try:
        _native.set_threads(count)
        found_ids, found = read_chunk(memory, chunk, LAYERS, torch.float32)
    finally:
        _native.set_threads(before)
    np.testing.assert_array_equal(found_ids, ids_LBTC)
    assert all(map(torch.equal, found, rows))


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
def test_a_lookup_in_memory_is_one_call_of_each_store_and_one_ticket_read_at_once():
    memory = make_memory(SPECS["demo"])
    before = [store.stats.gathers for store in memory.stores.values()]
    ids = torch.randint(10, VOCAB, (4, 500))
    lookup = memory.lookup(ids)
    assert (memory.prefetcher.stats.tickets, memory.prefetcher.stats.inline) == (1, 1)
    chunk = memory.addresser.chunk(ids.numpy())
    _, rows = expected_rows(memory, chunk, torch.float32)
    assert all(map(torch.equal, lookup.rows.values(), rows))
    assert [store.stats.gathers for store in memory.stores.values()] == [n + 2 for n in before]
    assert memory.prefetcher.stats.rows == 3 * ids.numel() * memory.config.hash.columns


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_ids_of_a_lookup_may_change_before_its_rows_are_read(in_memory, monkeypatch):
    monkeypatch.setattr(RamStore, "in_memory", in_memory)
    memory = make_memory(SPECS["demo"])
    ids = torch.randint(10, VOCAB, (2, 700))
    chunk = memory.addresser.chunk(ids.numpy())
    lookup = memory.lookup(ids)
    ids.fill_(-1)
    _, rows = expected_rows(memory, chunk, torch.float32)
    assert all(map(torch.equal, lookup.rows.values(), rows))


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_bad_id_is_told_at_once_and_nothing_is_changed(bad, in_memory, monkeypatch):
    monkeypatch.setattr(RamStore, "in_memory", in_memory)
    memory = make_memory(SPECS["demo"])
    state = memory.state(2)
    ids = torch.full((2, 300), 11)
    ids[1, 250] = bad
    with pytest.raises(InputError, match=f"sequence 1, position 250.*found {bad}"):
        memory.lookup(ids, state)
    assert state.length == 0 and memory.prefetcher.stats.tickets == 0


def test_rows_are_bf16_where_the_weights_are_and_nothing_learns():
    memory = make_memory(SPECS["demo"], FORMATS["fp8"])
    ids = torch.randint(10, VOCAB, (2, 40))
    wide = memory.lookup(ids)
    x = torch.randn(2, 40, 1, 16)
    memory.to(torch.bfloat16)
    narrow = memory.lookup(ids)
    for layer in LAYERS:
        assert wide.rows[layer].dtype is torch.float32
        assert narrow.rows[layer].dtype is torch.bfloat16
        assert torch.equal(narrow.rows[layer], wide.rows[layer].bfloat16())
        found = memory.fuse(layer, x.bfloat16(), narrow)
        assert torch.equal(found, memory.fuse(layer, x.bfloat16(), wide))
    memory.train()
    assert all(rows.dtype is torch.float32 for rows in memory.lookup(ids).rows.values())
    memory.blocks[str(LAYERS[0])].float()
    memory.eval()
    assert all(rows.dtype is torch.float32 for rows in memory.lookup(ids).rows.values())


@pytest.mark.parametrize("in_memory", [True, False])
def test_gradients_have_the_row_ids_that_were_read(in_memory, monkeypatch):
    monkeypatch.setattr(RamStore, "in_memory", in_memory)
    memory = make_memory(SPECS["qwen4"]).train()
    ids = torch.randint(10, VOCAB, (2, 90))
    trace = Trace()
    lookup = memory.lookup(ids, trace=trace)
    sum(rows.sum() for rows in lookup.rows.values()).backward()
    assert [entry.layer for entry in sorted(memory.row_grads, key=lambda e: e.layer)] == [*LAYERS]
    expected = memory.addresser.all_rows(ids.numpy())
    for index, layer in enumerate(LAYERS):
        (entry,) = [entry for entry in memory.row_grads if entry.layer == layer]
        np.testing.assert_array_equal(entry.ids, expected[index].reshape(-1))
        np.testing.assert_array_equal(trace.row_ids[layer], expected[index])
        assert (entry.grad == 1).all()


def test_a_closed_store_is_told_where_its_rows_are_used_and_counts_nothing():
    memory = make_memory(SPECS["demo"])
    memory.stores[LAYERS[1]].close()
    lookup = memory.lookup(torch.randint(10, VOCAB, (1, 200)))
    assert lookup.rows[LAYERS[0]].isfinite().all() and lookup.rows[LAYERS[2]].isfinite().all()
    with pytest.raises(StoreError, match="closed"):
        lookup.rows[LAYERS[1]]


def test_no_rows_of_a_file_that_was_cut_are_handed_out(tmp_path):
    path = tmp_path / "table"
    make_memory(SPECS["demo"]).write_table(path)
    memory = make_memory(SPECS["demo"], store=f"file:{path}")
    ids = torch.randint(10, VOCAB, (2, 400))
    expected = make_memory(SPECS["demo"]).lookup(ids)
    found = memory.lookup(ids)
    for layer in LAYERS:
        assert torch.equal(found.rows[layer], expected.rows[layer])
    file = sorted(path.glob("*.safetensors"))[1]
    with open(file, "r+b") as opened:
        opened.truncate(5000)
    lookup = memory.lookup(ids)
    errors = []
    for layer in LAYERS:
        try:
            lookup.rows[layer]
        except ShardTruncated as error:
            errors.append(error)
    assert len(errors) == 1 and str(file) in str(errors[0])


@pytest.mark.skipif(_native.core is None, reason=_native.reason)
@pytest.mark.skipif(_native.core is None, reason="without native code rows are read in steps")
def test_few_rows_of_a_mapped_file_are_read_at_once_if_they_are_in_memory(tmp_path):
    fmt = FORMATS["f32"]
    memory = make_memory(SPECS["demo"])
    table = Table.create(tmp_path / "table", memory.config, fmt, memory.vocab)
    mapped = make_memory(SPECS["demo"], store=table)
    few, many = torch.arange(10, 26)[:, None], torch.arange(700)[:, None] % 40

    def tickets(ids_BT: torch.Tensor) -> tuple[int, int]:
        """Tickets of a lookup, and how many were read at once."""
        before, rows = mapped.prefetcher.stats, mapped.lookup(ids_BT).rows
        for layer, wanted in memory.lookup(ids_BT).rows.items():
            assert torch.equal(rows[layer], wanted if is_written else torch.zeros_like(wanted))
        after = mapped.prefetcher.stats
        return after.tickets - before.tickets, after.inline - before.inline

    is_written = False  # what a file does not hold is not in memory
    assert tickets(few) == (3, 0)
    assert [store.stats.rows for store in mapped.stores.values()] == [few.numel() * 4] * 3
    mapped.init_rows(std=1.0, seed=0)
    is_written = True
    assert tickets(few) == (1, 1)
    assert tickets(many) == (3, 0)


def test_a_table_with_fewer_rows_than_its_addresses_is_refused():
    memory = make_memory(SPECS["demo"])
    rows = memory.config.hash.row_count(LAYERS[0])
    shard = np.zeros(8, np.uint64)
    with pytest.raises(ValueError, match="rows that its addresses name"):
        _native.core.BatchReader(
            memory.addresser.plan, 0, "f32", 32, 1.0, [shard.ctypes.data], [rows], [rows - 1]
        )
    for first in (-1, 3):
        with pytest.raises(ValueError, match="layers of the plan"):
            _native.core.BatchReader(
                memory.addresser.plan, first, "f32", 32, 1.0, [shard.ctypes.data], [1], [1]
            )
