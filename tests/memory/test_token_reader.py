"""One token of each sequence, looked up by one native call, is what the steps of a look-up make of
it one by one."""

from __future__ import annotations

import copy
import dataclasses
import gc
import mmap
import os
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap, _native
from engraphy.errors import InputError, ShardTruncated, StoreError
from engraphy.fusion.tensors import introduce_tensors
from engraphy.memory.prefetch import FEW_ROWS
from engraphy.memory.state import SequenceState
from engraphy.memory.token_reader import TokenReader
from engraphy.rows import RowFormat
from engraphy.store import ReloadableStore, mapping
from engraphy.table import Table
from engraphy.table.shards import HEADER_BYTES

pytestmark = pytest.mark.skipif(_native.core is None, reason=_native.reason)

LAYERS, VOCAB, DEAD, EOS = (1, 4), 60, 7, 5
SPECS = {
    "demo": HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=40, pad_id=0),
    "qwen4": HashSpec.qwen4(LAYERS, (2, 3, 4), 2, 61, vocab_size=40, eos_id=EOS),
    "one order": HashSpec.demo(LAYERS, (2,), 3, 97, vocab_size=40, pad_id=2),
}
FORMATS = [RowFormat("f32", 8), RowFormat("bf16", 8), RowFormat("int4", 8)]


def make_memory(
    spec: HashSpec, fmt: RowFormat | None = FORMATS[0], seed: int = 0, **arguments
) -> EngramMemory:
    table = np.arange(VOCAB) % 40
    table[DEAD] = -1
    config = EngramConfig(spec, LayerSpec(16, spec.columns * 8, 1, order=spec.order), 8)
    memory = EngramMemory(config, VocabMap(table), row_format=fmt, **arguments)
    if "store" not in arguments:
        memory.init_rows(std=1.0, seed=seed)
    return memory.eval()


def steps(memory: EngramMemory, ids: torch.Tensor, state: SequenceState):
    """The look-up without the native call."""
    read, memory._tokens.read = memory._tokens.read, lambda ids_B1, state: None
    try:
        return memory.lookup(ids, state)
    finally:
        memory._tokens.read = read


def assert_equal(
    memory: EngramMemory, found, ours: SequenceState, expected, theirs: SequenceState
) -> None:
    for layer in memory.layers:
        assert torch.equal(found.rows[layer], expected.rows[layer])
    np.testing.assert_array_equal(ours.history, theirs.history)
    assert (ours.length, ours._room) == (theirs.length, theirs._room)
    assert [w.ahead for w in ours._windows.values()] == [w.ahead for w in theirs._windows.values()]


@pytest.fixture
def native(monkeypatch) -> list[bool]:
    """Of each look-up of a token: whether the native call did it."""
    seen: list[bool] = []
    read = TokenReader.read

    def watched(self, ids_B1, state):
        rows = read(self, ids_B1, state)
        seen.append(rows is not None)
        return rows

    monkeypatch.setattr(TokenReader, "read", watched)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_chunks_documents_crops_and_reordered_batches_give_the_same_rows_and_state(
    name, fmt, seed, native
):
    memory, rng, batch = make_memory(SPECS[name], fmt), np.random.default_rng(seed), 3
    ours, theirs = memory.state(batch, 5), memory.state(batch, 5)
    alive = np.setdiff1d(np.arange(VOCAB), [DEAD])
    for step in range(150):
        tokens = int(rng.choice([1, 1, 1, 1, 1, 1, 3]))
        ids = torch.from_numpy(rng.choice(alive, (batch, tokens)))
        if rng.random() < 0.05:
            starts = torch.from_numpy(rng.random((batch, tokens)) < 0.5)
            live = torch.from_numpy(rng.random((batch, tokens)) < 0.8)
            memory.lookup(ids, ours, live, starts), memory.lookup(ids, theirs, live, starts)
            continue
        if step % 20 == 9:
            ours.crop(4), theirs.crop(4)
        if step % 20 == 14:
            order = rng.integers(0, batch, batch)
            ours.reorder(order), theirs.reorder(order)
        if step % 30 == 17:
            ours = copy.deepcopy(ours)
        assert_equal(memory, memory.lookup(ids, ours), ours, steps(memory, ids, theirs), theirs)
    assert sum(native) > 60


@torch.no_grad()
@pytest.mark.parametrize("bad", [DEAD, VOCAB, -1, -5])
def test_an_id_without_a_token_or_out_of_range_goes_the_long_way(bad, native):
    memory = make_memory(SPECS["demo"])
    ours, theirs = memory.state(2), memory.state(2)
    for state in (ours, theirs):
        memory.lookup(torch.arange(12).reshape(2, 6) + 10, state)
    ids = torch.tensor([[3], [bad]])
    if bad == DEAD:
        assert_equal(memory, memory.lookup(ids, ours), ours, steps(memory, ids, theirs), theirs)
    else:
        with pytest.raises(InputError, match=str(bad)):
            memory.lookup(ids, ours)
        np.testing.assert_array_equal(ours.history, theirs.history)
        assert ours.length == theirs.length
    assert native == [False]


@torch.no_grad()
def test_more_rows_than_a_few_gradients_and_the_first_tokens_go_the_long_way(native):
    memory = make_memory(SPECS["demo"])
    many = FEW_ROWS // (len(LAYERS) * SPECS["demo"].columns) + 1
    for batch in (many - 1, many):
        state = memory.state(batch)
        memory.lookup(torch.full((batch, 4), 3), state)
        memory.lookup(torch.full((batch, 1), 3), state)
    assert native == [True, False]
    state = memory.state(1)
    memory.lookup(torch.tensor([[3]]), state)
    assert native == [True, False, False]
    memory.lookup(torch.tensor([[3, 3]]), state)
    with torch.enable_grad():
        memory.lookup(torch.tensor([[3]]), state)
    memory.lookup(torch.tensor([[3]]), state, live=torch.tensor([[True]]))
    assert native == [True, False, False]


@torch.no_grad()
@pytest.mark.skipif(
    mmap.PAGESIZE > HEADER_BYTES, reason="the page of a shard's header holds rows too"
)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rows_of_a_mapped_table_are_read_at_once_where_they_are_in_memory(tmp_path, native, fmt):
    memory = make_memory(SPECS["demo"], fmt)
    table = Table.create(tmp_path / "table", memory.config, fmt, memory.vocab)
    disk = make_memory(SPECS["demo"], fmt, store=table)
    ours, theirs = (each.state(2).extend([[8, 9], [10, 11]]) for each in (disk, memory))
    first, *tokens = torch.randint(8, VOCAB, (40, 2, 1))
    assert not disk.lookup(first, ours).rows[1].any() and steps(memory, first, theirs).rows[1].any()
    assert native == [False]  # nothing was written, and what a file does not hold is not in memory
    disk.init_rows(std=1.0, seed=0)
    for ids in tokens:
        assert_equal(disk, disk.lookup(ids, ours), ours, steps(memory, ids, theirs), theirs)
    assert all(native[1:])


@torch.no_grad()
def test_where_the_system_does_not_tell_what_is_in_memory_mapped_rows_go_the_long_way(
    tmp_path, native, monkeypatch
):
    memory = make_memory(SPECS["demo"])
    memory.write_table(tmp_path / "table")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    disk = make_memory(SPECS["demo"], store=f"file:{tmp_path / 'table'}")
    assert not any(store.tells_residency for store in disk.stores.values())
    state = disk.state(1)
    disk.lookup(torch.tensor([[3, 4, 5]]), state)
    disk.lookup(torch.tensor([[6]]), state)
    assert native == [False]


@torch.no_grad()
@pytest.mark.parametrize(("residency", "expected"), [("auto", True), ("off", False)])
def test_mapped_rows_are_asked_after_unless_that_is_switched_off(
    tmp_path, native, monkeypatch, residency, expected
):
    memory = make_memory(SPECS["demo"])
    memory.write_table(tmp_path / "table")
    monkeypatch.setenv("ENGRAPHY_RESIDENCY", residency)
    disk = make_memory(SPECS["demo"], store=f"file:{tmp_path / 'table'}?read=mmap")
    assert all(store.tells_residency is expected for store in disk.stores.values())
    rows = []
    for served in (disk, memory):
        state = served.state(1)
        served.lookup(torch.tensor([[3, 4, 5]]), state)
        rows.append(served.lookup(torch.tensor([[6]]), state).rows[1])
    assert torch.equal(*rows) and native == [expected, True]


@torch.no_grad()
def test_rows_that_are_read_by_threads_go_the_long_way_and_a_table_loaded_anew_is_read(
    tmp_path, native
):
    memory = make_memory(SPECS["demo"])
    memory.write_table(tmp_path / "table")
    disk = make_memory(SPECS["demo"], store=f"file:{tmp_path / 'table'}?read=pread")
    populated = make_memory(SPECS["demo"], store=f"file:{tmp_path / 'table'}?populate=1")
    other = make_memory(SPECS["demo"], seed=1)
    stores = {layer: ReloadableStore(memory.stores[layer]) for layer in LAYERS}
    reloaded = make_memory(SPECS["demo"], store=stores)
    ids, token = torch.tensor([[3, 4, 5]]), torch.tensor([[6]])
    states = {each: each.state(1) for each in (memory, disk, populated, other, reloaded)}
    for each, state in states.items():
        each.lookup(ids, state)
    rows = {each: each.lookup(token, states[each]).rows[1] for each in states}
    assert native == [True, False, True, True, True]
    assert torch.equal(rows[memory], rows[disk]) and torch.equal(rows[memory], rows[populated])
    assert torch.equal(rows[memory], rows[reloaded])
    assert not torch.equal(rows[memory], rows[other])
    for layer in LAYERS:
        stores[layer].reload(other.stores[layer])
    states[reloaded].crop(1), states[other].crop(1)
    assert torch.equal(reloaded.lookup(token, states[reloaded]).rows[1], rows[other])
    assert native[-1]


@torch.no_grad()
def test_what_is_closed_is_said_where_it_was_said_before():
    memory = make_memory(SPECS["demo"])
    ids, state = torch.tensor([[3, 4, 5]]), memory.state(1)
    memory.lookup(ids, state)
    memory.lookup(ids[:, :1], state)
    memory.stores[4].close()
    lookup = memory.lookup(ids[:, :1], state)
    with pytest.raises(StoreError, match="closed"):
        lookup.rows[4]
    assert lookup.rows[1].shape == (1, 1, SPECS["demo"].columns * 8)
    memory.prefetcher.close()
    with pytest.raises(StoreError, match="closed"):
        memory.lookup(ids[:, :1], state)


@torch.no_grad()
def test_neither_the_order_of_the_stores_nor_torchs_defaults_matter(native):
    memory = make_memory(SPECS["demo"])
    turned = make_memory(SPECS["demo"], store=dict(reversed(memory.stores.items())))
    states = memory.state(1), turned.state(1)
    for each, state in zip((memory, turned), states, strict=True):
        each.lookup(torch.tensor([[3, 4, 5]]), state)
    expected = memory.lookup(torch.tensor([[6]]), states[0])
    torch.set_default_dtype(torch.float64)
    try:
        found = turned.lookup(torch.tensor([[6]]), states[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert native == [True, True]
    for layer in LAYERS:
        assert torch.equal(found.rows[layer], expected.rows[layer])


@pytest.mark.slow
@torch.no_grad()
def test_a_closed_table_is_let_go_of():
    memory = make_memory(SPECS["demo"])
    state, kept = memory.state(1), weakref.ref(memory.stores[1].pinned[0])
    memory.lookup(torch.tensor([[3, 4, 5]]), state)
    memory.lookup(torch.tensor([[6]]), state)
    for store in memory.stores.values():
        store.close()
    gc.collect()
    assert kept() is None


@torch.no_grad()
def test_a_store_that_changes_its_shards_in_place_is_read_as_it_is(native, monkeypatch):
    memory, other = make_memory(SPECS["demo"]), make_memory(SPECS["demo"], seed=1)
    lists = {layer: list(store.pinned) for layer, store in memory.stores.items()}
    for layer, store in memory.stores.items():
        monkeypatch.setattr(type(store), "_begin_read", lambda self: (lists[self.info.layer], None))
        monkeypatch.setattr(store, "_info", dataclasses.replace(store.info, layer=layer))
    ids, token = torch.tensor([[3, 4, 5]]), torch.tensor([[6]])
    state = memory.state(1)
    memory.lookup(ids, state)
    before = memory.lookup(token, state).rows[1]
    for layer, store in other.stores.items():
        lists[layer][0] = store.pinned[0]
    state.crop(1)
    after = memory.lookup(token, state).rows[1]
    assert native == [True, True] and not torch.equal(before, after)
    state.crop(1)
    assert torch.equal(after, steps(memory, token, state).rows[1])


@torch.no_grad()
def test_a_state_over_memory_that_is_read_only_is_not_written_to(native):
    memory, buffers = make_memory(SPECS["demo"]), []
    state = memory.state(1)
    memory.lookup(torch.tensor([[3, 4, 5]]), state)
    raw = pickle.dumps(state, protocol=5, buffer_callback=buffers.append)
    frozen = pickle.loads(raw, buffers=[bytes(each.raw()) for each in buffers])
    with pytest.raises(ValueError, match="read-only"):
        memory.lookup(torch.tensor([[6]]), frozen)
    assert native == [False]


@torch.no_grad()
def test_what_was_read_is_counted():
    memory, state = make_memory(SPECS["demo"]), None
    state = memory.state(2)
    memory.lookup(torch.full((2, 3), 3), state)
    before, tickets = memory.stores[1].stats, memory.prefetcher.stats
    memory.lookup(torch.full((2, 1), 3), state)
    columns = SPECS["demo"].columns
    assert memory.stores[1].stats.rows - before.rows == 2 * columns
    assert memory.stores[1].stats.latency.calls - before.latency.calls == 1
    after = memory.prefetcher.stats
    assert (after.rows - tickets.rows, after.inline - tickets.inline) == (2 * 2 * columns, 1)


def test_the_native_reader_refuses_sizes_that_cannot_be():
    memory = make_memory(SPECS["demo"])
    fit = [1, 1], [5, 5], [5, 5], [0, 1], [[], [1]], []
    reader = _native.core.TokenReader(memory.addresser.plan, "f32", 8, 1.0, 32, *fit)
    for row_bytes, *wrong in (
        (32, [1], [5], [5], [0], [[]], []),
        (32, [0, 1], *fit[1:]),
        (32, [1, 1], [0, 5], *fit[2:]),
        (32, *fit[:3], [0], *fit[4:]),
        (32, *fit[:4], [[]], []),
        (32, [1, 1], [4, 4], *fit[2:]),  # two shards, and the end of one
        (0, *fit),
    ):
        with pytest.raises(ValueError):
            _native.core.TokenReader(memory.addresser.plan, "f32", 8, 1.0, row_bytes, *wrong)
    columns = [8, 24, 1, 8, 1, 1, 0]
    introduce_tensors()
    cursor = _native.core.Cursor(1, columns, [])
    for ids in (
        torch.tensor([[3], [4]]),
        torch.tensor([[3, 4]]),
        torch.tensor([3]),
        torch.tensor([[3]], dtype=torch.int32),
        torch.tensor([[3]], device="meta"),
        nn.Parameter(torch.tensor([[3]]), requires_grad=False),
    ):
        assert reader.read_scoped(ids, cursor) is None
    assert reader.read_pinned(torch.tensor([[3]]), cursor) is None  # no store is pinned
    with pytest.raises(ValueError, match="order"):
        reader.read_scoped(torch.tensor([[3]]), _native.core.Cursor(1, [16, *columns[1:]], []))
    cursor.end()
    assert reader.read_scoped(torch.tensor([[3]]), cursor) is None
    for batch, wrong in ((0, columns), (1, columns[:-1]), (1, [8, 0, 1, 8, 1, 1, 0])):
        with pytest.raises(ValueError):
            _native.core.Cursor(batch, wrong, [])


def fused(memory: EngramMemory, ids: torch.Tensor, state: SequenceState, xs: dict) -> list:
    lookup = memory.lookup(ids, state)
    return [memory.fuse(layer, xs[layer], lookup) for layer in memory.layers]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_to_a_state_tokens_through_a_cursor_are_those_of_chunks(
    dtype, seed, native
):
    """One state goes on by native calls, and one by the steps that any chunk takes."""
    memory, rng, batch = make_memory(SPECS["demo"]), np.random.default_rng(seed), 2
    memory.blocks.to(dtype)
    torch.manual_seed(seed)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours, theirs = memory.state(batch, 5), memory.state(batch, 5)
    alive = np.setdiff1d(np.arange(VOCAB), [DEAD])
    through = 0
    for _ in range(200):
        tokens = int(rng.choice([1, 1, 1, 1, 1, 1, 1, 1, 1, 3]))
        ids = torch.from_numpy(rng.choice(alive, (batch, tokens)))
        xs = {layer: torch.randn(batch, tokens, 16, dtype=dtype) for layer in LAYERS}
        if rng.random() < 0.1:
            change = rng.choice(["crop", "reorder", "copy", "pickle", "repr", "history"])
            order = rng.integers(0, batch, batch)
            if change == "crop" and ours.length:
                ours.crop(1), theirs.crop(1)
            if change == "reorder":
                ours.reorder(order), theirs.reorder(order)
            ours = copy.deepcopy(ours) if change == "copy" else ours
            ours = pickle.loads(pickle.dumps(ours)) if change == "pickle" else ours
            assert change != "repr" or f"length={theirs.length}" in repr(ours)
            assert change != "history" or (ours.history == theirs.history).all()
        if rng.random() < 0.05:  # a forward that fails half-way, and is taken back
            lookup = memory.lookup(ids, ours)
            memory.fuse(LAYERS[0], xs[LAYERS[0]], lookup)
            ours.crop(tokens)
            ours, theirs = ours.clone(), theirs.clone()
            theirs._room = ours._room
        found = fused(memory, ids, ours, xs)
        cursor = ours._cursor
        through += cursor is not None and cursor.has_windows()
        with _native.forced("off"):
            expected = fused(memory, ids, theirs, xs)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype == dtype and one.shape == other.shape
            tolerance = 0.05 if dtype is torch.bfloat16 else 1e-4
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        assert ours.length == theirs.length
    np.testing.assert_array_equal(ours.history, theirs.history)
    assert (ours._room, ours.length) == (theirs._room, theirs.length)
    for layer in LAYERS:
        torch.testing.assert_close(ours.window(layer), theirs.window(layer), rtol=0.1, atol=0.1)
    assert through > 100 and sum(native) > 150


@torch.no_grad()
@pytest.mark.parametrize("last", ["zeros", "numbers"])
def test_a_cut_shard_is_an_error_of_the_tokens_that_read_it_alone(
    tmp_path, native, monkeypatch, last
):
    monkeypatch.setattr(mapping, "_LOOK_EVERY", 1000)  # no size is asked for by chance
    memory = make_memory(SPECS["demo"])
    rows = memory.stores[1].info.rows
    if last == "zeros":  # what then ends the file shows nothing
        memory.stores[1].scatter(np.array([rows - 1]), np.zeros((1, 32), np.uint8))
    table = Table.create(
        tmp_path / "table", memory.config, FORMATS[0], memory.vocab, shard_rows=rows // 8
    )
    memory.stores.copy_to(table)
    table.seal()
    disk = make_memory(SPECS["demo"], store=f"file:{tmp_path / 'table'}?populate=1")
    state, expected = (each.state(1).extend([[3, 4, 5]]) for each in (disk, memory))

    def reads_the_last_shard(token: int) -> bool:
        ids = memory.addresser.rows(np.array([[token]]), layer=1, history=state.history)
        return int(ids.max()) // (rows // 8) == (rows - 1) // (rows // 8)

    tokens = [token for token in range(8, 40)]
    reading = [token for token in tokens if reads_the_last_shard(token)]
    others = [token for token in tokens if token not in reading]

    def look_up(token: int) -> torch.Tensor:
        ids = torch.tensor([[token]])
        found = disk.lookup(ids, state).rows[1]
        assert torch.equal(found, memory.lookup(ids, expected).rows[1])
        state.crop(1), expected.crop(1)
        return found

    for token in tokens:
        look_up(token)
    assert len(native) == sum(native) == 2 * len(tokens)
    shard = max((tmp_path / "table").glob("layer-00001-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    for token in others:
        look_up(token)
    assert reading and others and all(native)
    for token in reading:
        with pytest.raises(ShardTruncated):
            look_up(token)
        assert state.length == expected.length + 1  # the separate steps had extended it
        state.crop(1)
    for token in others:
        look_up(token)
