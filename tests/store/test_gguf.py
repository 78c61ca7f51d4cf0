"""`checkpoint:FILE.gguf` serves the rows of a GGUF file in place, as the oracle reads them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engraphy import _native
from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    EngraphyError,
    ShardForeign,
    ShardMissing,
    ShardTruncated,
    StoreError,
)
from engraphy.memory import EngramMemory
from engraphy.memory.state import SequenceState
from engraphy.released import Checkpoint
from engraphy.rows import read
from engraphy.store import RowStore, open_store

pytest.importorskip("gguf")
from tests.tools.gguf_files import (  # noqa: E402
    QWEN4,
    QWEN_WIDE,
    V41_WIDE,
    oracle,
    rows_of,
    write_gguf,
)
from tests.tools.releases import V41  # noqa: E402
from tests.tools.store_builders import shards_of  # noqa: E402

CASES = {
    **{f"deepseek {kind}": (kind, V41_WIDE, {}) for kind in ("bf16", "q8_0", "mxfp4")},
    **{f"deepseek {kind}": (kind, V41_WIDE, {}) for kind in ("q2_k", "q3_k", "q4_k", "q5_k")},
    **{
        f"qwen {kind}": (kind, QWEN_WIDE, {"spelling": QWEN4})
        for kind in ("bf16", "q8_0", "q4_0", "iq4_nl")
    },
    "split": ("q8_0", V41_WIDE, {"split_tensors": 1}),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path) -> tuple[Path, str, dict[int, np.ndarray]]:
    """A file, the kind of its rows, and the rows."""
    kind, config, options = CASES[request.param]
    rows = rows_of(kind, config)
    return write_gguf(tmp_path / "m.gguf", rows, kind, config, **options), kind, rows


def some_ids(rows: int) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, rows, 300)
    return np.concatenate([ids, [0, rows - 1, 0]])


@pytest.mark.parametrize("native", [True, False])
def test_rows_are_those_that_the_oracle_reads(case, native, monkeypatch):
    if native and _native.core is None:
        pytest.skip("no native core")
    if not native:
        monkeypatch.setattr(_native, "core", None)
    path, kind, rows = case
    for layer, raw_NR in rows.items():
        store = open_store(f"checkpoint:{path}", layer=layer)
        ids_N = some_ids(len(raw_NR))
        np.testing.assert_array_equal(store.gather(ids_N), raw_NR[ids_N])
        out_Nd = np.full((len(ids_N), store.info.format.d), np.nan, np.float32)
        read(store, ids_N, store.info.format, out_Nd)
        expected = oracle(kind, raw_NR[ids_N])
        np.testing.assert_array_equal(out_Nd.view(np.uint32), expected.view(np.uint32))
        assert store.info.kind == "checkpoint" and store.info.path == str(path)
        store.close()


def test_a_memory_serves_the_rows_of_the_file(case):
    path, kind, rows = case
    checkpoint = Checkpoint.open(path)
    with EngramMemory(checkpoint.config, checkpoint.vocab(), f"checkpoint:{path}").eval() as memory:
        ids_BT = torch.randint(0, 60, (2, 7))
        lookup = memory.lookup(ids_BT)
        state = SequenceState(2)
        memory.lookup(ids_BT[:, :-1], state=state)
        token = memory.lookup(ids_BT[:, -1:], state=state)
        for layer, raw_NR in rows.items():
            addresses = memory.addresser.rows(ids_BT.numpy(), layer=layer)
            expected = oracle(kind, raw_NR[addresses.reshape(-1)])
            found = lookup.rows[layer].float().numpy().reshape(expected.shape)
            np.testing.assert_array_equal(found, expected)
            last = token.rows[layer].float().numpy()
            np.testing.assert_array_equal(last, lookup.rows[layer][:, -1:].float().numpy())
        assert memory.format == checkpoint.fmt


def test_nothing_can_be_written(case):
    path, _, rows = case
    layer, raw_NR = next(iter(rows.items()))
    before = path.read_bytes()
    store = open_store(f"checkpoint:{path}", layer=layer)
    with pytest.raises(StoreError, match="read-only"):
        store.scatter(np.arange(2), raw_NR[:2].copy())
    with pytest.raises(ConfigError, match="mode 'r'"):
        open_store(f"checkpoint:{path}", layer=layer, mode="w")
    for shard in shards_of(store) or ():
        assert not shard.flags.writeable
    assert path.read_bytes() == before


def test_a_layer_without_a_table_and_a_missing_file_are_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")
    with pytest.raises(ConfigError, match="layer 2 has no memory"):
        open_store(f"checkpoint:{path}", layer=2)
    with pytest.raises(ShardMissing, match="none.gguf: expected a GGUF file, found none"):
        open_store(f"checkpoint:{tmp_path / 'none.gguf'}", layer=1)


def test_a_memory_of_another_map_is_refused_before_a_row_is_read(tmp_path):
    from engraphy.addresses.vocab import VocabMap

    path = write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")
    other = VocabMap(np.concatenate([np.arange(40)[::-1], np.arange(20)]))
    with pytest.raises(DigestMismatch, match="expected address digest"):
        EngramMemory(Checkpoint.open(path).config, other, f"checkpoint:{path}")


# A file that changes while it is served.


@pytest.fixture
def served(tmp_path) -> tuple[RowStore, Path, np.ndarray]:
    rows = rows_of("q8_0", V41)
    path = write_gguf(tmp_path / "m.gguf", rows, "q8_0")
    store = open_store(f"checkpoint:{path}", layer=1)
    store.gather(np.arange(3))
    return store, path, rows[1]


def until_it_looks(store: RowStore) -> None:
    """Read until the next look at the files is due."""
    time.sleep(0.06)
    store.gather(np.arange(3))


def another(path: Path, seed: int = 9) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_gguf(path, rows_of("q8_0", V41, seed), "q8_0")


def test_a_file_that_another_one_was_renamed_to_is_foreign(served, tmp_path):
    store, path, _ = served
    another(tmp_path / "o/m.gguf").replace(path)
    with pytest.raises(ShardForeign, match="m.gguf: expected source .* replaced while they were"):
        until_it_looks(store)


def test_a_file_that_was_written_over_is_foreign(served, tmp_path):
    store, path, _ = served
    other = another(tmp_path / "o/m.gguf").read_bytes()
    with open(path, "r+b") as file:
        file.write(other)
    with pytest.raises(ShardForeign, match="replaced while they were served"):
        until_it_looks(store)


def test_tokens_after_a_replacement_are_errors(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", rows_of("q8_0", V41), "q8_0")
    checkpoint = Checkpoint.open(path)
    memory = EngramMemory(checkpoint.config, checkpoint.vocab(), f"checkpoint:{path}").eval()
    state = SequenceState(1)
    memory.lookup(torch.arange(6)[None], state=state)
    for token in (1, 2):
        memory.lookup(torch.tensor([[token]]), state=state)
    another(tmp_path / "o/m.gguf").replace(path)
    time.sleep(0.06)
    with pytest.raises(ShardForeign, match="replaced while they were served"):
        for token in (3, 4):  # the native read of a token looks at the files after it
            lookup = memory.lookup(torch.tensor([[token]]), state=state)
            assert lookup.rows[1].shape[-1] == checkpoint.config.layer.width


def test_the_same_file_again_or_none_is_served_on(served, tmp_path):
    store, path, raw_NR = served
    os.utime(path, (1, 1))
    until_it_looks(store)
    shutil.copy(path, tmp_path / "copy.gguf")
    (tmp_path / "copy.gguf").replace(path)
    until_it_looks(store)
    path.unlink()
    until_it_looks(store)
    np.testing.assert_array_equal(store.gather(np.arange(9)), raw_NR[:9])


@pytest.mark.skipif(_native.core is None, reason="without the native part the process ends")
def test_a_file_that_is_cut_while_it_is_served_is_truncated(served):
    store, path, _ = served
    os.truncate(path, 5000)
    with pytest.raises(ShardTruncated, match="m.gguf"):
        until_it_looks(store)


def test_a_file_that_is_no_gguf_any_more_is_an_error(served):
    store, path, _ = served
    size = path.stat().st_size
    path.write_bytes(b"x" * size)
    with pytest.raises(EngraphyError, match="m.gguf"):
        until_it_looks(store)
