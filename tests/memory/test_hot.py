"""A memory with a hot index: its rows are those that its addresser names, however tokens arrive; it
trains, is saved and extended; and nothing serves it without its index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import engraphy
from engraphy import (
    EngramConfig,
    EngramMemory,
    HashSpec,
    LayerSpec,
    RowFormat,
    Table,
    Trace,
    VocabMap,
    _native,
)
from engraphy.addresses import Addresser, HotIndex
from engraphy.errors import ConfigError, DigestMismatch, ShardMissing
from engraphy.train import RowAdam
from tests.tools.hot import some_index, some_ngrams
from tests.tools.tiny_training import tiny_model

LAYERS, HIDDEN, DIM, RAW, EOS = (1, 3), 12, 8, 44, 5
VOCAB = VocabMap(np.where(np.arange(RAW) == 7, -1, np.arange(RAW) % 40))
SPECS = {
    "demo": HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=40, pad_id=0),
    "deepseek_v41": HashSpec.deepseek_v41(LAYERS, (2, 3, 4), 3, 61, vocab_size=40, pad_id=2),
    "qwen4": HashSpec.qwen4(LAYERS, (2, 3), 2, 61, vocab_size=40, eos_id=EOS),
}


def config_of(name: str = "demo") -> EngramConfig:
    spec = SPECS[name]
    return EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM, order=spec.order), DIM)


def index_of(name: str = "demo", seed: int = 0) -> HotIndex:
    return some_index(Addresser(SPECS[name], VOCAB), seed=seed)


def make_memory(name: str = "demo", store="ram:", hot: HotIndex | None = None, **arguments):
    """Rows and weights are of trained size, and the same with and without an index."""
    memory = EngramMemory(config_of(name), VOCAB, store, hot=hot, **arguments)
    if store == "ram:":
        memory.init_rows(1.0, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return memory.eval()


def sample(batch: int = 3, tokens: int = 30, seed: int = 1) -> torch.Tensor:
    ids = np.random.default_rng(seed).zipf(1.3, (batch, tokens)) % RAW
    ids[ids == 7] = 8
    return torch.from_numpy(ids)


def run(memory: EngramMemory, ids: torch.Tensor, state=None, trace=None, **flags) -> torch.Tensor:
    x = torch.randn(*ids.shape, HIDDEN, generator=torch.Generator().manual_seed(3))
    lookup = memory.lookup(ids, state, trace=trace, **flags)
    for layer in LAYERS:
        x = memory.fuse(layer, torch.tanh(x), lookup)
    return x


def expected_rows(memory: EngramMemory, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    rows = {}
    for layer, store in memory.stores.items():
        row_ids = memory.addresser.rows(ids.numpy(), layer)
        values = memory.format.decode(store.gather(row_ids.reshape(-1)))
        rows[layer] = torch.from_numpy(values).view(*ids.shape, -1)
    return rows


@pytest.fixture(params=["off", "auto"])
def native(request):
    if request.param == "auto" and _native.core is None:
        pytest.skip(_native.reason)
    with _native.forced(request.param):
        yield request.param


@torch.no_grad()
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", SPECS)
def test_rows_are_those_of_the_addresser_however_tokens_arrive(name, bits, native):
    ngrams = some_ngrams(Addresser(SPECS[name], VOCAB))
    memory = make_memory(name, hot=HotIndex.build(ngrams, bits))
    ids = sample()
    trace = Trace()
    whole = memory.lookup(ids, trace=trace)
    expected = expected_rows(memory, ids)
    spec = SPECS[name]
    for number, order in enumerate(spec.orders):
        hot = trace.routes[order]
        for layer in LAYERS:
            columns = slice(number * spec.heads, (number + 1) * spec.heads)
            own = trace.row_ids[layer][..., columns] >= spec.row_count(layer)
            assert (own == hot[..., None]).all()
        assert 0.05 < hot.mean() < 0.95
    state = memory.state(3, 8)
    memory.lookup(ids[:, :4], state)
    at_once = memory._tokens.read(ids[:, 4:5].contiguous(), state)
    assert (at_once is not None) == (native == "auto")
    state = memory.state(3, 8)
    steps: list[dict] = []
    for t in range(30):
        if t % 10 == 4:  # tokens that are taken back
            memory.lookup(sample(tokens=5, seed=t), state)
            state.crop(5)
        steps.append(dict(memory.lookup(ids[:, t : t + 1].contiguous(), state).rows))
    for layer in LAYERS:
        assert torch.equal(whole.rows[layer], expected[layer])
        assert torch.equal(torch.cat([step[layer] for step in steps], 1), expected[layer])


def test_without_an_index_no_route_is_hot():
    trace = Trace()
    make_memory().lookup(sample(), trace=trace)
    assert {order: hot.any() for order, hot in trace.routes.items()} == {2: False, 3: False}


@torch.no_grad()
def test_holes_in_a_mask_do_not_hide_hot_ngrams():
    memory, ids = make_memory(hot=index_of()), sample(1, 20)
    present = torch.from_numpy(np.random.default_rng(0).random((1, 20)) > 0.3)
    whole = memory.lookup(ids, present=present)
    clean = memory.lookup(ids[present][None])
    for layer in LAYERS:
        assert torch.equal(whole.rows[layer][present][None], clean.rows[layer])


def test_hot_rows_learn_and_the_hashed_rows_of_hot_ngrams_stay():
    memory = make_memory(hot=index_of()).train()
    ids = sample()
    optimizer = RowAdam(memory, lr=0.1)
    before = {
        layer: store.gather(np.arange(store.info.rows)) for layer, store in memory.stores.items()
    }
    run(memory, ids).square().sum().backward()
    optimizer.step()
    for layer, store in memory.stores.items():
        read = np.unique(memory.addresser.rows(ids.numpy(), layer))
        changed = (store.gather(np.arange(store.info.rows)) != before[layer]).any(axis=1)
        assert np.array_equal(np.flatnonzero(changed), read)
        assert (read >= SPECS["demo"].row_count(layer)).any()


@torch.no_grad()
@pytest.mark.parametrize("table", ["copy", "link", "skip"])
def test_a_saved_memory_has_its_index_in_the_tables_folder(tmp_path, table):
    made, ids = make_memory(hot=index_of()), sample()
    expected = run(made, ids)
    if table != "copy":
        made.write_table(tmp_path / "elsewhere")
        served = make_memory(store=tmp_path / "elsewhere", hot=index_of())
        served.blocks.load_state_dict(made.blocks.state_dict())
        made = served
    made.save(tmp_path / "memory", table)
    store = tmp_path / "elsewhere" if table == "skip" else None
    stores = [store] if table == "skip" else [None, "ram:"]
    for source in stores:
        with EngramMemory.load(tmp_path / "memory", source).eval() as again:
            assert again.hot is not None and again.hot.digest == index_of().digest
            assert again.address_digest == made.address_digest
            assert torch.equal(run(again, ids), expected)
    where = tmp_path / ("memory/table" if table == "copy" else "elsewhere")
    (where / "hot.index").unlink()
    with pytest.raises(ShardMissing, match="hot.index: expected the table's hot index"):
        EngramMemory.load(tmp_path / "memory", store)


def test_moments_are_saved_beside_an_index_too(tmp_path):
    memory = make_memory(hot=index_of()).train()
    optimizer = RowAdam(memory, lr=0.1)
    run(memory, sample()).square().sum().backward()
    optimizer.step()
    optimizer.save(tmp_path / "moments", "0" * 32)
    again = RowAdam(memory, lr=0.1)
    again.load(tmp_path / "moments", "0" * 32)
    for layer, store in again.moments.items():
        rows = np.arange(store.info.rows)
        assert np.array_equal(store.gather(rows), optimizer.moments[layer].gather(rows))


# --- extending


@torch.no_grad()
@pytest.mark.parametrize("kind", ["f32", "int4"])
@pytest.mark.parametrize("name", SPECS)
def test_an_extended_memory_computes_what_it_computed_before(name, kind, tmp_path):
    first, ids = make_memory(name, row_format=RowFormat(kind, DIM)), sample()
    first_id = first.write_table(tmp_path / "first")
    with make_memory(name, tmp_path / "first") as small:
        expected = run(small, ids)
        counts = some_ngrams(small.addresser, top=30, seed=1)
        more = some_ngrams(small.addresser, top=80, seed=2)
        with small.extended(counts, tmp_path / "second") as large:
            assert torch.equal(run(large, ids), expected)
            with large.extended(more, tmp_path / "third") as largest:
                assert torch.equal(run(largest, ids), expected)
                trace = Trace()
                run(largest, ids, trace=trace)
                assert all(hot.any() for hot in trace.routes.values())
                assert large.hot is not None and largest.hot is not None
                for order in large.hot.orders:
                    grams = large.hot.ngrams(order)
                    slots = largest.hot.slots_of(grams)
                    assert np.array_equal(slots, large.hot.slots(order))
    tables = [Table.open(tmp_path / name) for name in ("first", "second", "third")]
    assert [table.parent for table in tables] == [None, first_id, tables[1].table_id]
    for older, newer in zip(tables, tables[1:], strict=False):
        for layer in LAYERS:
            rows = older.rows(layer)
            old_rows = np.concatenate(older.shard_arrays(layer))
            assert np.array_equal(np.concatenate(newer.shard_arrays(layer))[:rows], old_rows)
        assert newer.config.hot_rows > older.config.hot_rows


def test_extending_with_what_does_not_fit_leaves_no_table(tmp_path):
    memory = make_memory(hot=HotIndex.build(some_ngrams(Addresser(SPECS["demo"], VOCAB)), 16))
    with pytest.raises(ConfigError, match="fingerprint"):
        memory.extended(some_ngrams(memory.addresser), tmp_path / "table")
    memory = make_memory()
    other = Addresser(SPECS["demo"], VocabMap(np.arange(40)))
    with pytest.raises(DigestMismatch, match="vocabulary map"):
        memory.extended(some_ngrams(other), tmp_path / "table")
    four = some_ngrams(Addresser(SPECS["deepseek_v41"], VOCAB))
    with pytest.raises(ConfigError, match=r"found \[4\]"):
        memory.extended(four, tmp_path / "table")
    assert not (tmp_path / "table").exists()


# --- identities


def test_the_index_is_part_of_the_identity(tmp_path):
    with_index, without = make_memory(hot=index_of()), make_memory()
    other = make_memory(hot=index_of(seed=9))
    digests = {memory.address_digest for memory in (with_index, without, other)}
    assert len(digests) == 3 and without.address_digest == config_of().address_digest(VOCAB.digest)
    with_index.write_table(tmp_path / "table")
    for hot in (None, index_of(seed=9)):
        with pytest.raises(DigestMismatch, match="address digest"):
            make_memory(store=tmp_path / "table", hot=hot)
    with pytest.raises(DigestMismatch, match="hot: expected the index that the config names"):
        EngramMemory(with_index.config, VOCAB, tmp_path / "table", hot=index_of(seed=9))
    with pytest.raises(ConfigError, match="give hot="):
        EngramMemory(with_index.config, VOCAB)
    named = EngramMemory(with_index.config, VOCAB, tmp_path / "table")
    assert named.hot is not None and named.hot.digest == index_of().digest


def test_pools_and_copies_bring_the_index(tmp_path):
    memory = make_memory(hot=index_of())
    memory.write_table(tmp_path / "table")
    engraphy.quantize(tmp_path / "table", tmp_path / "small", "int8")
    ids = sample()
    with EngramMemory(
        memory.config, VOCAB, f"pool:{tmp_path / 'pool'}?from={tmp_path / 'table'}"
    ) as pooled:
        for layer in LAYERS:
            assert torch.equal(pooled.lookup(ids).rows[layer], memory.lookup(ids).rows[layer])
    for place in ("small", "pool"):
        copied = Table.open(tmp_path / place)
        assert copied.hot is not None and copied.hot.digest == index_of().digest
        copied.verify()


def test_a_memory_that_accepts_more_ids_keeps_its_index():
    memory, ids = make_memory(hot=index_of()), sample()
    before = memory.lookup(ids).rows[1]
    memory.widen(RAW + 9)
    assert torch.equal(memory.lookup(ids).rows[1], before)
    assert memory.addresser.vocab.raw_size == RAW + 9


# --- a transformers model


def test_an_attached_memory_with_an_index_generates_token_by_token_what_a_forward_gives(tmp_path):
    model = tiny_model().eval()
    size = model.config.vocab_size
    config = EngramConfig.for_model(
        model.config, layers=(1,), heads=2, rows_per_head=97, dim=4, pad_id=0
    )
    hot = some_index(Addresser(config.hash, VocabMap.identity(size)))
    memory = engraphy.attach(model, config, hot=hot, std=1.0)
    torch.nn.init.normal_(memory.blocks["1"].value.weight, std=0.5)
    ids = torch.from_numpy(np.random.default_rng(2).zipf(1.3, (2, 12)) % size)
    with torch.no_grad():
        whole = model(ids).logits
        cache = None
        steps = []
        for t in range(12):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
        memory.save(tmp_path / "memory")
        engraphy.detach(model)
        with pytest.raises(ConfigError, match="hot: expected none beside a memory"):
            engraphy.attach(model, memory, hot=hot)
        loaded = engraphy.load(model, tmp_path / "memory")
        assert loaded.hot is not None and loaded.hot.digest == hot.digest
        assert torch.equal(model(ids).logits, whole)
