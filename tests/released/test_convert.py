"""A released checkpoint becomes a table of the same bytes; whatever stops it, it goes on or says by
name why not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from engraphy.addresses.vocab import VocabMap
from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    EngraphyError,
    ShardTruncated,
    TableError,
    TableUnsealed,
)
from engraphy.released import convert as module
from engraphy.released.checkpoint import Checkpoint
from engraphy.released.convert import Converted, convert
from engraphy.spec import EngramConfig
from engraphy.table import Table
from engraphy.table import table as table_module
from tests.tools.releases import (
    QWEN,
    V41,
    qwen_tensors,
    records,
    v41_tensors,
    write_qwen,
    write_v41,
)

ROWS = 546  # of both layers of V41


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Shards of 4 KiB, chunks of 20 rows, a journal entry for each 60, no fsync."""
    monkeypatch.setattr(table_module, "MAX_SHARD_BYTES", 8192)
    monkeypatch.setattr(module, "CHUNK_BYTES", 20 * 66)
    monkeypatch.setattr(module, "SYNC_BYTES", 60 * 66)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def journal(out: Path) -> Path:
    return out.with_name(out.name + ".converting.json")


def rows_of(path: Path, layer: int) -> np.ndarray:
    return np.concatenate(Table.open(path).shard_arrays(layer))


def is_v41(out: Path, seed: int = 0) -> bool:
    table = Table.open(out)
    table.verify()
    return not journal(out).exists() and all(
        np.array_equal(rows_of(out, layer), records(v41_tensors(seed=seed), layer))
        for layer in (1, 3)
    )


class Stopped(Exception):
    """What stands for a kill where the process has to live on."""


def stop_after(bytes_done: int):
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "converting" and done >= bytes_done:
            raise Stopped

    return progress


def half(tmp_path: Path, seed: int = 0, rows: int = 300) -> tuple[Path, Path]:
    """A conversion that stopped in the second layer."""
    source, out = write_v41(tmp_path / "c", seed=seed), tmp_path / "t"
    with pytest.raises(Stopped):
        convert(source, out, progress=stop_after(rows * 66))
    return source, out


# What comes out.


@pytest.mark.parametrize(
    ("write", "make", "options"),
    [
        (write_v41, v41_tensors, {}),
        (write_v41, v41_tensors, {"scale_dtype": "U8"}),
        (write_qwen, qwen_tensors, {}),
        (write_qwen, qwen_tensors, {"fp8": True}),
        (write_qwen, qwen_tensors, {"config": QWEN | {"split_ngram_parts": 7}}),
    ],
)
def test_a_table_has_the_records_the_addresses_and_the_format_of_the_checkpoint(
    tmp_path, write, make, options
):
    source, tensors = Checkpoint.open(write(tmp_path / "c", **options)), make(**options)
    made = convert(source.directory, tmp_path / "t")
    table = Table.open(tmp_path / "t")
    for layer in table.layers:
        np.testing.assert_array_equal(rows_of(tmp_path / "t", layer), records(tensors, layer))
    assert (table.config, table.fmt, table.parent) == (source.config, source.fmt, source.source_id)
    assert table.address_digest == source.config.address_digest(source.vocab().digest)
    rows = source.config.row_count()
    assert made == Converted(
        str(tmp_path / "t"),
        table.table_id,
        source.source_id,
        source.fmt.kind,
        rows,
        rows * source.fmt.row_bytes,
        0,
    )
    assert table.verify().shards == table.verify().of > 1 and not journal(tmp_path / "t").exists()


def test_a_saved_map_stands_for_the_tokenizer(tmp_path):
    source = write_v41(tmp_path / "c")
    vocab = Checkpoint.open(source).vocab()
    vocab.save(tmp_path / "v.json")
    (source / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="expected the tokenizer"):
        convert(source, tmp_path / "t")
    convert(source, tmp_path / "t", vocab_file=tmp_path / "v.json")
    Table.open(tmp_path / "t").check_address(
        Checkpoint.open(source).config.address_digest(vocab.digest)
    )


def test_progress_tells_bytes_and_ends_with_all_of_them(tmp_path):
    told = []
    convert(write_v41(tmp_path / "c"), tmp_path / "t", progress=lambda *step: told.append(step))
    assert told[0] == ("converting", 0, ROWS * 66) and told[-2:] == [
        ("converting", ROWS * 66, ROWS * 66),
        ("sealing", 0, 0),
    ]
    done = [step[1] for step in told[:-1]]
    assert done == sorted(done) and max(np.diff(done)) == 20 * 66


# It goes on where it stopped.


def test_a_stopped_conversion_reads_as_unsealed_and_goes_on_where_the_journal_says(
    tmp_path, monkeypatch
):
    source, out = half(tmp_path)
    with pytest.raises(TableUnsealed):
        Table.open(out)
    assert (
        json.loads(journal(out).read_text())["rows"] == 240
    )  # the first layer; then 60 rows were not yet complete
    read, reading = [], Checkpoint.read_rows

    def watched(self, layer, first, out_nR):
        read.append((layer, first, len(out_nR)))
        reading(self, layer, first, out_nR)

    monkeypatch.setattr(Checkpoint, "read_rows", watched)
    source_rows = len(Checkpoint.open(source).weights) * 64  # what a source is known by
    read.clear()
    made = convert(source, out)
    copied = read[source_rows:]
    assert (
        copied[0] == (3, 0, 20)
        and sum(count for _, _, count in copied) == 306
        and made.resumed_at == 240
    )
    assert is_v41(out)


def test_rows_beyond_the_journal_may_be_lost(tmp_path):
    """A crash keeps what was synced; what came later may be anything."""
    source, out = half(tmp_path)
    table = Table.open(out, "w")
    table.write_rows(3, 0, np.full((306, 66), 0xEE, np.uint8))
    table.close()
    convert(source, out)
    assert is_v41(out)


def test_rows_that_the_journal_tells_of_are_on_disk_before_it_is(tmp_path, monkeypatch):
    """Between two journals every shard with rows written since is synced, and the journal is synced
    before its name."""
    done, written = [], set()
    write, replace, journalled = Table.write_rows, os.replace, []

    def name_of(fd: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    def write_rows(table, layer, first, rows_NR):
        size = table.shard_rows
        written.update(
            table.shards(layer)[i].name
            for i in range(first // size, -(-(first + len(rows_NR)) // size))
        )
        write(table, layer, first, rows_NR)

    monkeypatch.setattr(Table, "write_rows", write_rows)
    monkeypatch.setattr(
        os, "fsync", lambda fd: (done.append(name_of(fd)), written.discard(name_of(fd)))
    )

    def watched(a, b):
        if Path(b) == journal(tmp_path / "t"):
            assert not written and done[-1] == Path(a).name
            journalled.append(json.loads(Path(a).read_text())["rows"])
        replace(a, b)

    monkeypatch.setattr(os, "replace", watched)
    convert(write_v41(tmp_path / "c"), tmp_path / "t")
    assert journalled == [0, 60, 120, 180, 240, 300, 360, 420, 480, 540, 546]


def test_a_journal_without_its_table_begins_anew(tmp_path):
    source, out = half(tmp_path)
    shutil.rmtree(out)
    assert convert(source, out).resumed_at == 0 and is_v41(out)


def test_a_finished_table_whose_journal_was_left_is_taken_as_it_is(tmp_path):
    source, out = half(tmp_path)
    kept = journal(out).read_text()
    first = convert(source, out)
    journal(out).write_text(kept)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    again = convert(source, out)
    assert (again.table_id, again.resumed_at) == (first.table_id, ROWS) and is_v41(out)
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}


def test_another_source_does_not_go_on_with_the_first_ones_table(tmp_path):
    _, out = half(tmp_path)
    other = write_v41(tmp_path / "other", seed=1)  # the same headers, other rows
    with pytest.raises(TableError, match="another checkpoint"):
        convert(other, out)
    journal(out).unlink()
    with pytest.raises(TableError, match="found it taken"):
        convert(other, out)
    assert not journal(out).exists()


def test_a_journal_goes_with_its_own_table_only(tmp_path):
    source, out = half(tmp_path)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "u", progress=stop_after(1))
    shutil.rmtree(out)
    (tmp_path / "u").rename(out)  # of the same source, but with fewer rows than the journal says
    with pytest.raises(TableError, match="expected the unfinished conversion"):
        convert(source, out)


def test_a_journal_of_more_rows_than_there_are_is_refused(tmp_path):
    source, out = half(tmp_path)
    journal(out).write_text(journal(out).read_text().replace("240", "547"))
    with pytest.raises(TableError, match="expected the unfinished conversion"):
        convert(source, out)


def test_a_map_other_than_that_of_the_first_run_is_refused(tmp_path):
    source, out = half(tmp_path)
    VocabMap(np.concatenate([np.arange(40)[::-1], np.arange(20)])).save(tmp_path / "v.json")
    with pytest.raises(TableError, match="expected the unfinished conversion"):
        convert(source, out, vocab_file=tmp_path / "v.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "x", "source_id": 1, "table_id": null, "rows": 0}',
        '{"format": "engraphy-conversion-1", "source_id": "a", "table_id": "b", "rows": -1}',
        '{"format": "engraphy-conversion-1", "source_id": "a", "table_id": null, "rows": 9}',
    ],
)
def test_a_journal_that_is_none_is_refused(tmp_path, text):
    source, out = half(tmp_path)
    journal(out).write_text(text)
    with pytest.raises(TableError, match="converting.json: expected"):
        convert(source, out)


def test_a_name_that_is_taken_is_refused_and_kept(tmp_path):
    source = write_v41(tmp_path / "c")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    convert(source, tmp_path / "t")
    before = Table.open(tmp_path / "t").table_id
    for name in ("full", "t"):
        with pytest.raises(TableError, match="found it taken"):
            convert(source, tmp_path / name)
    assert (tmp_path / "full/mine").read_text() == "mine" and Table.open(
        tmp_path / "t"
    ).table_id == before
    assert sorted(os.listdir(tmp_path)) == ["c", "full", "t"]


def test_a_table_being_trained_is_not_converted_over(tmp_path):
    source, out = write_v41(tmp_path / "c"), tmp_path / "t"
    convert(source, out)
    Table.open(out, "w").close()  # left open, as by a training run that was killed
    with pytest.raises(TableError, match="found it taken"):
        convert(source, out)


def test_two_conversions_to_one_place_are_refused(tmp_path):
    source, out = half(tmp_path)
    first = Table.open(out, "w")
    with pytest.raises(TableError, match="open for writing elsewhere"):
        convert(source, out)
    first.close()
    convert(source, out)
    assert is_v41(out)


# Disks that are full, sources that change.


def test_too_little_disk_is_said_before_anything_is_made(tmp_path, monkeypatch):
    source = write_v41(tmp_path / "c")
    needed = ROWS * 66 + 2 * 4096
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(
        TableError, match=f"expected {needed} bytes of free disk .* found {needed - 1}"
    ):
        convert(source, tmp_path / "deep/er/t")
    assert os.listdir(tmp_path) == ["c"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    convert(source, tmp_path / "deep/er/t")
    assert is_v41(tmp_path / "deep/er/t")


@pytest.mark.parametrize(("rows", "fits"), [(20, False), (540, True)])
def test_only_what_is_written_already_needs_no_disk_again(tmp_path, monkeypatch, rows, fits):
    """Rows that are not yet written have their place in the file and none on the disk."""
    source, out = half(tmp_path, rows=rows)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    if fits:
        convert(source, out)
        assert is_v41(out)
        return
    with pytest.raises(TableError, match="bytes of free disk"):
        convert(source, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    convert(source, out)  # the lock was given back
    assert is_v41(out)


def test_a_disk_that_fills_up_is_an_error_and_the_same_call_goes_on(tmp_path, monkeypatch):
    source, out = write_v41(tmp_path / "c"), tmp_path / "t"
    write, left = os.pwrite, [9]

    def full(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TableError, match="No space left.*the same command continues it"):
        convert(source, out)
    with pytest.raises(TableUnsealed):
        Table.open(out)
    monkeypatch.setattr(os, "pwrite", write)
    assert convert(source, out).resumed_at > 0 and is_v41(out)


def test_a_limit_on_file_sizes_is_an_error_too(tmp_path):
    source = write_v41(tmp_path / "c", V41 | {"engram_vocab_size": 500})
    code = """
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        from engraphy.released.convert import convert
        from engraphy.errors import TableError
        try:
            convert(sys.argv[1], sys.argv[2])
        except TableError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), source, tmp_path / "t"],
        capture_output=True,
        text=True,
    )
    assert "the conversion stopped" in run.stdout and "File too large" in run.stdout, run.stderr
    assert not (tmp_path / "t").exists() and not journal(tmp_path / "t").exists()


def test_a_source_that_becomes_shorter_is_an_error(tmp_path):
    source, out = write_v41(tmp_path / "c"), tmp_path / "t"
    file = source / "model-00003-of-00003.safetensors"

    def progress(stage, done, total):
        os.truncate(file, 300)

    with pytest.raises(ShardTruncated, match=file.name):
        convert(source, out, progress=progress)
    with pytest.raises(TableUnsealed):
        Table.open(out)


def test_nothing_is_made_of_a_checkpoint_that_is_damaged_or_has_another_tokenizer(tmp_path):
    for change, error in (
        ({"engram_vocab_size": 60}, TableError),
        ({"engram_compressed_vocab_size": 41}, DigestMismatch),
    ):
        source = write_v41(tmp_path / "c")
        data = json.loads((source / "config.json").read_text())
        data["text_config"] |= change
        (source / "config.json").write_text(json.dumps(data))
        with pytest.raises(error):
            convert(source, tmp_path / "t")
        shutil.rmtree(source)
        assert not os.listdir(tmp_path)


# Kill -9 at any step.


CRASHES = """
import os, signal, sys
from pathlib import Path
from engraphy.released import convert as module
from engraphy.table import table
source, tmp = sys.argv[1], Path(sys.argv[2])
table.MAX_SHARD_BYTES, module.CHUNK_BYTES, module.SYNC_BYTES = 16384, 60 * 66, 120 * 66

def armed(call):
    def step(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return step

for step in range(600):
    out = tmp / f"{step:03d}" / "t"
    out.parent.mkdir()
    child = os.fork()
    if not child:
        left = [step]
        os.fsync = lambda fd: None
        for name in ("fsync", "pwrite", "replace", "rename", "mkdir", "unlink"):
            setattr(os, name, armed(getattr(os, name)))
        module.convert(source, out)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_a_conversion_that_goes_on_and_never_a_wrong_table(tmp_path):
    source = write_v41(tmp_path / "c")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CRASHES, source, tmp_path],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    seen, resumed = [], []
    outs = sorted(path / "t" for path in tmp_path.iterdir() if path.name.isdigit())
    assert 40 < len(outs) < 600
    for out in outs:
        try:
            Table.open(out)
            seen.append("sealed")
        except TableUnsealed:
            seen.append("unsealed")
        except EngraphyError:
            seen.append("nothing")
            assert not out.exists()
        if journal(out).exists() or seen[-1] == "nothing":
            resumed.append(convert(source, out).resumed_at)
        assert is_v41(out)
    assert sorted(set(seen)) == ["nothing", "sealed", "unsealed"] and seen == sorted(
        seen, key=["nothing", "unsealed", "sealed"].index
    )
    assert resumed == sorted(resumed) and {0, 120, 240, 360, 480, ROWS} <= set(resumed)


# Size.


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path):
    """300 MB of rows may take 64 MB more than a few rows do."""
    code = """
        import os, resource, sys
        from engraphy.released.convert import convert
        os.fsync = lambda fd: None
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        convert(sys.argv[1], sys.argv[2] + "/small")
        before = peak()
        print(convert(sys.argv[3], sys.argv[2] + "/large").bytes, peak() - before)
    """
    config = V41 | {"engram_vocab_size": 290_000, "engram_head_dim": 256, "engram_layer_ids": [1]}
    small, large = (
        write_v41(tmp_path / "small_c"),
        write_v41(tmp_path / "large_c", config, tensors={}),
    )
    rows = EngramConfig.from_hf(config).hash.row_count(1)
    stem, end, header = "layers.1.engram.embed", 0, {}
    for name, dtype, width in (("weight", "F8_E4M3", 256), ("scale", "F8_E8M0", 8)):
        header[f"{stem}.{name}"] = {
            "dtype": dtype,
            "shape": [rows, width],
            "data_offsets": [end, end + rows * width],
        }
        end += rows * width
    text = json.dumps(header).encode()
    with open(
        large / "model-00002-of-00002.safetensors", "wb"
    ) as file:  # sparse: zeros that take no disk
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    index = {"weight_map": dict.fromkeys(header, "model-00002-of-00002.safetensors")}
    (large / "model.safetensors.index.json").write_text(json.dumps(index))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), small, tmp_path, large],
        capture_output=True,
        text=True,
    )
    shutil.rmtree(tmp_path / "large", ignore_errors=True)
    assert run.returncode == 0, run.stderr
    size, grown = map(int, run.stdout.split())
    assert size > 300_000_000 and grown < 64_000_000, (size, grown)
