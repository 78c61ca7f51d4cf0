"""EngramMemory: lookup and fuse in any pieces, rows as leaves, saving and loading, identities."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, Table, Trace, VocabMap
from engraphy.errors import ConfigError, DigestMismatch, InputError, StateTooShort, StoreError
from engraphy.rows.init import normal_rows
from engraphy.store import FileStore, RamStore, RowStore, copy_rows
from engraphy.train import RowAdam

LAYERS, HIDDEN, DIM, VOCAB = (1, 3), 12, 4, 40


def make_memory(streams: int = 1, double: bool = True, seed: int = 0) -> EngramMemory:
    """A memory with trained-like weights: nothing is zero, the conv is active."""
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=30, pad_id=0)
    config = EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM, streams), DIM)
    vocab = VocabMap(np.arange(VOCAB) % 30)
    memory = EngramMemory(config, vocab)
    memory.init_rows(std=1.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return memory.double().eval() if double else memory.eval()


def run(
    memory: EngramMemory, ids: torch.Tensor, x: torch.Tensor, state=None, trace=None, **flags
) -> torch.Tensor:
    """A toy model: the memory of both layers on a residual stream, with a fixed mixing between
    them."""
    lookup = memory.lookup(ids, state=state, trace=trace, **flags)
    for layer in LAYERS:
        x = memory.fuse(layer, torch.tanh(x), lookup)
    return x


def sample(batch: int, tokens: int, streams: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=generator)
    return ids, torch.randn(
        batch, tokens, streams, HIDDEN, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize("streams", [1, 3])
def test_step_by_step_equals_one_forward(streams):
    memory = make_memory(streams)
    ids, x = sample(2, 21, streams)
    whole = run(memory, ids, x)
    state = memory.state(batch=2)
    steps = [run(memory, ids[:, t : t + 1], x[:, t : t + 1], state) for t in range(21)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_are_read_to_the_device_of_their_layers_weights(in_memory, monkeypatch):
    """Layer 3 is on another device: the meta device stands for a GPU."""
    monkeypatch.setattr(RamStore, "in_memory", in_memory)
    memory = make_memory()
    memory.blocks["3"].to("meta")
    lookup = memory.lookup(sample(2, 5)[0])
    assert [lookup.rows[layer].device.type for layer in LAYERS] == ["cpu", "meta"]
    assert lookup.rows[3].shape == (2, 5, memory.config.layer.width)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_a_memory_that_was_moved_to_a_gpu_computes_and_learns_there():
    ids, x = sample(2, 21)
    memory = make_memory().train()
    expected = run(memory, ids, x)
    expected.square().sum().backward()
    grads = memory.drain_row_grads()
    memory.to("cuda")
    found = run(memory, ids, x.to("cuda"))
    torch.testing.assert_close(found.cpu(), expected)
    found.square().sum().backward()
    for there, here in zip(memory.drain_row_grads(), grads, strict=True):
        np.testing.assert_array_equal(there.ids, here.ids)
        np.testing.assert_allclose(there.grad, here.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1, 20), (4, 5, 13), (10, 11), (21,)])
def test_chunked_prefill_with_document_starts_equals_one_forward(cuts):
    memory = make_memory()
    ids, x = sample(2, 21)
    starts = torch.zeros(2, 21, dtype=torch.bool)
    starts[0, 7] = starts[1, 3] = starts[1, 16] = True
    live = torch.ones(2, 21, dtype=torch.bool)
    live[0, 12] = live[1, :2] = False
    whole = run(memory, ids, x, live=live, starts=starts)
    state, begin, parts = memory.state(batch=2), 0, []
    for end in (*cuts, 21) if cuts[-1] != 21 else cuts:
        span = slice(begin, end)
        parts.append(
            run(memory, ids[:, span], x[:, span], state, live=live[:, span], starts=starts[:, span])
        )
        begin = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-9)


def test_packed_documents_equal_each_document_alone():
    memory = make_memory()
    ids, x = sample(1, 20)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 8, 13]] = True
    packed = run(memory, ids, x, starts=starts)
    alone = [run(memory, ids[:, a:b], x[:, a:b]) for a, b in ((0, 8), (8, 13), (13, 20))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-9)


def test_left_padding_equals_the_bare_sequence():
    memory = make_memory()
    ids, x = sample(1, 15)
    padded_ids = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], dim=1)
    padded_x = torch.cat([torch.randn(1, 6, 1, HIDDEN, dtype=torch.float64), x], dim=1)
    live = torch.arange(21)[None] >= 6
    padded = run(memory, padded_ids, padded_x, live=live)
    torch.testing.assert_close(padded[:, 6:], run(memory, ids, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        padded[:, :6], torch.tanh(torch.tanh(padded_x[:, :6])), rtol=0, atol=0
    )


def test_tokens_taken_back_leave_no_trace():
    memory = make_memory()
    ids, x = sample(2, 18)
    state = memory.state(batch=2, margin=5)
    run(memory, ids[:, :10], x[:, :10], state)
    wrong_ids, wrong_x = sample(2, 5, seed=9)
    run(memory, wrong_ids, wrong_x, state)
    state.crop(5)
    rest = run(memory, ids[:, 10:], x[:, 10:], state)
    torch.testing.assert_close(rest, run(memory, ids, x)[:, 10:], rtol=0, atol=1e-9)
    with pytest.raises(StateTooShort):
        state.crop(6)


def test_beams_reorder_and_repeat():
    memory = make_memory()
    ids, x = sample(2, 12)
    state = memory.state(batch=2)
    run(memory, ids[:, :8], x[:, :8], state)
    state.repeat(2)
    order = torch.tensor([2, 0, 3, 3])
    state.reorder(order)
    source = torch.tensor([1, 0, 1, 1])  # sequences behind these beams
    tail = run(memory, ids[source, 8:], x[source, 8:], state)
    torch.testing.assert_close(tail, run(memory, ids, x)[source, 8:], rtol=0, atol=1e-9)


def test_interleaved_requests_do_not_meet():
    memory = make_memory()
    one, two = sample(1, 10, seed=1), sample(1, 10, seed=2)
    states = memory.state(1), memory.state(1)
    parts: tuple[list, list] = ([], [])
    for t in range(10):
        for i, (ids, x) in enumerate((one, two)):
            parts[i].append(run(memory, ids[:, t : t + 1], x[:, t : t + 1], states[i]))
    for (ids, x), part in zip((one, two), parts, strict=True):
        torch.testing.assert_close(torch.cat(part, dim=1), run(memory, ids, x), rtol=0, atol=1e-9)


def test_row_gradients_equal_those_of_a_dense_embedding():
    memory = make_memory().train()
    ids, x = sample(2, 9)
    trace = Trace()
    run(memory, ids, x, trace=trace)
    for layer in LAYERS:
        table = (
            torch.from_numpy(
                memory.format.decode(
                    memory.stores[layer].gather(np.arange(memory.stores[layer].info.rows))
                )
            )
            .double()
            .requires_grad_()
        )
        gathered = table[torch.from_numpy(trace.row_ids[layer])].flatten(-2)
        lookup = memory.lookup(ids)
        rows = dict(lookup.rows) | {layer: gathered}
        y = x
        for each in LAYERS:
            y = memory.fuse(each, torch.tanh(y), type(lookup)(rows, None, None, None, None))
        (expected,) = torch.autograd.grad(y.square().sum(), table)
        got = np.zeros_like(expected.numpy())
        pending = [entry for entry in first_grads(memory, ids, x) if entry.layer == layer]
        for entry in pending:
            np.add.at(got, entry.ids, entry.grad)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def first_grads(memory: EngramMemory, ids: torch.Tensor, x: torch.Tensor):
    memory.drain_row_grads()
    run(memory, ids, x).square().sum().backward()
    return memory.drain_row_grads()


def test_gradients_accumulate_over_backwards_and_drain_once():
    memory = make_memory().train()
    ids, x = sample(2, 5)
    for _ in range(2):
        run(memory, ids, x).sum().backward()
    assert [entry.layer for entry in memory.row_grads].count(1) == 2
    assert len(memory.drain_row_grads()) == 4 and memory.row_grads == []


@pytest.mark.parametrize("quiet", ["eval", "no_grad", "frozen"])
def test_rows_learn_only_in_training(quiet):
    memory = make_memory().train()
    if quiet == "eval":
        memory.eval()
    if quiet == "frozen":
        torch.nn.Sequential(memory).requires_grad_(False)
    with torch.set_grad_enabled(quiet != "no_grad"):
        lookup = memory.lookup(sample(1, 4)[0])
    assert not any(rows.requires_grad for rows in lookup.rows.values())


class Gated(RamStore):
    """Rows that come when the gate is opened, read like those of a disk."""

    in_memory = False

    def __init__(self, other: RowStore) -> None:
        super().__init__(other.info.rows, other.info.row_bytes)
        copy_rows(other, self)
        self.gate = threading.Event()

    def _begin_read(self):
        assert self.gate.wait(20)
        return super()._begin_read()


def test_each_layer_waits_for_its_own_rows_alone():
    memory = make_memory()
    ids, x = sample(2, 9)
    gated = {layer: Gated(store) for layer, store in memory.stores.items()}
    slow = EngramMemory(memory.config, memory.vocab, gated, row_format="f32").double().eval()
    slow.load_state_dict(memory.state_dict())
    lookup = slow.lookup(ids)
    assert (
        set(lookup.rows) == set(LAYERS)
        and LAYERS[1] in lookup.rows
        and slow.prefetcher.stats.waiting == 2
    )
    gated[LAYERS[0]].gate.set()
    x = slow.fuse(LAYERS[0], torch.tanh(x), lookup)
    assert slow.prefetcher.stats.waiting == 1
    gated[LAYERS[1]].gate.set()
    assert torch.equal(
        slow.fuse(LAYERS[1], torch.tanh(x), lookup), run(memory, ids, sample(2, 9)[1])
    )


@pytest.mark.parametrize("taken_back, cancelled", [(2, 0), (3, 2), (6, 2), (7, 4)])
def test_rows_of_tokens_that_are_all_taken_back_are_not_read_any_more(taken_back, cancelled):
    memory = make_memory()
    gated = {layer: Gated(store) for layer, store in memory.stores.items()}
    slow = EngramMemory(memory.config, memory.vocab, gated, row_format="f32")
    state = slow.state(2)
    slow.lookup(sample(2, 20)[0], state)
    lookups = [slow.lookup(sample(2, tokens)[0], state) for tokens in (4, 3)]
    other = state.clone()
    other.crop(7)
    assert slow.prefetcher.stats.cancelled == 0
    state.crop(taken_back)
    assert slow.prefetcher.stats.cancelled == cancelled
    for store in gated.values():
        store.gate.set()
    for lookup, gone in zip(lookups, (cancelled > 2, cancelled > 0), strict=True):
        for layer in LAYERS:
            if gone:
                with pytest.raises(StoreError, match="cancelled"):
                    lookup.rows[layer]
            else:
                assert lookup.rows[layer].isfinite().all()


@pytest.mark.parametrize("here", [True, False])
def test_rows_read_ahead_by_the_thread_learn_like_those_read_at_once(here, monkeypatch):
    memory, (ids, x) = make_memory().train(), sample(2, 9)
    expected = first_grads(memory, ids, x)
    monkeypatch.setattr(RamStore, "in_memory", here)
    found = first_grads(memory, ids, x)
    assert memory.prefetcher.stats.inline == (2 if here else 1)
    for one, other in zip(expected, found, strict=True):
        assert one.layer == other.layer
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.grad, other.grad)


def test_whether_rows_learn_is_decided_when_they_are_asked_for():
    memory = make_memory().train()
    lookup = memory.lookup(sample(1, 4)[0])
    with torch.no_grad():
        assert all(rows.requires_grad for rows in lookup.rows.values())
    lookup = memory.eval().lookup(sample(1, 4)[0])
    memory.train()
    assert not any(rows.requires_grad for rows in lookup.rows.values())
    assert lookup.rows[LAYERS[0]] is lookup.rows[LAYERS[0]]


def test_a_store_that_fails_is_told_where_its_rows_are_used():
    memory = make_memory()
    memory.stores[LAYERS[1]].close()
    ids, x = sample(1, 4)
    lookup = memory.lookup(ids)
    x = memory.fuse(LAYERS[0], x, lookup)
    for _ in range(2):
        with pytest.raises(StoreError, match="closed"):
            memory.fuse(LAYERS[1], x, lookup)


def test_one_line_of_the_log_says_which_rows_are_served(tmp_path, caplog):
    table_id = make_memory().write_table(tmp_path / "table")
    with caplog.at_level("INFO", "engraphy"):
        memory = EngramMemory(
            make_memory().config, make_memory().vocab, f"file:{tmp_path / 'table'}"
        )
    (line,) = [each for each in caplog.messages if table_id in each]
    assert memory.address_digest in line and str(tmp_path / "table") in line


def test_rows_are_no_parameters():
    memory = make_memory()
    assert sum(p.numel() for p in memory.parameters()) == memory.config.dense_parameters()
    assert not any("row" in name for name in memory.state_dict())


def test_checkpointed_layers_hand_over_each_gradient_once():
    memory = make_memory().train()
    ids, x = sample(2, 6)
    plain = first_grads(memory, ids, x)
    lookup = memory.lookup(ids)
    y = x
    for layer in LAYERS:
        y = torch.utils.checkpoint.checkpoint(
            lambda y, layer=layer: memory.fuse(layer, torch.tanh(y), lookup),
            y,
            use_reentrant=False,
        )
    y.square().sum().backward()
    again = memory.drain_row_grads()
    assert [entry.layer for entry in plain] == [entry.layer for entry in again]
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a.grad, b.grad, atol=1e-6)


def test_init_rows_depends_on_seed_layer_row_and_column_alone():
    memory = make_memory()
    memory.init_rows(std=0.5, seed=3)
    pieces = make_memory()
    pieces.init_rows(std=0.5, seed=3, chunk=7)
    tables = [memory.stores[layer].gather(np.arange(20)) for layer in LAYERS]
    for layer, table in zip(LAYERS, tables, strict=True):
        np.testing.assert_array_equal(table, pieces.stores[layer].gather(np.arange(20)))
        np.testing.assert_array_equal(
            memory.format.decode(table[5:6]), normal_rows(3, layer, np.array([5]), DIM, 0.5)
        )
    assert (tables[0] != tables[1]).any()
    values = normal_rows(0, 1, np.arange(50_000), DIM, 0.5)
    assert abs(values.mean()) < 5e-3 and abs(values.std() - 0.5) < 5e-3


def test_trace_tells_rows_and_gates_per_layer_and_stream():
    memory, trace = make_memory(streams=3), Trace()
    ids, x = sample(2, 7, streams=3)
    live = torch.ones(2, 7, dtype=torch.bool)
    live[1, 2] = False
    run(memory, ids, x, trace=trace, live=live)
    for layer in LAYERS:
        np.testing.assert_array_equal(
            trace.row_ids[layer], memory.addresser.rows(ids, layer, live=live.numpy())
        )
        assert trace.gates[layer].shape == (2, 7, 3)
        assert (trace.gates[layer][1, 2] == 0).all() and (trace.gates[layer][0] > 0).all()


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_trace_holds_states_only_if_it_is_asked_to(tokens):
    memory, layer = make_memory(streams=3), LAYERS[0]
    ids, x = sample(2, tokens, streams=3)
    plain, states = Trace(), Trace(states=True)
    with torch.no_grad():
        for trace in (plain, states):
            # With a state, a single token takes the way of decoding.
            lookup = memory.lookup(ids, memory.state(2), trace=trace)
            out = memory.fuse(layer, x, lookup)
    assert not plain.inputs and not plain.updates and not plain.hidden
    assert torch.equal(plain.gates[layer], states.gates[layer])
    assert torch.equal(states.inputs[layer], x.float())
    assert torch.equal(states.updates[layer], out.float() - x.float())
    assert states.updates[layer].shape == (2, tokens, 3, HIDDEN)
    x.zero_()  # a model may go on in place
    assert states.inputs[layer].any()


def test_ids_without_a_token_change_nothing():
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 53, vocab_size=30, pad_id=0)
    vocab = VocabMap(np.concatenate([np.arange(30), [-1, -1]]))
    memory = EngramMemory(make_memory().config, vocab).double()
    memory.init_rows(1.0, 0)
    assert memory.config.hash == spec
    x = torch.randn(1, 3, 1, HIDDEN, dtype=torch.float64)
    out = memory.fuse(1, x, memory.lookup(torch.tensor([[4, 31, 5]])))
    assert torch.equal(out[:, 1], x[:, 1]) and not torch.equal(out[:, 2], x[:, 2])


@pytest.mark.parametrize("table", ["copy", "link", "skip"])
def test_save_and_load_give_the_same_outputs_bit_for_bit(table, tmp_path):
    memory = make_memory(double=False)
    ids, x = sample(2, 9)
    before = run(memory, ids, x.float())
    if table != "copy":
        with pytest.raises(
            ConfigError, match="expected stores over a sealed table on disk, found a ram store"
        ):
            memory.save(tmp_path / "memory", table=table)
        memory.write_table(tmp_path / "elsewhere")
        linked = EngramMemory(memory.config, memory.vocab, f"file:{tmp_path / 'elsewhere'}").eval()
        linked.load_state_dict(memory.state_dict())
        memory = linked
    memory.save(tmp_path / "memory", table=table)
    if table == "skip":
        with pytest.raises(ConfigError, match="saved without its table"):
            EngramMemory.load(tmp_path / "memory")
        loaded = EngramMemory.load(
            tmp_path / "memory", store=f"file:{tmp_path / 'elsewhere'}"
        ).eval()
    else:
        loaded = EngramMemory.load(tmp_path / "memory").eval()
    assert all(store.info.kind == "file" for store in loaded.stores.values())
    assert torch.equal(run(loaded, ids, x.float()), before)


def test_a_saved_memory_is_loaded_into_ram_and_keeps_its_dtype(tmp_path):
    memory = make_memory(double=False).bfloat16()
    memory.save(tmp_path / "memory")
    loaded = EngramMemory.load(tmp_path / "memory", store="ram:").eval()
    ids, x = sample(2, 9)
    assert (
        loaded.stores[1].info.kind == "ram"
        and loaded.blocks["1"].value.weight.dtype == torch.bfloat16
    )
    assert torch.equal(run(loaded, ids, x.bfloat16()), run(memory, ids, x.bfloat16()))


def test_dense_weights_beside_another_table_are_refused(tmp_path):
    memory = make_memory(double=False)
    memory.save(tmp_path / "memory")
    memory.write_table(tmp_path / "other")
    with pytest.raises(DigestMismatch, match="belong to table"):
        EngramMemory.load(tmp_path / "memory", store=f"file:{tmp_path / 'other'}")


def test_a_table_of_other_addresses_is_refused_before_a_row_is_read(tmp_path):
    memory = make_memory()
    memory.write_table(tmp_path / "table")
    other = VocabMap((np.arange(VOCAB) * 7) % 30)
    with pytest.raises(DigestMismatch, match="address digest"):
        EngramMemory(memory.config, other, f"file:{tmp_path / 'table'}")


@pytest.mark.parametrize("name", ["memory.json", "vocab.json", "memory.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_memory_folder_is_a_named_error(name, damage, tmp_path):
    make_memory(double=False).save(tmp_path / "memory")
    file = tmp_path / "memory" / name
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=name):
        EngramMemory.load(tmp_path / "memory")


def test_a_memory_folder_of_mixed_parts_is_refused(tmp_path):
    make_memory(double=False).save(tmp_path / "memory")
    body = json.loads((tmp_path / "memory" / "memory.json").read_text())
    (tmp_path / "memory" / "memory.json").write_text(json.dumps(body | {"format": "another"}))
    with pytest.raises(ConfigError, match="expected format"):
        EngramMemory.load(tmp_path / "memory")
    config = body["config"] | {"layer": body["config"]["layer"] | {"kernel": 0}}
    (tmp_path / "memory" / "memory.json").write_text(json.dumps(body | {"config": config}))
    with pytest.raises(ConfigError, match="expected tensors"):
        EngramMemory.load(tmp_path / "memory")
    (tmp_path / "memory" / "memory.json").write_text(json.dumps(body))
    VocabMap((np.arange(VOCAB) * 7) % 30).save(tmp_path / "memory" / "vocab.json")
    with pytest.raises(DigestMismatch, match="address digest"):
        EngramMemory.load(tmp_path / "memory")


def test_a_table_that_is_still_written_cannot_be_linked(tmp_path):
    memory = make_memory(double=False)
    memory.write_table(tmp_path / "table")
    table = Table.open(tmp_path / "table", mode="w")
    with pytest.raises(ConfigError, match="found one open for writing"):
        EngramMemory(memory.config, memory.vocab, table).save(tmp_path / "memory", table="link")
    table.close()


def test_stores_of_other_layers_or_tables_are_refused(tmp_path):
    spec = HashSpec.qwen4(LAYERS, (2, 3), 2, 53, vocab_size=VOCAB, eos_id=1)
    config = EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM), DIM)
    memory = EngramMemory(config, VocabMap.identity(VOCAB))
    for name in ("one", "two"):
        memory.write_table(tmp_path / name)
    one, two = Table.open(tmp_path / "one"), Table.open(tmp_path / "two")
    with pytest.raises(ConfigError, match="layer 1: expected its own store, found one of layer 3"):
        EngramMemory(config, memory.vocab, {1: FileStore(one, 3), 3: FileStore(one, 1)})
    with pytest.raises(DigestMismatch, match="rows of one table"):
        EngramMemory(config, memory.vocab, {1: FileStore(one, 1), 3: FileStore(two, 3)})
    with pytest.raises(ConfigError, match="expected stores for layers"):
        EngramMemory(
            config, memory.vocab, {1: FileStore(one, 1), 3: FileStore(one, 3), 9: FileStore(one, 3)}
        )
    with pytest.raises(ConfigError, match="expected rows of"):
        EngramMemory(config, memory.vocab, one, row_format="bf16")
    with pytest.raises(ConfigError, match="store: expected a URL"):
        EngramMemory(config, memory.vocab, 7)  # type: ignore[arg-type]


def test_gradients_that_nobody_drains_are_noticed(monkeypatch):
    monkeypatch.setattr("engraphy.memory.grads._MANY_PENDING", 4)
    memory = make_memory().train()
    ids, x = sample(1, 3)
    with pytest.warns(UserWarning, match="4 row gradients wait"):
        for _ in range(3):
            run(memory, ids, x).sum().backward()


def test_a_dense_step_past_waiting_row_gradients_is_noticed_at_once():
    memory = make_memory().train()
    ids, x = sample(1, 3)
    dense = torch.optim.AdamW(memory.parameters())
    for _ in range(3):  # accumulated
        run(memory, ids, x).sum().backward()
    dense.step()
    memory.drain_row_grads()
    run(memory, ids, x).sum().backward()
    dense.step()
    with pytest.warns(UserWarning, match="2 row gradients wait .* no row learns") as told:
        for _ in range(3):
            run(memory, ids, x).sum().backward()
            dense.step()
    assert len(told) == 1


def test_a_dense_step_within_the_backward_pass_is_none_past_waiting_rows():
    memory = make_memory().train()
    ids, x = sample(1, 3)

    def step(parameter):
        parameter.data.sub_(parameter.grad)

    for parameter in memory.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        run(memory, ids, x).sum().backward()
        memory.drain_row_grads()


@pytest.mark.parametrize(
    "bad", [{"std": float("nan"), "seed": 0}, {"std": -1.0, "seed": 0}, {"std": 1.0, "seed": -1}]
)
def test_init_rows_refuses_what_cannot_be_meant(bad):
    with pytest.raises(ConfigError, match="init_rows: expected"):
        make_memory().init_rows(**bad)


def test_wrong_arguments_are_named(tmp_path):
    memory = make_memory()
    ids, x = sample(2, 5)
    lookup = memory.lookup(ids)
    with pytest.raises(ConfigError, match="layer 2 has no memory; expected one of \\[1, 3\\]"):
        memory.fuse(2, x, lookup)
    with pytest.raises(InputError, match="expected one for 2 sequences, found 3"):
        memory.lookup(ids, state=memory.state(3))
    state = memory.state(2)
    with pytest.raises(
        InputError, match="token id at sequence 0, position 0: expected 0 to 39, found 99"
    ):
        memory.lookup(torch.full((2, 1), 99), state=state)
    assert state.length == 0
    with pytest.raises(ConfigError, match="copy"):
        memory.save(tmp_path / "memory", table="move")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConfigError, match="new or empty"):
        memory.save(tmp_path / "full")
    with pytest.raises(ConfigError, match="expected stores for layers"):
        EngramMemory(memory.config, memory.vocab, {1: memory.stores[1]}, row_format="f32")


def test_repr_says_sizes_and_identities_and_reads_no_row(tmp_path):
    memory = make_memory()
    table_id = memory.write_table(tmp_path / "table")
    for text in ("layers [1, 3]", "f32, d = 4", "ram stores", "table_id None", "EngramLayer"):
        assert text in repr(memory)
    assert f"table {memory.config.table_parameters():,}, dense" in repr(memory)
    with EngramMemory(memory.config, memory.vocab, tmp_path / "table") as served:
        shown = repr(torch.nn.Sequential(served))
        for text in (table_id, served.address_digest, str(tmp_path / "table")):
            assert text in shown
        assert all(store.stats.gathers == 0 for store in served.stores.values())
    assert table_id in repr(served)


def test_made_for_follows_the_model_until_it_is_set():
    memory, model = make_memory(), {"model_type": "llama", "vocab_size": 7}
    assert memory.made_for is None
    memory.follow_model(lambda: dict(model))
    model["vocab_size"] = 8
    assert memory.made_for == {"model_type": "llama", "vocab_size": 8}
    memory.made_for = memory.made_for
    model["vocab_size"] = 9
    assert memory.made_for == {"model_type": "llama", "vocab_size": 8}
    memory.made_for = None
    assert memory.made_for is None


def test_a_look_up_that_cannot_be_submitted_leaves_the_state_as_it_was():
    memory = make_memory()
    state = memory.state(2)
    memory.prefetcher.close()
    with pytest.raises(StoreError, match="prefetch: it is closed"):
        memory.lookup(sample(2, 5)[0], state=state)
    assert state.length == 0


def test_apply_is_the_old_spelling_of_fuse():
    memory = make_memory()
    ids, x = sample(2, 5)
    lookup = memory.lookup(ids)
    expected = memory.fuse(1, x, lookup)
    assert torch.equal(memory.apply(1, x, lookup), expected)
    assert torch.equal(memory.apply(layer=1, x_BTSD=x, lookup=lookup), expected)
    assert torch.equal(memory.fuse(layer=1, x_BTSD=x, lookup=lookup), expected)
    assert torch.equal(memory.fuse(1, x[:, :, 0], lookup), expected[:, :, 0])
    with pytest.raises(ConfigError, match="layer 2 has no memory"):
        memory.apply(2, x, lookup)
    for arguments in ((1,), (1, x), (len, x, lookup)):
        with pytest.raises(InputError, match="apply: expected layer, x and lookup"):
            memory.apply(*arguments)


def test_module_apply_walks_over_a_model_with_a_memory():
    memory, seen = make_memory(), []
    torch.nn.Sequential(memory).apply(lambda module: seen.append(type(module).__name__))
    assert {"EngramMemory", "EngramLayer", "Sequential"} <= set(seen)


def test_an_optimizer_moves_the_loss_down():
    memory = make_memory(double=False).train()
    ids, x = sample(4, 16)
    target = torch.randn(4, 16, 1, HIDDEN)
    rows, dense = RowAdam(memory, lr=0.05), torch.optim.Adam(memory.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (run(memory, ids, x.float()) - target).square().mean()
        dense.zero_grad()
        loss.backward()
        dense.step()
        rows.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
