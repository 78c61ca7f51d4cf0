"""A table on disk: what is written is read, every damage has its name, and no crash makes a wrong
table look sealed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    EngraphyError,
    InputError,
    RowOutOfRange,
    ShardCorrupt,
    ShardForeign,
    ShardMissing,
    ShardTruncated,
    TableError,
    TableUnsealed,
)
from engraphy.rows import RowFormat
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.store.testing.tools import fork
from engraphy.table import Table
from tests.tools.paths import ROOT

LAYERS = (1, 3)
SHARD_ROWS = 40
FMT = RowFormat("bf16", 4)


@dataclass(frozen=True)
class Words:
    """Stands for a vocabulary map."""

    size: int = 50
    digest: str = "v" * 64

    def __len__(self) -> int:
        return self.size


def config(seed: int = 0, dim: int = 4) -> EngramConfig:
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 20, 50, 0, seed=seed)
    return EngramConfig(spec, LayerSpec(8, spec.columns * dim, order=3), dim)


def create(path: Path, **options) -> Table:
    return Table.create(path, config(), FMT, Words(), shard_rows=SHARD_ROWS, **options)


def random_rows(table: Table, layer: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed, layer)).integers(
        0, 256, (table.rows(layer), table.row_bytes), dtype=np.uint8
    )


def fill(table: Table, seed: int) -> None:
    for layer in table.layers:
        table.write_rows(layer, 0, random_rows(table, layer, seed))


def holds(table: Table, seed: int) -> bool:
    return all(
        np.array_equal(np.concatenate(table.shard_arrays(layer)), random_rows(table, layer, seed))
        for layer in table.layers
    )


def sealed(path: Path, seed: int = 0) -> Table:
    table = create(path)
    fill(table, seed)
    table.seal()
    return table


def shard(path: Path, layer: int = 1, number: int = 1) -> Path:
    return next(path.glob(f"layer-{layer:05d}-{number:05d}-of-*.safetensors"))


def edit(path: Path, change) -> None:
    data = json.loads((path / "engram.json").read_text())
    change(data)
    (path / "engram.json").write_text(json.dumps(data))


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch):
    """No test here pulls the plug; that the right files are synced, and when, has a test of its
    own."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


# What is written is read.


def test_what_is_written_is_read_after_sealing(tmp_path):
    table = sealed(tmp_path / "t", seed=5)
    again = Table.open(tmp_path / "t")
    assert holds(table, 5) and holds(again, 5)
    assert (again.table_id, again.parent) == (table.table_id, None)
    assert again.address_digest == config().address_digest("v" * 64)
    assert (again.config, again.fmt, again.layers, again.mode) == (config(), FMT, LAYERS, "r")
    assert [again.rows(layer) for layer in LAYERS] == [
        config().hash.row_count(layer) for layer in LAYERS
    ]


def test_rows_written_in_any_pieces_are_the_same_table(tmp_path):
    table = create(tmp_path / "t")
    for layer in LAYERS:
        rows = random_rows(table, layer, 2)
        first = 0
        for count in (
            1,
            38,
            1,
            41,
            0,
            500,
        ):  # ends before, at and beyond a shard's end, and nothing
            table.write_rows(layer, first, rows[first : first + count])
            first = min(first + count, len(rows))
    table.seal()
    assert holds(table, 2)


def test_a_new_table_is_zero_rows_that_take_no_disk(tmp_path):
    table = Table.create(tmp_path / "t", config(), FMT, Words())
    table.seal()
    assert not any(array.any() for layer in LAYERS for array in table.shard_arrays(layer))
    big = EngramConfig(
        HashSpec.demo((0,), (2, 3), 2, 1_000_000, 50, 0), LayerSpec(8, 4 * 512, order=3), 512
    )
    Table.create(tmp_path / "big", big, RowFormat("f32", 512), Words()).close()
    files = [file.stat() for file in (tmp_path / "big").iterdir()]
    assert (
        sum(file.st_size for file in files)
        > 8e9
        > 1e6
        > sum(file.st_blocks * 512 for file in files)
    )
    assert max(file.st_size for file in files) <= 2**30


def test_safetensors_and_numpy_read_a_shard_without_this_library(tmp_path):
    table = sealed(tmp_path / "t", seed=1)
    expected = random_rows(table, 1, 1)[SHARD_ROWS : 2 * SHARD_ROWS]
    file = shard(tmp_path / "t", 1, 2)
    with safe_open(file, "numpy") as opened:
        assert opened.keys() == ["rows"]
        assert opened.metadata() == {"table_id": table.table_id, "shard": file.name}
        np.testing.assert_array_equal(opened.get_tensor("rows"), expected)
    np.testing.assert_array_equal(
        np.memmap(file, np.uint8, "r", offset=4096, shape=expected.shape), expected
    )


def test_shards_have_equal_sizes_but_the_last_and_are_mapped_read_only(tmp_path):
    table = sealed(tmp_path / "t")
    arrays = table.shard_arrays(3)
    sizes = [len(array) for array in arrays]
    assert len(sizes) > 2 and set(sizes[:-1]) == {SHARD_ROWS} and sum(sizes) == table.rows(3)
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1


# Identities.


def test_the_first_seal_keeps_the_id_and_one_after_a_change_has_the_old_as_parent(tmp_path):
    table = create(tmp_path / "t", parent="a" * 32)
    first = table.table_id
    fill(table, 0)
    assert table.seal() == first and table.parent == "a" * 32
    table = Table.open(tmp_path / "t", "w")
    table.write_rows(3, 7, np.full((1, FMT.row_bytes), 99, np.uint8))
    second = table.seal()
    assert second != first and (table.table_id, table.parent) == (second, first)
    again = Table.open(tmp_path / "t")
    assert (again.table_id, again.parent) == (second, first)
    assert again.verify().shards == again.verify().of


def test_a_seal_without_a_change_keeps_the_id(tmp_path):
    table = sealed(tmp_path / "t")
    before = (tmp_path / "t/engram.json").read_text()
    Table.open(tmp_path / "t", "w").seal()
    assert (tmp_path / "t/engram.json").read_text() == before
    same = Table.open(tmp_path / "t", "w")
    fill(same, 0)  # written, with what stood there
    assert same.seal() == table.table_id


def test_two_tables_have_two_ids(tmp_path):
    assert sealed(tmp_path / "a").table_id != sealed(tmp_path / "b").table_id


def test_an_address_digest_of_another_tokenizer_spec_or_width_is_refused(tmp_path):
    table = sealed(tmp_path / "t")
    table.check_address(config().address_digest("v" * 64))
    for other in (
        config().address_digest("w" * 64),
        config(seed=1).address_digest("v" * 64),
        config(dim=8).address_digest("v" * 64),
    ):
        with pytest.raises(DigestMismatch, match=f"{other}, found {table.address_digest}"):
            table.check_address(other)


# States and modes.


def test_a_table_that_is_open_for_writing_is_not_read(tmp_path):
    table = create(tmp_path / "t")
    with pytest.raises(TableUnsealed, match="not sealed since"):
        Table.open(tmp_path / "t")
    with pytest.raises(TableUnsealed):
        table.verify()
    table.seal()
    reader = Table.open(tmp_path / "t")
    writer = Table.open(tmp_path / "t", "w")  # marked open before anything is written
    with pytest.raises(TableUnsealed):
        Table.open(tmp_path / "t")
    with pytest.raises(TableUnsealed):
        reader.verify()
    writer.write_rows(1, 0, np.full((1, FMT.row_bytes), 3, np.uint8))
    writer.seal()
    with pytest.raises(TableError, match="sealed again"):
        reader.verify()


def test_a_table_left_open_can_be_taken_up_and_sealed(tmp_path):
    sealed(tmp_path / "t", seed=0)
    left = Table.open(tmp_path / "t", "w")
    fill(left, 1)
    left.close()
    with pytest.raises(TableUnsealed):
        Table.open(tmp_path / "t")
    taken = Table.open(tmp_path / "t", "w")
    assert taken.seal() != left.table_id  # the change of the earlier writer is found
    assert holds(Table.open(tmp_path / "t"), 1)
    taken.verify()


def test_there_is_one_writer(tmp_path):
    writer = create(tmp_path / "t")
    with pytest.raises(TableError, match="open for writing elsewhere"):
        Table.open(tmp_path / "t", "w")
    code = "import sys; from engraphy.table import Table; Table.open(sys.argv[1], 'w')"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "t"], capture_output=True, text=True
    )
    assert run.returncode and "open for writing elsewhere" in run.stderr
    writer.seal()


def locked(path: Path) -> bool:
    return (path / "writer.lock").exists()


def test_the_lock_goes_with_the_writer_whether_it_seals_or_not(tmp_path):
    writer = create(tmp_path / "t")
    assert locked(tmp_path / "t")
    writer.seal()
    assert not locked(tmp_path / "t")
    Table.open(tmp_path / "t").close()
    writer = Table.open(tmp_path / "t", "w")
    assert locked(tmp_path / "t")
    writer.close()
    assert not locked(tmp_path / "t")


def test_a_lock_that_a_kill_left_is_taken_and_goes_with_its_new_holder(tmp_path):
    code = (
        "import os, sys; from engraphy.table import Table; "
        "t = Table.open(sys.argv[1], 'w'); os.kill(os.getpid(), 9)"
    )
    sealed(tmp_path / "t")
    subprocess.run([sys.executable, "-c", code, tmp_path / "t"], check=False)
    assert locked(tmp_path / "t")
    Table.open(tmp_path / "t", "w").seal()
    assert not locked(tmp_path / "t")


def test_a_lock_whose_file_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Opened while another writer held it, locked after that one had removed it: a third writer
    could lock another."""
    sealed(tmp_path / "t")
    flock, raced = fcntl.flock, []

    def late(fd, operation):
        if not raced:
            raced.append(os.fstat(fd).st_ino)
            (tmp_path / "t" / "writer.lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    writer = Table.open(tmp_path / "t", "w")
    assert raced and locked(tmp_path / "t")
    with pytest.raises(TableError, match="open for writing elsewhere"):
        Table.open(tmp_path / "t", "w")
    writer.seal()
    assert not locked(tmp_path / "t")


def test_a_forked_child_does_not_wait_for_a_thread_that_was_writing(tmp_path):
    table, inside, leave = create(tmp_path / "t"), threading.Event(), threading.Event()

    def write() -> None:
        with table.writing(LAYERS[0], [0]):
            inside.set()
            leave.wait()

    writer = threading.Thread(target=write)
    writer.start()
    inside.wait()
    child = fork()
    if not child:
        signal.alarm(30)
        table.write_rows(LAYERS[0], 0, np.zeros((1, FMT.row_bytes), np.uint8))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    leave.set()
    writer.join()
    assert status == 0


def test_a_forked_child_neither_unlocks_nor_removes_what_its_parent_holds(tmp_path):
    writer = create(tmp_path / "t")
    child = fork()
    if not child:
        writer.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and locked(tmp_path / "t")
    with pytest.raises(TableError, match="open for writing elsewhere"):
        Table.open(tmp_path / "t", "w")
    writer.seal()


def test_a_writer_whose_folder_was_replaced_leaves_the_lock_of_the_new_table_alone(tmp_path):
    old = create(tmp_path / "t")
    os.rename(tmp_path / "t", tmp_path / "moved")
    new = create(tmp_path / "t")
    old.close()
    assert locked(tmp_path / "t")
    new.seal()


WRITERS = """
import os, sys
from pathlib import Path
from engraphy.errors import TableError
from engraphy.table import Table
path, alone, done = Path(sys.argv[1]), Path(sys.argv[2]), 0
while done < 15:
    try:
        table = Table.open(path, "w")
    except TableError:
        continue
    os.close(os.open(alone, os.O_CREAT | os.O_EXCL))  # fails if another writer is at it
    os.unlink(alone)
    table.seal() if done % 2 else table.close()
    done += 1
"""


def test_writers_that_come_and_go_are_never_two_at_a_time(tmp_path):
    sealed(tmp_path / "t")
    command = [sys.executable, "-c", WRITERS, tmp_path / "t", tmp_path / "alone"]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        said = writer.communicate(timeout=300)[1]
        assert writer.returncode == 0, said
    Table.open(tmp_path / "t", "w").seal()
    assert not locked(tmp_path / "t")
    Table.open(tmp_path / "t", "w").close()
    Table.open(tmp_path / "t", "w")  # dropped, not closed: the lock goes with it
    Table.open(tmp_path / "t", "w").seal()


def test_nothing_is_written_through_a_table_that_is_not_open_for_writing(tmp_path):
    table = create(tmp_path / "t")
    table.seal()
    row = np.ones((1, FMT.row_bytes), np.uint8)
    reader = Table.open(tmp_path / "t")
    for other in (table, reader):
        with pytest.raises(TableError, match="mode w, found mode r"):
            other.write_rows(1, 0, row)
        with pytest.raises(TableError, match="mode w, found mode r"):
            other.seal()
    reader.close()
    for use in (reader.verify, reader.seal, lambda: reader.shard_arrays(1)):
        with pytest.raises(TableError, match="found mode closed"):
            use()
    assert not Table.open(tmp_path / "t").shard_arrays(1)[0].any()


@pytest.mark.parametrize("mode", ["a", "rw", "", None])
def test_another_mode_is_refused(tmp_path, mode):
    sealed(tmp_path / "t")
    with pytest.raises(ConfigError, match="mode: expected"):
        Table.open(tmp_path / "t", mode)


def test_unknown_layers_and_rows_out_of_range_are_refused(tmp_path):
    table = create(tmp_path / "t")
    rows, two = table.rows(1), np.ones((2, FMT.row_bytes), np.uint8)
    for use in (
        lambda: table.rows(2),
        lambda: table.shard_arrays(0),
        lambda: table.write_rows(99, 0, two),
    ):
        with pytest.raises(ConfigError, match="layer (2|0|99) has no memory"):
            use()
    for first in (-1, rows - 1, rows + 1):
        with pytest.raises(RowOutOfRange, match=f"expected 0 to {rows - 1}"):
            table.write_rows(1, first, two)
    for wrong in (two[:, 1:], two.astype(np.int8), two[0]):
        with pytest.raises(InputError, match=r"rows: expected uint8 \[N, 8\]"):
            table.write_rows(1, 0, wrong)
    assert not any(array.any() for array in table.shard_arrays(1))


# Creating.


def test_create_refuses_a_name_that_is_taken_and_takes_an_empty_directory(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(TableError, match="found it taken"):
            create(tmp_path / name)
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty").seal()
    create(tmp_path / "deep/er").seal()
    assert sorted(os.listdir(tmp_path)) == [
        "deep",
        "empty",
        "file",
        "full",
        "link",
    ]  # no temporary names are left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": RowFormat("bf16", 8)}, "expected d = 4"),
        ({"vocab": Words(49)}, "expected 50 ids"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"shard_rows": 1.5}, "shard_rows"),
        ({"shard_rows": True}, "shard_rows"),
    ],
)
def test_create_refuses_parts_that_do_not_fit_each_other(tmp_path, change, message):
    parts = {"config": config(), "fmt": FMT, "vocab": Words()} | change
    with pytest.raises(ConfigError, match=message):
        Table.create(tmp_path / "t", **parts)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("wrong", [{"vocab": Words(digest=None)}, {"parent": "me"}])
def test_create_refuses_what_could_not_be_opened_again(tmp_path, wrong):
    with pytest.raises(TableError, match="vocab_digest|parent"):
        Table.create(tmp_path / "t", config(), FMT, **({"vocab": Words()} | wrong))
    assert not os.listdir(tmp_path)


# Every damage has its name.


def cut(path: Path, change: int) -> None:
    os.truncate(path, path.stat().st_size + change)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def rename_in_header(path: Path, old: bytes, new: bytes) -> None:
    header = path.read_bytes()[:4096]
    assert old in header and len(old) == len(new)
    overwrite(path, 0, header.replace(old, new))


DAMAGES = {
    "a missing shard": (lambda t: shard(t).unlink(), ShardMissing, "found no file"),
    "a truncated shard": (
        lambda t: cut(shard(t), -1),
        ShardTruncated,
        r"expected 4416 bytes .* found 4415",
    ),
    "an extended shard": (
        lambda t: cut(shard(t), 1),
        ShardTruncated,
        r"expected 4416 bytes .* found 4417",
    ),
    "a shard shorter than its header": (
        lambda t: os.truncate(shard(t), 100),
        ShardTruncated,
        "less than the header",
    ),
    "an empty shard": (lambda t: os.truncate(shard(t), 0), ShardTruncated, "found 0"),
    "a shard with a garbage header": (
        lambda t: overwrite(shard(t), 0, b"\xfe" * 4096),
        ShardCorrupt,
        "header",
    ),
    "a shard with one flipped header byte": (
        lambda t: overwrite(shard(t), 3000, b"x"),
        ShardCorrupt,
        "header",
    ),
    "a shard with another header length": (
        lambda t: overwrite(shard(t), 0, b"\x00"),
        ShardCorrupt,
        "header differs",
    ),
    "a shard whose header is no object": (
        lambda t: overwrite(shard(t), 8, b"[1]".ljust(4088)),
        ShardCorrupt,
        "header",
    ),
    "a shard that says another row count": (
        lambda t: rename_in_header(shard(t), b"[40,8]", b"[41,8]"),
        ShardCorrupt,
        r"\[40, 8\], found \[41, 8\]",
    ),
    "a shard that says another row width": (
        lambda t: rename_in_header(shard(t), b"[40,8]", b"[40,9]"),
        ShardCorrupt,
        r"\[40, 8\], found \[40, 9\]",
    ),
    "a shard of another layer": (
        lambda t: shutil.copy(shard(t, 3, 1), shard(t, 1, 1)),
        ShardForeign,
        "found shard layer-00003",
    ),
    "two shards changed round": (
        lambda t: (
            shard(t, 1, 1).rename(t / "x"),
            shard(t, 1, 2).rename(t / shard_name(1, 1)),
            (t / "x").rename(t / shard_name(1, 2)),
        ),
        ShardForeign,
        "in its place",
    ),
    "no engram.json": (lambda t: (t / "engram.json").unlink(), TableError, "found no file"),
    "engram.json that is not JSON": (
        lambda t: cut(t / "engram.json", -1),
        TableError,
        "expected JSON",
    ),
    "engram.json that is not text": (
        lambda t: (t / "engram.json").write_bytes(b"\xff"),
        TableError,
        "expected JSON",
    ),
    "engram.json that is a list": (
        lambda t: (t / "engram.json").write_text("[]"),
        TableError,
        "found \\[\\]",
    ),
    "another format": (
        lambda t: edit(t, lambda j: j.update(format="x")),
        TableError,
        "expected format",
    ),
    "another version": (
        lambda t: edit(t, lambda j: j.update(version=2)),
        TableError,
        "expected format .* version 1",
    ),
    "an unknown field": (
        lambda t: edit(t, lambda j: j.update(more=1)),
        TableError,
        "more: unknown field",
    ),
    "a missing field": (
        lambda t: edit(t, lambda j: j.pop("row_bytes")),
        TableError,
        "row_bytes: the field is missing",
    ),
    "a digest not its own": (
        lambda t: edit(t, lambda j: j.update(address_digest="0" * 64)),
        DigestMismatch,
        "address_digest: expected",
    ),
    "another vocabulary": (
        lambda t: edit(t, lambda j: j.update(vocab_digest="w" * 64)),
        DigestMismatch,
        "address_digest: expected",
    ),
    "another hash spec": (
        lambda t: edit(t, lambda j: j["config"]["hash"].update(seed=7)),
        DigestMismatch,
        "address_digest: expected",
    ),
    "a wrong row count": (
        lambda t: edit(t, lambda j: j["layers"][0].update(rows=10)),
        TableError,
        r"\[0\].rows: expected .* found 10",
    ),
    "a wrong row width": (
        lambda t: edit(t, lambda j: j.update(row_bytes=9)),
        TableError,
        "expected 8, found 9",
    ),
    "a layer less": (
        lambda t: edit(t, lambda j: j["layers"].pop()),
        TableError,
        "layers: expected",
    ),
    "a shard renamed to lie elsewhere": (
        lambda t: edit(t, lambda j: j["layers"][0]["shards"][0].update(name="../x")),
        TableError,
        "name: expected",
    ),
    "a sealed shard without digest": (
        lambda t: edit(t, lambda j: j["layers"][0]["shards"][0].update(sha256=None)),
        TableError,
        "found null",
    ),
    "a digest that is none": (
        lambda t: edit(t, lambda j: j["layers"][0]["shards"][0].update(sha256="0")),
        TableError,
        "64 hex digits",
    ),
    "a state at odds with next_id": (
        lambda t: edit(t, lambda j: j.update(state="open")),
        TableError,
        "state",
    ),
    "a row format of another d": (
        lambda t: edit(t, lambda j: j.update(row_format={"kind": "f16", "d": 8})),
        TableError,
        "row_format.d",
    ),
    "a row format of another width": (
        lambda t: edit(t, lambda j: j.update(row_format={"kind": "f32", "d": 4})),
        TableError,
        "row_bytes|bytes",
    ),
    "a row format of the same width": (
        lambda t: edit(t, lambda j: j.update(row_format={"kind": "f16", "d": 4})),
        TableError,
        "checksum: expected",
    ),
    "a checksum that is none": (
        lambda t: edit(t, lambda j: j.update(checksum=7)),
        TableError,
        "checksum: .* found 7",
    ),
    "a field under another name": (
        lambda t: edit(t, lambda j: j.update(next_ID=j.pop("next_id"))),
        TableError,
        "next_id: .*no such field",
    ),
    "a directory in the place of engram.json": (
        lambda t: ((t / "engram.json").unlink(), (t / "engram.json").mkdir()),
        TableError,
        "cannot be read",
    ),
    "a directory in the place of a shard": (
        lambda t: (shard(t).unlink(), (t / shard_name(1, 1)).mkdir()),
        TableError,
        "the shard cannot be read|opened",
    ),
    "an unknown row format": (
        lambda t: edit(t, lambda j: j.update(row_format={"kind": "f8", "d": 4})),
        TableError,
        "row format",
    ),
    "an unknown dialect": (
        lambda t: edit(t, lambda j: j["config"]["hash"].update(dialect="x")),
        TableError,
        "dialect",
    ),
    "a table_id of another form": (
        lambda t: edit(t, lambda j: j.update(table_id="abc")),
        TableError,
        "32 hex digits",
    ),
    "shards that are no list": (
        lambda t: edit(t, lambda j: j["layers"][0].update(shards=None)),
        TableError,
        "expected shards",
    ),
    "the engram.json of another table": (
        lambda t: shutil.copy(sealed(t.with_name("other")).path / "engram.json", t),
        ShardForeign,
        "found one of",
    ),
    "no directory": (lambda t: shutil.rmtree(t), TableError, "found no file"),
    "a file in its place": (lambda t: (shutil.rmtree(t), t.touch()), TableError, "found no file"),
}


def shard_name(layer: int, number: int) -> str:
    count = -(-config().hash.row_count(layer) // SHARD_ROWS)
    return f"layer-{layer:05d}-{number:05d}-of-{count:05d}.safetensors"


@pytest.mark.parametrize("mode", ["r", "w"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_opening_names_the_damage(tmp_path, damage, mode):
    path = sealed(tmp_path / "t").path
    apply, error, message = DAMAGES[damage]
    apply(path)
    before = (path / "engram.json").read_bytes() if (path / "engram.json").is_file() else None
    with pytest.raises(error, match=message) as caught:
        Table.open(path, mode)
    assert str(tmp_path / "t") in str(caught.value)
    assert (
        before is None or (path / "engram.json").read_bytes() == before
    )  # a failed opening leaves no mark


@pytest.mark.parametrize(
    "name",
    [
        "format",
        "version",
        "state",
        "table_id",
        "parent",
        "next_id",
        "address_digest",
        "vocab_digest",
        "config",
        "row_format",
        "row_bytes",
        "shard_rows",
        "hot_rows",
        "layers",
    ],
)
def test_a_field_of_another_type_or_value_is_a_table_error(tmp_path, name):
    path = sealed(tmp_path / "t").path
    for value in (7, -1, 1.0, True, "x", [], [1], {}, {"a": 1}):
        edit(path, lambda j, value=value: j.update({name: value}))
        with pytest.raises((TableError, DigestMismatch), match="engram.json"):
            Table.open(path)


def test_a_shard_of_another_table_and_of_the_same_table_before_training_are_foreign(tmp_path):
    ours, theirs = sealed(tmp_path / "ours"), sealed(tmp_path / "theirs", seed=1)
    old = tmp_path / "old"
    shutil.copy(shard(ours.path), old)
    shutil.copy(shard(theirs.path), shard(ours.path))
    with pytest.raises(
        ShardForeign, match=f"{ours.table_id}, found one of table {theirs.table_id}"
    ):
        Table.open(ours.path)
    shutil.copy(old, shard(ours.path))
    trained = Table.open(ours.path, "w")
    fill(trained, 2)
    trained.seal()
    shutil.copy(old, shard(ours.path))
    with pytest.raises(
        ShardForeign, match=f"{trained.table_id}, found one of table {ours.table_id}"
    ):
        Table.open(ours.path)


def test_a_table_of_before_there_was_a_checksum_opens(tmp_path):
    path = sealed(tmp_path / "t").path
    edit(path, lambda j: j.pop("checksum"))
    assert holds(Table.open(path), 0)


def test_damage_after_opening_is_found_when_rows_are_mapped(tmp_path):
    table = sealed(tmp_path / "t")
    cut(shard(table.path), -1)
    with pytest.raises(ShardTruncated):
        table.shard_arrays(1)
    with pytest.raises(ShardTruncated):
        table.verify()


@pytest.mark.parametrize("offset", [4096, 4096 + 133, -1])
def test_a_flipped_byte_is_found_by_verify_and_named(tmp_path, offset):
    table = sealed(tmp_path / "t")
    file = shard(table.path, 3, 2)
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    digest = "[0-9a-f]{64}"
    with pytest.raises(
        ShardCorrupt, match=f"{file.name}: expected rows of SHA-256 {digest}, found {digest}"
    ):
        Table.open(table.path).verify()


def test_verify_tells_what_it_looked_at_and_a_sample_looks_at_so_many_shards(tmp_path):
    table = sealed(tmp_path / "t")
    whole = table.verify()
    assert whole.shards == whole.of == len(list(table.path.glob("*.safetensors")))
    assert whole.bytes == sum(table.rows(layer) for layer in LAYERS) * table.row_bytes
    assert table.verify(sample=2).shards == 2 and table.verify(sample=2).bytes < whole.bytes
    for sample in (0, -1, whole.of + 1):
        with pytest.raises(ConfigError, match="sample"):
            table.verify(sample=sample)
    for file in table.path.glob("*.safetensors"):
        overwrite(file, 4096, b"\x00\x01\x02")
    with pytest.raises(ShardCorrupt):
        table.verify(sample=1)


# No crash makes a wrong table look sealed.


def test_rows_and_headers_are_on_disk_before_the_table_says_so_and_the_mark_before_rows(
    tmp_path, monkeypatch
):
    base = sealed(tmp_path / "t")
    headers = [
        ("sync", file.name)
        for layer in LAYERS
        for file in sorted(base.path.glob(f"layer-{layer:05d}-*"))
    ]
    done = []

    def named(fd: int) -> str:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        return re.sub(r"^[.](.*)[.][0-9a-f]{8}[.]engraphy-part$", "new \\1", name)

    monkeypatch.setattr(os, "fsync", lambda fd: done.append(("sync", named(fd))))
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (replace(a, b), done.append(("rename", Path(b).name)))
    )
    mark = [("sync", "new engram.json"), ("rename", "engram.json"), ("sync", "t")]
    table = Table.open(tmp_path / "t", "w")
    assert done == mark
    done.clear()
    table.write_rows(3, SHARD_ROWS, np.full((1, FMT.row_bytes), 1, np.uint8))
    table.seal()
    assert done == [("sync", shard_name(3, 2)), *headers, *mark]


CRASHES = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.table.test_table import Table, create, fill
action, base, tmp = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])

def armed(call, budget=None):
    def step(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return step

for step in range(400):
    path = tmp / f"{step:03d}" / "t"
    path.parent.mkdir()
    if action == "train":
        shutil.copytree(base, path)
    child = os.fork()
    if not child:
        left = [step]
        os.fsync = lambda fd: None
        for name in ("fsync", "pwrite", "replace", "rename", "mkdir"):
            setattr(os, name, armed(getattr(os, name)))
        table = Table.open(path, "w") if action == "train" else create(path)
        fill(table, 1)
        table.seal()
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def in_order(seen: list[str], states: list[str]) -> bool:
    return set(seen) == set(states) and seen == sorted(seen, key=states.index)


def kill_at_every_step(tmp_path: Path, action: str, base: Path) -> list[Path]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CRASHES, ROOT, action, base, tmp_path],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    paths = sorted(path / "t" for path in tmp_path.iterdir() if path.name.isdigit())
    assert 20 < len(paths) < 400
    return paths


@pytest.fixture(scope="module")
def killed_in_training(tmp_path_factory) -> tuple[Table, list[Path]]:
    tmp_path = tmp_path_factory.mktemp("killed")
    base = sealed(tmp_path / "base", seed=0)
    return base, kill_at_every_step(tmp_path, "train", base.path)


@pytest.mark.slow
def test_a_kill_at_any_step_of_training_leaves_the_old_table_the_new_one_or_one_that_says_unsealed(
    tmp_path, killed_in_training
):
    base, paths = killed_in_training
    seen = []
    for step, killed in enumerate(paths):
        path = shutil.copytree(killed, tmp_path / str(step))
        try:
            table = Table.open(path)
        except TableUnsealed:
            seen.append("unsealed")
            taken = Table.open(path, "w")
            fill(taken, 1)
            taken.seal()
            table = Table.open(path)
            assert (
                holds(table, 1)
                and table.table_id != base.table_id
                and table.parent == base.table_id
            )
        else:
            seen.append("old" if table.table_id == base.table_id else "new")
            assert holds(table, 0 if seen[-1] == "old" else 1)
        table.verify()
    assert in_order(seen, ["old", "unsealed", "new"])


def test_a_table_whose_training_was_killed_and_undone_is_the_old_one_again(
    tmp_path, killed_in_training
):
    base, paths = killed_in_training
    for step, killed in enumerate(paths):
        in_force = json.loads((killed / "engram.json").read_text())["table_id"]
        table = Table.open(shutil.copytree(killed, tmp_path / str(step)), "w")
        fill(table, 0)
        assert (table.seal() == base.table_id) == (in_force == base.table_id)
        assert holds(Table.open(table.path), 0)
        table.verify()


def test_a_kill_at_any_step_of_creating_leaves_nothing_or_a_table_that_says_unsealed(tmp_path):
    seen = []
    for path in kill_at_every_step(tmp_path, "create", tmp_path):
        try:
            table = Table.open(path)
        except TableUnsealed:
            seen.append("unsealed")
            Table.open(path, "w").seal()
            table = Table.open(path)
        except EngraphyError:
            seen.append("nothing")
            assert not path.exists()
            continue
        else:
            seen.append("new")
            assert holds(table, 1)
        table.verify()
    assert in_order(seen, ["nothing", "unsealed", "new"])


# What a table says of itself.


def test_its_repr_names_path_rows_format_identity_and_state(tmp_path):
    table = create(tmp_path / "t")
    rows = {layer: table.rows(layer) for layer in LAYERS}
    says = (
        f"Table('{tmp_path}/t', rows={rows}, format=RowFormat(kind='bf16', d=4, scale=None), "
        f"table_id='{table.table_id}', state='open', mode='w')"
    )
    assert repr(table) == says
    table.seal()
    says = says.replace("state='open', mode='w'", "state='sealed', mode='r'")
    assert repr(table) == repr(Table.open(tmp_path / "t")) == says
    table.close()
    assert repr(table) == says.replace("mode='r'", "mode='closed'")


@pytest.mark.parametrize("shard_rows", [0, -1, 2.5, True, "40"])
def test_shard_rows_is_a_positive_integer(tmp_path, shard_rows):
    with pytest.raises(ConfigError, match="shard_rows: expected (an integer|at least 1), found"):
        Table.create(tmp_path / "t", config(), FMT, Words(), shard_rows=shard_rows)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("sample", [0, 1000, 1.5, True])
def test_a_sample_of_shards_that_there_are_not_is_refused(tmp_path, sample):
    with pytest.raises(ConfigError, match="sample: expected (1 to|an integer)"):
        sealed(tmp_path / "t").verify(sample)


def test_a_child_that_is_forked_while_rows_are_written_leaves_the_block_and_goes_on(tmp_path):
    table = create(tmp_path / "t")
    child, status = -1, 1
    try:
        with table.writing(1, [0]):
            child = fork()
        status = 0
    finally:
        if child == 0:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    table.seal()
