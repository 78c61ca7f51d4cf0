"""`checkpoint:DIR` serves what a converted table serves, row by row, from the release's own files,
and changes none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from engraphy import _native
from engraphy.addresses.vocab import VocabMap
from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    InputError,
    RowOutOfRange,
    ShardMissing,
    ShardTruncated,
    StoreError,
)
from engraphy.memory import EngramMemory
from engraphy.released.checkpoint import Checkpoint
from engraphy.released.convert import convert
from engraphy.rows import read
from engraphy.store import RowStore, open_store
from tests.tools.releases import QWEN, qwen_tensors, records, v41_tensors, write_qwen, write_v41
from tests.tools.store_builders import shards_of

RELEASES = {
    "deepseek": (write_v41, v41_tensors, {}),
    "qwen": (write_qwen, qwen_tensors, {}),
    "qwen fp8": (write_qwen, qwen_tensors, {"fp8": True}),
    "qwen in one part": (write_qwen, qwen_tensors, {"config": QWEN | {"split_ngram_parts": 1}}),
    "qwen in uneven parts": (write_qwen, qwen_tensors, {"config": QWEN | {"split_ngram_parts": 7}}),
}


@pytest.fixture(params=RELEASES)
def release(request, tmp_path) -> tuple[Path, dict[int, np.ndarray]]:
    """A checkpoint, and the rows that its tensors hold."""
    write, make, options = RELEASES[request.param]
    path, tensors = write(tmp_path / "c", **options), make(**options)
    return path, {
        layer: records(tensors, layer) for layer in Checkpoint.open(path).config.hash.layer_ids
    }


def some_ids(rows: int) -> np.ndarray:
    return np.concatenate(
        [np.random.default_rng(0).integers(0, rows, 500), [0, rows - 1, 0, rows - 1]]
    )


def test_rows_are_those_of_the_converted_table(release, tmp_path):
    path, expected = release
    convert(path, tmp_path / "t")
    for layer, rows_NR in expected.items():
        here, there = (
            open_store(f"{scheme}:{where}", layer=layer)
            for scheme, where in (("checkpoint", path), ("file", tmp_path / "t"))
        )
        ids = some_ids(len(rows_NR))
        np.testing.assert_array_equal(here.gather(ids), rows_NR[ids])
        np.testing.assert_array_equal(here.gather(ids), there.gather(ids))
        every = np.arange(len(rows_NR))
        np.testing.assert_array_equal(here.gather(every), there.gather(every))
        assert (here.info.format, here.info.address_digest) == (
            there.info.format,
            there.info.address_digest,
        )


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_rows_as_numbers_are_what_the_records_decode_to(release, native, dtype, monkeypatch):
    if native and _native.core is None:
        pytest.skip("no native core")
    if not native:
        monkeypatch.setattr(_native, "core", None)
    path, expected = release
    for layer, rows_NR in expected.items():
        store = open_store(f"checkpoint:{path}", layer=layer)
        fmt, ids = store.info.format, some_ids(len(rows_NR))
        out = np.full((len(ids), fmt.d), 77, dtype)
        read(store, ids, fmt, out)
        np.testing.assert_array_equal(out, fmt.decode(rows_NR[ids], np.empty_like(out)))
        assert store.stats.rows == len(ids) and store.stats.gathers == 1


def test_a_memory_over_a_checkpoint_gives_what_one_over_the_table_gives(release, tmp_path):
    path, _ = release
    convert(path, tmp_path / "t")
    checkpoint = Checkpoint.open(path)
    torch.manual_seed(0)
    here = EngramMemory(checkpoint.config, checkpoint.vocab(), f"checkpoint:{path}").eval()
    there = EngramMemory(checkpoint.config, checkpoint.vocab(), f"file:{tmp_path / 't'}").eval()
    there.blocks.load_state_dict(here.blocks.state_dict())
    ids_BT = torch.randint(0, 60, (2, 9))
    ours, theirs = here.lookup(ids_BT), there.lookup(ids_BT)
    layer_spec = checkpoint.config.layer
    x = torch.randn(2, 9, layer_spec.streams, layer_spec.hidden_size)
    for layer in here.layers:
        assert ours.rows[layer].abs().sum() > 0
        torch.testing.assert_close(ours.rows[layer], theirs.rows[layer], rtol=0, atol=0)
        torch.testing.assert_close(
            here.apply(layer, x, ours), there.apply(layer, x, theirs), rtol=0, atol=0
        )
    assert here.format == there.format == checkpoint.fmt


def test_a_memory_of_another_map_or_hash_is_refused_before_a_row_is_read(tmp_path):
    path = write_v41(tmp_path / "c")
    checkpoint = Checkpoint.open(path)
    other = VocabMap(np.concatenate([np.arange(40)[::-1], np.arange(20)]))
    with pytest.raises(DigestMismatch, match="expected address digest"):
        EngramMemory(checkpoint.config, other, f"checkpoint:{path}")


def test_a_memory_can_be_saved_without_its_table_and_served_from_the_checkpoint_again(tmp_path):
    path = write_v41(tmp_path / "c")
    checkpoint = Checkpoint.open(path)
    memory = EngramMemory(checkpoint.config, checkpoint.vocab(), f"checkpoint:{path}")
    with pytest.raises(
        ConfigError, match='table="link": expected file: stores, found a checkpoint store'
    ):
        memory.save(tmp_path / "m", table="link")
    memory.save(tmp_path / "m", table="skip")
    again = EngramMemory.load(tmp_path / "m", store=f"checkpoint:{path}")
    ids_BT = torch.arange(8)[None]
    torch.testing.assert_close(
        again.lookup(ids_BT).rows[1], memory.lookup(ids_BT).rows[1], rtol=0, atol=0
    )
    with pytest.raises(DigestMismatch, match="the store serves"):
        EngramMemory.load(
            tmp_path / "m", store=f"checkpoint:{write_v41(tmp_path / 'other', seed=1)}"
        )


def test_a_store_says_what_it_serves(tmp_path):
    path = write_v41(tmp_path / "c")
    checkpoint, info = Checkpoint.open(path), open_store(f"checkpoint:{path}", layer=3).info
    assert (info.kind, info.rows, info.row_bytes, info.writable, info.layer) == (
        "checkpoint",
        306,
        66,
        False,
        3,
    )
    assert (info.table_id, info.path, info.format) == (
        checkpoint.source_id,
        str(path),
        checkpoint.fmt,
    )


def bytes_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_nothing_can_be_written(release):
    path, expected = release
    before = bytes_of(path)
    layer, rows_NR = next(iter(expected.items()))
    store = open_store(f"checkpoint:{path}", layer=layer)
    with pytest.raises(StoreError, match="read-only"):
        store.scatter(np.arange(2), rows_NR[:2].copy())
    with pytest.raises(ConfigError, match="mode 'r'"):
        open_store(f"checkpoint:{path}", layer=layer, mode="w")
    for shard in shards_of(store) or ():
        assert not shard.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            shard.flags.writeable = True
    assert bytes_of(path) == before


def test_whole_records_are_served_where_they_lie(tmp_path):
    """Mapped, not copied: a byte changed in the file is a byte changed in the store."""
    path, tensors = write_qwen(tmp_path / "c"), qwen_tensors()
    store = open_store(f"checkpoint:{path}", layer=1)
    part = Checkpoint.open(path).weights[1][2]
    with open(part.path, "r+b") as file:
        file.seek(part.offset)
        file.write(bytes([records(tensors, 1)[172, 0] ^ 255]))
    assert store.gather(np.array([172]))[0, 0] == records(tensors, 1)[172, 0] ^ 255
    assert [len(shard) for shard in shards_of(store) or ()] == [86, 86, 84]


def test_ids_out_of_range_and_wrong_buffers_are_errors_before_anything_is_written(release):
    path, expected = release
    layer, rows_NR = next(iter(expected.items()))
    store = open_store(f"checkpoint:{path}", layer=layer)
    out = np.full((2, rows_NR.shape[1]), 9, np.uint8)
    for wrong in (-1, len(rows_NR)):
        with pytest.raises(RowOutOfRange, match=f"expected 0 to {len(rows_NR) - 1}"):
            store.gather(np.array([0, wrong]), out)
    with pytest.raises(InputError, match="out: expected"):
        store.gather(np.arange(2), out[:, 1:])
    assert (out == 9).all()
    store.close()
    store.close()
    for use in (lambda: store.gather(np.arange(1)), lambda: shards_of(store)):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_no_rows_are_no_rows(release):
    path, expected = release
    layer, rows_NR = next(iter(expected.items()))
    assert open_store(f"checkpoint:{path}", layer=layer).gather(np.arange(0)).shape == (
        0,
        rows_NR.shape[1],
    )


def test_the_map_may_be_a_saved_one(tmp_path):
    path = write_v41(tmp_path / "c")
    expected = open_store(f"checkpoint:{path}", layer=1).info.address_digest
    Checkpoint.open(path).vocab().save(tmp_path / "v.json")
    (path / "tokenizer.json").unlink()
    store = open_store(f"checkpoint:{path}?vocab={tmp_path / 'v.json'}", layer=1)
    assert store.info.address_digest == expected
    with pytest.raises(ConfigError, match="expected the tokenizer, found no file"):
        open_store(f"checkpoint:{path}", layer=1)


def open_with(url: str, **arguments) -> RowStore:
    return open_store(url, **({"layer": 1} | arguments))


def test_urls_that_cannot_be_meant_are_refused(tmp_path):
    path = write_v41(tmp_path / "c")
    for url, arguments, message in (
        ("checkpoint:", {}, "folder of a checkpoint"),
        (f"checkpoint:{path}", {"layer": None}, "expected a layer"),
        (f"checkpoint:{path}", {"layer": 2}, "layer 2 has no memory"),
        (f"checkpoint:{path}?mode=r", {}, "mode"),
        (f"checkpoint:{path}", {"rows": 3}, "neither rows"),
        (f"checkpoint:{path}", {"row_bytes": 3}, "neither"),
        (f"checkpoint:{path}/none", {}, "found no file"),
        ("checkpoint", {}, "checkpoint:DIR"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_with(url, **arguments)


@pytest.mark.skipif(_native.core is None, reason="without the native part the process ends")
def test_a_shard_that_vanishes_between_look_and_read_is_an_error_too(release):
    path, expected = release
    layer = next(iter(expected))
    store, shard = (
        open_store(f"checkpoint:{path}", layer=layer),
        Checkpoint.open(path).weights[layer][0].path,
    )
    store.gather(np.arange(3))  # has just looked
    os.truncate(shard, 0)
    with pytest.raises(ShardTruncated, match=shard.name):
        store.gather(np.arange(3))


def test_a_shard_that_is_damaged_while_it_is_served_is_an_error(release):
    path, expected = release
    layer = next(iter(expected))
    shard, fresh = (
        Checkpoint.open(path).weights[layer][0].path,
        [open_store(f"checkpoint:{path}", layer=layer) for _ in range(2)],
    )
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ShardTruncated, match=shard.name):
        fresh[0].gather(np.arange(3))
    with pytest.raises(ShardTruncated, match=shard.name):
        read(
            fresh[1],
            np.arange(3),
            fresh[1].info.format,
            np.empty((3, fresh[1].info.format.d), np.float32),
        )
    shard.unlink()
    with pytest.raises(ShardMissing, match=shard.name):
        open_store(f"checkpoint:{path}", layer=layer)
