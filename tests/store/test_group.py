"""The rows of one memory: what is opened is closed and what is handed in is not, stores that do not
belong together are named, copies are whole, and later uses of a closed memory are errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import engraphy
from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, RowFormat, Table, VocabMap
from engraphy.errors import ConfigError, DigestMismatch, InputError, StoreError, TableError
from engraphy.memory import Prefetcher
from engraphy.memory.metrics import prometheus
from engraphy.store import CacheStore, FileStore, RamStore, ReloadableStore, RowStore, open_store
from engraphy.store.group import StoreGroup
from tests.tools.tiny_training import attach_tiny, tiny_model

LAYERS, HIDDEN, DIM, VOCAB = (1, 3), 12, 4, 40
IDS_BT = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
X_BTSD = torch.randn(2, 9, 1, HIDDEN, generator=torch.Generator().manual_seed(2))


def config_of(rows_per_head: int = 53) -> EngramConfig:
    spec = HashSpec.demo(LAYERS, (2, 3), 2, rows_per_head, vocab_size=VOCAB, pad_id=0)
    return EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM), DIM)


def make_memory(store="ram:") -> EngramMemory:
    return EngramMemory(config_of(), VocabMap.identity(VOCAB), store).eval()


@pytest.fixture
def table_path(tmp_path):
    with make_memory() as memory:
        memory.init_rows(1.0, 0)
        memory.write_table(tmp_path / "table")
    return tmp_path / "table"


@pytest.fixture
def opened(monkeypatch):
    """Every store that is made, oldest first."""
    made, make = [], RowStore.__init__

    def noted(self):
        made.append(self)
        make(self)

    monkeypatch.setattr(RowStore, "__init__", noted)
    return made


def is_closed(store: RowStore) -> bool:
    try:
        store.gather(np.array([0]))
    except StoreError:
        return True
    return False


@pytest.mark.parametrize("options", ["", "?read=pread", "?cache=1MiB"])
def test_stores_of_a_url_are_closed_with_the_memory(options, table_path):
    with make_memory(f"file:{table_path}{options}") as memory:
        stores = list(memory.stores.values())
        assert not any(map(is_closed, stores))
    assert all(map(is_closed, stores))
    memory.close()  # again


def test_a_table_and_stores_that_were_handed_in_stay_open(table_path):
    table = Table.open(table_path)
    with make_memory(table) as memory:
        mapped = list(memory.stores.values())
    assert all(map(is_closed, mapped)) and table.mode == "r"
    handed = {layer: FileStore(table, layer) for layer in LAYERS}
    with make_memory(handed):
        pass
    assert not any(map(is_closed, handed.values()))
    with make_memory(
        {layer: open_store(f"file:{table_path}", layer) for layer in LAYERS}
    ) as memory:
        lookup = memory.lookup(IDS_BT)
    assert lookup.rows[1].isfinite().all()


def test_rows_that_were_looked_up_stay_valid(table_path, monkeypatch):
    monkeypatch.setattr("engraphy.memory.prefetch.FEW_ROWS", 0)
    with make_memory(f"file:{table_path}") as memory:
        expected = memory.fuse(1, X_BTSD, memory.lookup(IDS_BT))
        lookup = memory.lookup(IDS_BT)
    assert torch.equal(memory.fuse(1, X_BTSD, lookup), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda memory, state, path: memory.lookup(IDS_BT),
        lambda memory, state, path: memory.lookup(IDS_BT[:, :1], state),
        lambda memory, state, path: memory.init_rows(1.0, 0),
        lambda memory, state, path: memory.save(path),
        lambda memory, state, path: memory.write_table(path),
        lambda memory, state, path: memory.read_table(path),
        lambda memory, state, path: memory.__enter__(),
    ],
    ids=["lookup", "a token", "init_rows", "save", "write_table", "read_table", "with"],
)
@pytest.mark.parametrize("owned", [True, False])
def test_using_a_closed_memory_is_a_named_error(use, owned, tmp_path):
    memory = make_memory()
    if not owned:
        memory = make_memory_of(memory.stores)
    state = memory.state(2)
    with torch.no_grad():
        memory.lookup(IDS_BT, state)
        memory.close()
        with pytest.raises(StoreError, match="the memory is closed"):
            use(memory, state, tmp_path / "out")
    assert state.length == 9 and not (tmp_path / "out").exists()


def make_memory_of(stores):
    return EngramMemory(config_of(), VocabMap.identity(VOCAB), stores, row_format="f32").eval()


def test_a_closed_memory_says_so_in_its_model_and_can_be_detached():
    model = tiny_model().eval()
    ids_BT = torch.arange(3, 12)[None]
    with torch.no_grad():
        bare = model(ids_BT).logits
        with attach_tiny(model) as memory:
            assert not torch.equal(model(ids_BT).logits, bare)
        with pytest.raises(StoreError, match="detach it from its model"):
            model(ids_BT)
        assert engraphy.detach(model) is memory
        assert torch.equal(model(ids_BT).logits, bare)
    assert memory.state_dict()


def test_nothing_stays_open_where_a_memory_cannot_be_made_or_loaded(table_path, tmp_path, opened):
    with pytest.raises(DigestMismatch, match="address digest"):
        EngramMemory(config_of(59), VocabMap.identity(VOCAB), f"file:{table_path}")
    with pytest.raises(ConfigError, match="expected rows of"):
        EngramMemory(config_of(), VocabMap.identity(VOCAB), f"file:{table_path}", "bf16")
    assert len(opened) == 4 and all(map(is_closed, opened))
    with make_memory() as memory:
        memory.init_rows(1.0, 0)
        memory.write_table(tmp_path / "other")
        memory.save(tmp_path / "memory")
    for store in (None, "ram:", f"file:{tmp_path / 'other'}"):
        with pytest.raises((ConfigError, DigestMismatch)):
            engraphy.load(tiny_model(), tmp_path / "memory", store)
    with EngramMemory.load(tmp_path / "memory", "ram:"):
        assert len([store for store in opened if not is_closed(store)]) == 2
    assert all(map(is_closed, opened))


# The group itself.


F32 = RowFormat("f32", DIM)


def digest_of(rows_per_head: int = 53) -> str:
    return config_of(rows_per_head).address_digest(VocabMap.identity(VOCAB).digest)


def rows_of(stores) -> dict[int, np.ndarray]:
    return {layer: store.gather(np.arange(store.info.rows)) for layer, store in stores.items()}


def ram_stores(rows: int = 424, row_bytes: int = F32.row_bytes) -> dict[int, RowStore]:
    return {layer: RamStore(rows, row_bytes, layer) for layer in LAYERS}


@pytest.mark.parametrize("form", ["url", "path", "table", "mapping", "group"])
def test_every_form_of_a_source_gives_the_same_rows_and_identity(form, table_path):
    table = Table.open(table_path)
    source = {
        "url": f"file:{table_path}?read=mmap",
        "path": table_path,
        "table": table,
        "mapping": {layer: FileStore(table, layer) for layer in reversed(LAYERS)},
        "group": StoreGroup.of_table(table, LAYERS),
    }[form]
    with StoreGroup.open(config_of(), source, address_digest=digest_of()) as group:
        assert list(group) == list(LAYERS) and len(group) == 2 and 2 not in group
        assert (group.format, group.table_id, group.writable) == (F32, table.table_id, False)
        assert group.rows == config_of().row_count() and group.bytes == group.rows * F32.row_bytes
        assert group.info == group[LAYERS[0]].info
        for layer, rows in rows_of(StoreGroup.of_table(table, LAYERS)).items():
            np.testing.assert_array_equal(group[layer].gather(np.arange(len(rows))), rows)
    assert all(map(is_closed, group.values())) == (form not in ("mapping", "group"))


def test_new_rows_are_zeros_that_can_be_written():
    with StoreGroup.open(config_of(), "ram:", "bf16") as group:
        assert group.writable and group.table_id is None and group.format == RowFormat("bf16", DIM)
        assert not any(rows.any() for rows in rows_of(group).values())
        group.check_writable()
    with StoreGroup.open(config_of(), "ram:") as group:
        assert group.format == F32


def test_a_table_that_the_group_owns_is_closed_with_it(tmp_path):
    for close_table, mode in ((False, "w"), (True, "closed")):
        path = tmp_path / mode
        table = Table.create(path, config_of(), F32, VocabMap.identity(VOCAB))
        StoreGroup.of_table(table, LAYERS, close_table=close_table).close()
        assert table.mode == mode
        table.close()


@pytest.mark.parametrize(
    "stores, row_format, error, told",
    [
        (lambda: {}, F32, ConfigError, "expected a store for each layer, found none"),
        (
            lambda: {1: RamStore(9, 16, 3)},
            F32,
            ConfigError,
            "layer 1: expected its own store, found one of layer 3",
        ),
        (lambda: {1: RamStore(9, 16)}, None, ConfigError, "give row_format="),
        (
            lambda: {1: RamStore(9, 16), 3: RamStore(9, 8)},
            F32,
            ConfigError,
            r"layer 3: expected rows of 16 bytes \(f32, d = 4\), found 8",
        ),
    ],
)
def test_stores_that_do_not_belong_together_are_named(stores, row_format, error, told):
    with pytest.raises(error, match=told):
        StoreGroup(stores(), row_format)


def test_stores_of_two_tables_or_another_format_are_named(table_path, tmp_path):
    with make_memory() as memory:
        memory.write_table(tmp_path / "other")
    one, two = Table.open(table_path), Table.open(tmp_path / "other")
    with pytest.raises(DigestMismatch, match=f"one table.*{one.table_id}.*{two.table_id}"):
        StoreGroup({1: FileStore(one, 1), 3: FileStore(two, 3)})
    with pytest.raises(ConfigError, match="layer 1: expected rows of .*bf16.*found .*f32"):
        StoreGroup.of_table(one, LAYERS, RowFormat("bf16", DIM))


@pytest.mark.parametrize(
    "rows_per_head, stores, error, told",
    [
        (53, lambda: {1: RamStore(424, 16)}, ConfigError, r"layers \[1, 3\], found \[1\]"),
        (53, lambda: ram_stores(423), ConfigError, r"\(rows, d\) = \(\d+, 4\), found \(423, 4\)"),
    ],
)
def test_stores_of_other_sizes_than_the_memory_are_named(rows_per_head, stores, error, told):
    with pytest.raises(error, match=told):
        StoreGroup(stores(), F32).check(config_of(rows_per_head), digest_of(rows_per_head))


def test_rows_of_other_addresses_are_named_and_closed_again(table_path, opened):
    with pytest.raises(DigestMismatch, match=f"address digest {'0' * 64}, found {digest_of()}"):
        StoreGroup.open(config_of(), f"file:{table_path}", address_digest="0" * 64)
    with pytest.raises(TableError):
        StoreGroup.open(config_of(), f"file:{table_path}-none")
    assert opened and all(map(is_closed, opened))


def test_a_store_that_cannot_be_opened_closes_those_that_were(table_path, opened, monkeypatch):
    def refuse(table, layer):
        if layer == LAYERS[1]:
            raise OSError("too many open files")
        return FileStore(table, layer)

    monkeypatch.setattr("engraphy.store.group.FileStore", refuse)
    with pytest.raises(OSError, match="too many open files"):
        StoreGroup.of_table(Table.open(table_path), LAYERS)
    assert len(opened) == 1 and is_closed(opened[0])


def test_rows_are_copied_to_stores_and_to_tables(table_path, tmp_path):
    with StoreGroup.open(config_of(), table_path) as source:
        with StoreGroup.zeros(config_of(), F32) as target:
            source.copy_to(target)
            assert target.row_names() == source.row_names()
            table = Table.create(tmp_path / "copy", config_of(), F32, VocabMap.identity(VOCAB))
            target.copy_to(table)
            table.seal()
            expected, copied = rows_of(source), rows_of(StoreGroup.of_table(table, LAYERS))
        with pytest.raises(StoreError, match="read-only"):
            source.copy_to(StoreGroup.open(config_of(), table_path))
        with pytest.raises(InputError, match="expected a target"):
            source.copy_to(ram_stores(10))
    for layer in LAYERS:
        np.testing.assert_array_equal(copied[layer], expected[layer])


def test_what_is_served_is_asked_of_the_stores_each_time(table_path, tmp_path):
    with make_memory() as memory:
        memory.write_table(tmp_path / "other")
    stores = {layer: ReloadableStore(open_store(table_path, layer)) for layer in LAYERS}
    group = StoreGroup(stores)
    first_id = group.table_id
    for layer, store in stores.items():
        store.reload(open_store(tmp_path / "other", layer))
    assert group.table_id == Table.open(tmp_path / "other").table_id != first_id
    table = Table.open(tmp_path / "other", "w")
    trained = StoreGroup.of_table(table, LAYERS)
    assert trained.writable
    table.seal()
    assert not trained.writable
    with pytest.raises(ConfigError, match="layer 1: expected a writable store"):
        trained.check_writable()
    table.close()


def test_a_group_is_described_without_reading_a_row(table_path):
    with StoreGroup.open(config_of(), f"file:{table_path}?cache=1MiB") as group:
        line = group.describe()
        for part in ("cache over", "layer 3", str(group.table_id), digest_of(), str(table_path)):
            assert part in line
        assert "f32, d = 4" in repr(group) and str(group.table_id) in repr(group)
        assert all(isinstance(store, CacheStore) for store in group.values())
        assert all(store.stats.gathers == 0 for store in group.values())
    assert "rows f32, d = 4" in StoreGroup(ram_stores(), F32).describe()
    assert "no table" in repr(StoreGroup(ram_stores(), F32))
    assert 'kind="file"' in prometheus(group)


def test_a_prefetcher_reads_a_group_and_the_pairs_alike(table_path):
    with StoreGroup.open(config_of(), table_path) as group:
        ids = {layer: np.arange(24, dtype=np.int64).reshape(2, 3, 4) for layer in LAYERS}
        pairs = {layer: (store, group.format) for layer, store in group.items()}
        with Prefetcher(group) as one, Prefetcher(pairs) as other:
            for layer, rows in one.submit(ids).wait().items():
                assert torch.equal(rows, other.submit(ids).wait()[layer])
        assert not any(map(is_closed, group.values()))


def test_rows_of_other_addresses_are_said_before_their_format(table_path, tmp_path):
    """A format says nothing of rows that mean something else."""
    spec = config_of().hash
    wider = EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * 2 * DIM), 2 * DIM)
    for row_format in ("f32", "bf16"):
        with pytest.raises(DigestMismatch, match="expected address digest"):
            EngramMemory(wider, VocabMap.identity(VOCAB), table_path, row_format)
    engraphy.quantize(table_path, tmp_path / "bf16", "bf16")
    first = open_store(table_path, layer=1)
    second = open_store(tmp_path / "bf16", layer=3)
    with pytest.raises(DigestMismatch, match="expected rows of one table"):
        make_memory({1: first, 3: second})
    assert not is_closed(first) and not is_closed(second)


def test_a_table_that_was_opened_for_a_group_is_closed_if_the_group_cannot_be_made(table_path):
    table = Table.open(table_path)
    with pytest.raises(ConfigError, match="layer 7"):
        StoreGroup.of_table(table, (1, 7), close_table=True)
    with pytest.raises((StoreError, TableError)):
        FileStore(table, 1).gather(np.array([0]))
