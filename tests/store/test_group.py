"""Closing a memory: what it opened is closed, what it was handed is not; later uses are errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import engraphy
from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, Table, VocabMap
from engraphy.errors import ConfigError, DigestMismatch, StoreError
from engraphy.store import FileStore, RowStore, open_store
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
        expected = memory.apply(1, X_BTSD, memory.lookup(IDS_BT))
        lookup = memory.lookup(IDS_BT)
    assert torch.equal(memory.apply(1, X_BTSD, lookup), expected)


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
