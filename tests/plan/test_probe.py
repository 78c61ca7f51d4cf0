"""The probe reads what it says that it reads, and leaves nothing behind."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from engraphy import _native
from engraphy.errors import ConfigError, StoreError, WriteFailed
from engraphy.plan import measure, tier
from engraphy.plan import pages as pages_module
from engraphy.plan import probe as probe_module
from engraphy.plan.pages import PAGE, PageReader

SIZE = 4 << 20
LEVELS = ["off", *(["auto"] if _native.core is not None else [])]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(probe_module, "_SECONDS", 0.0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.bin"
    rng = np.random.default_rng(3)
    path.write_bytes(rng.bytes(SIZE))
    return path


@pytest.mark.parametrize("level", LEVELS)
def test_a_file_is_read_and_not_changed(level, file):
    before = file.read_bytes()
    said = []
    if level == "off":
        with _native.forced("off"):
            found = measure(file, threads=4, say=said.append)
    else:
        found = measure(file, threads=4, say=said.append)
    assert file.read_bytes() == before
    assert said == [f"reading {file}"]
    assert (found.file, found.bytes, found.threads) == (str(file), SIZE, 4)
    assert found.native == (level != "off")
    assert [item.reads for item in found.batches] == [1, 4, 16, 64]
    for item in found.batches:
        assert item.rounds >= 5 and 0 < item.seconds <= item.p90 <= item.p99


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_batches_bring_the_pages_that_were_drawn(level, direct, file, monkeypatch):
    if not direct:
        monkeypatch.setattr(pages_module.os, "O_DIRECT", 0)
    expected = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, PAGE)
    level = "off" if level == "off" else _native.level()
    with _native.forced(level):
        reader = PageReader(str(file), threads=4, least=1)
        page_N = reader.draw(50, np.random.default_rng(0))
        out_NP = np.empty(50 * PAGE, np.uint8)
        if reader.direct:  # into whole pages
            assert reader.seconds(page_N) > 0
        elif reader._native is None:
            reader._read_plain(page_N, out_NP.data)
            assert (out_NP.reshape(50, PAGE) == expected[page_N]).all()
        else:
            reader._read_native(page_N, out_NP)
            assert (out_NP.reshape(50, PAGE) == expected[page_N]).all()


def test_pages_of_a_batch_are_distinct_and_never_side_by_side(file):
    reader = PageReader(str(file), threads=1, least=1)
    drawn_N = np.sort(reader.draw(reader.most, np.random.default_rng(0)))
    assert np.diff(drawn_N).min() > 2
    assert drawn_N[-1] < reader.pages


def test_a_folder_gets_a_scratch_file_that_is_gone_afterwards(tmp_path):
    said = []
    found = measure(tmp_path, size=SIZE, threads=2, say=said.append)
    assert found.file == "a scratch file" and found.bytes == SIZE
    assert "GiB are free there; it is removed afterwards" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_after_an_error(tmp_path, monkeypatch):
    def fail(self, page_N):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(PageReader, "seconds", fail)
    with pytest.raises(StoreError, match="the disk is gone"):
        measure(tmp_path, size=SIZE, threads=2)
    assert list(tmp_path.iterdir()) == []


def test_a_table_in_the_folder_is_read_in_place(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"x")
    large = tmp_path / "model.safetensors"
    large.write_bytes(bytes(SIZE))
    assert measure(tmp_path, size=SIZE, threads=2).file == str(large)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "small.gguf"]


def test_a_disk_without_space_is_said_before_a_byte_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "free_disk", lambda _: SIZE - 1)
    said = []
    with pytest.raises(WriteFailed, match=f"expected {SIZE} bytes of free disk, found {SIZE - 1}"):
        measure(tmp_path, size=SIZE, say=said.append)
    assert said and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_named_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(fd, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe_module.os, "write", full)
    with pytest.raises(WriteFailed, match="scratch file: it cannot be written"):
        measure(tmp_path, size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_what_the_page_cache_may_answer_is_dropped_and_said(file, monkeypatch):
    dropped = []
    monkeypatch.setattr(pages_module.os, "O_DIRECT", 0)
    monkeypatch.setattr(pages_module, "_open", lambda path: (os.open(path, os.O_RDONLY), False))
    monkeypatch.setattr(
        pages_module.os, "posix_fadvise", lambda fd, first, length, advice: dropped.append(advice)
    )
    found = measure(file, threads=2)
    assert "posix_fadvise" in found.how
    assert dropped.count(os.POSIX_FADV_DONTNEED) == sum(item.rounds + 1 for item in found.batches)


def test_a_probe_is_a_tier_for_plans(file, tmp_path):
    found = measure(file, threads=2)
    (tmp_path / "disk.json").write_text(json.dumps(found.to_json()))
    read = tier(tmp_path / "disk.json")
    assert read.batches == found.tier.batches and read.unit == found.tier.unit == PAGE
    for batch, item in zip(read.batches, found.batches, strict=True):
        assert read.seconds(batch.reads, PAGE) == pytest.approx(item.seconds)


def test_what_cannot_be_probed_is_refused(file, tmp_path):
    with pytest.raises(ConfigError, match="expected a file or a folder, found neither"):
        measure(tmp_path / "none")
    small = tmp_path / "small"
    small.write_bytes(bytes(PAGE))
    with pytest.raises(
        ConfigError, match="expected at least 1048576 bytes to read from, found 4096"
    ):
        measure(small)
    with pytest.raises(ConfigError, match="size: expected"):
        measure(tmp_path, size=PAGE)
    with pytest.raises(ConfigError, match="threads: expected"):
        measure(file, threads=0)


def test_a_file_that_ends_early_is_a_named_error(file):
    reader = PageReader(str(file), threads=2, least=1)
    os.truncate(file, PAGE)
    with pytest.raises(StoreError, match="pages cannot be read"):
        reader.seconds(np.arange(40, 60, 4))
