"""Rows in another format are what that format makes of them, the reported differences are theirs,
and nothing half done reads as sealed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engraphy.addresses.vocab import VocabMap
from engraphy.errors import ConfigError, EngraphyError, InputError, TableError, TableUnsealed
from engraphy.rows import RowFormat
from engraphy.rows.codecs import CODECS
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
from engraphy.table import Table, chunks
from engraphy.table import table as table_module
from engraphy.table.quantize import Difference, compare, quantize

D, LAYERS = 32, (1, 3)
KINDS = [kind for kind, codec in CODECS.items() if codec.encode and kind != "fp8_scaled"]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(table_module, "MAX_SHARD_BYTES", 8192)
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 25 * D)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def config(seed: int = 0) -> EngramConfig:
    spec = HashSpec.demo(LAYERS, (2, 3), 2, 20, 50, 0, seed=seed)
    return EngramConfig(spec, LayerSpec(8, spec.columns * D, order=3), D)


def values(layer: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng((layer, seed))
    rows = config().hash.row_count(layer)
    values_Nd = (rng.standard_normal((rows, D)) * rng.lognormal(size=(rows, 1))).astype(np.float32)
    values_Nd[:3] = 0
    return values_Nd


def make(path: Path, kind: str = "f32", seed: int = 0, spec_seed: int = 0, change=None) -> Table:
    fmt = RowFormat(kind, D)
    table = Table.create(path, config(spec_seed), fmt, VocabMap.identity(50))
    for layer in LAYERS:
        values_Nd = values(layer, seed)
        if change:
            change(layer, values_Nd)
        table.write_rows(layer, 0, fmt.encode(values_Nd))
    table.seal()
    return table


def rows_of(table: Table | Path, layer: int) -> np.ndarray:
    return np.concatenate(
        (Table.open(table) if isinstance(table, Path) else table).shard_arrays(layer)
    )


def difference(old_Nd: np.ndarray, new_Nd: np.ndarray) -> Difference:
    """Of whole arrays of finite numbers, as the words say it."""
    old_Nd, new_Nd = old_Nd.astype(np.float64), new_Nd.astype(np.float64)
    error_Nd = np.abs(new_Nd - old_Nd)
    cosines = [
        float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) if b.any() else 0.0
        for a, b in zip(old_Nd, new_Nd, strict=True)
        if a.any()
    ]
    return Difference(
        len(old_Nd),
        int((old_Nd != new_Nd).any(axis=1).sum()),
        0,
        float(error_Nd.max()),
        float(error_Nd.mean()),
        float(np.linalg.norm(error_Nd) / np.linalg.norm(old_Nd)),
        float(np.mean(cosines)),
        min(cosines),
    )


def close(found: Difference, expected: Difference) -> bool:
    return (found.rows, found.different, found.not_finite) == (
        expected.rows,
        expected.different,
        expected.not_finite,
    ) and all(
        getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6)
        for name in ("max_abs", "mean_abs", "relative_rms", "mean_cosine", "min_cosine")
    )


# Quantising.


@pytest.mark.parametrize(
    ("source", "kind"),
    [("f32", kind) for kind in KINDS[1:]] + [("fp8", "int4"), ("bf16", "f32"), ("int8", "fp8")],
)
def test_rows_are_what_the_format_makes_of_the_parents_and_differ_as_is_told(
    tmp_path, source, kind
):
    parent = make(tmp_path / "a", source)
    made = quantize(tmp_path / "a", tmp_path / "b", kind)
    table, fmt = Table.open(tmp_path / "b"), RowFormat(kind, D)
    assert (table.fmt, table.config, table.address_digest) == (
        fmt,
        parent.config,
        parent.address_digest,
    )
    assert (made.table_id, made.parent) == (
        table.table_id,
        table.parent,
    ) and table.parent == parent.table_id
    assert made.table_id != parent.table_id and table.verify().shards == table.verify().of
    rows = parent.config.row_count()
    assert (made.bytes, made.parent_bytes) == (rows * fmt.row_bytes, rows * parent.row_bytes)
    for layer in LAYERS:
        old_Nd = parent.fmt.decode(rows_of(parent, layer))
        np.testing.assert_array_equal(rows_of(table, layer), fmt.encode(old_Nd))
        assert close(made.difference[layer], difference(old_Nd, fmt.decode(rows_of(table, layer))))
    assert compare(tmp_path / "a", tmp_path / "b").difference == made.difference


def test_the_error_of_a_value_is_at_most_half_a_step(tmp_path):
    make(tmp_path / "a")
    for kind, top in (("int8", 127), ("int4", 7)):
        found = quantize(tmp_path / "a", tmp_path / kind, kind).difference
        for layer in LAYERS:
            largest = np.abs(values(layer)).max()
            assert 0.4 * largest / top < found[layer].max_abs < 0.51 * largest / top


def test_the_error_of_blocks_is_that_of_their_steps(tmp_path):
    """Half a step and the rounding of its f16 scale; q4_0 cuts what would be 8 steps at 7."""
    make(tmp_path / "a")
    for kind, top, most in (("q8_0", 127, 0.57), ("q4_0", 8, 1.01)):
        found = quantize(tmp_path / "a", tmp_path / kind, kind).difference
        for layer in LAYERS:
            largest = np.abs(values(layer)).max()
            assert 0.4 * largest / top < found[layer].max_abs < most * largest / top


def test_a_wider_format_changes_nothing(tmp_path):
    make(tmp_path / "a", "bf16")
    found = quantize(tmp_path / "a", tmp_path / "b", "f32").difference
    for layer in LAYERS:
        assert (found[layer].different, found[layer].max_abs, found[layer].relative_rms) == (
            0,
            0.0,
            0.0,
        )
        assert found[layer].min_cosine == pytest.approx(1)


def test_the_parent_is_not_touched(tmp_path):
    make(tmp_path / "a")
    before = {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in (tmp_path / "a").iterdir()
    }
    quantize(tmp_path / "a", tmp_path / "b", "int8")
    assert before == {
        file.name: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in (tmp_path / "a").iterdir()
    }


def test_progress_ends_with_all_bytes(tmp_path):
    make(tmp_path / "a")
    told = []
    made = quantize(
        tmp_path / "a", tmp_path / "b", "int8", progress=lambda *step: told.append(step)
    )
    assert told[-2:] == [("quantising", made.bytes, made.bytes), ("sealing", 0, 0)]
    assert [step[1] for step in told[:-1]] == sorted(step[1] for step in told[:-1])


# What cannot be is refused, and nothing is left of it.


def spoil(layer: int, values_Nd: np.ndarray) -> None:
    if layer == 3:
        values_Nd[30, 5] = np.nan


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("int3", None, ConfigError, "expected one of"),
        ("f32", None, ConfigError, "another row format than its own"),
        ("fp8_scaled", None, ConfigError, "positive float32 scale"),
        ("iq4_nl", None, ConfigError, "expected a kind that can be made .* found iq4_nl"),
        ("q8_0", spoil, InputError, "layer 3, rows from 25 on: .*found nan in row 5, column 5"),
        ("int8", spoil, InputError, "layer 3, rows from 25 on: .*found nan in row 5, column 5"),
        (
            "f16",
            lambda layer, values_Nd: values_Nd.fill(1e6),
            InputError,
            "layer 1, rows from 0 on: .*found 1000000.0",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_an_error_that_leaves_nothing(
    tmp_path, kind, change, error, message
):
    make(tmp_path / "a", change=change)
    with pytest.raises(error, match=message):
        quantize(tmp_path / "a", tmp_path / "b", kind)
    assert os.listdir(tmp_path) == ["a"]


def test_a_name_that_is_taken_is_refused_and_kept(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine").write_text("mine")
    for out in ("b", "a"):
        with pytest.raises(TableError, match="found it taken"):
            quantize(tmp_path / "a", tmp_path / out, "int8")
    assert (tmp_path / "b/mine").read_text() == "mine"
    Table.open(tmp_path / "a").verify()


def test_a_table_that_is_not_sealed_is_not_quantised(tmp_path):
    make(tmp_path / "a")
    Table.open(tmp_path / "a", "w").close()
    with pytest.raises(TableUnsealed):
        quantize(tmp_path / "a", tmp_path / "b", "int8")


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    make(tmp_path / "a")
    write, left = os.pwrite, [3]

    def full(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TableError, match="No space left"):
        quantize(tmp_path / "a", tmp_path / "b", "int8")
    assert os.listdir(tmp_path) == ["a"]


CRASHES = """
import os, signal, sys
from pathlib import Path
from engraphy.table import chunks, quantize as module, table
source, tmp = sys.argv[1], Path(sys.argv[2])
table.MAX_SHARD_BYTES, chunks.CHUNK_VALUES = 8192, 25 * 32

def armed(call):
    def step(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return step

for step in range(400):
    out = tmp / f"{step:03d}" / "t"
    out.parent.mkdir()
    child = os.fork()
    if not child:
        left = [step]
        os.fsync = lambda fd: None
        for name in ("fsync", "pwrite", "replace", "rename", "mkdir"):
            setattr(os, name, armed(getattr(os, name)))
        module.quantize(source, out, "int8")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_a_kill_at_any_step_leaves_nothing_an_unsealed_table_or_the_whole_one(tmp_path):
    parent = make(tmp_path / "a")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CRASHES, tmp_path / "a", tmp_path],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    seen = []
    outs = sorted(path / "t" for path in tmp_path.iterdir() if path.name.isdigit())
    assert 20 < len(outs) < 400
    for out in outs:
        try:
            table = Table.open(out)
        except TableUnsealed:
            seen.append("unsealed")
            with pytest.raises(TableError, match="taken"):  # said, not written over
                quantize(tmp_path / "a", out, "int8")
            shutil.rmtree(out)
        except EngraphyError:
            seen.append("nothing")
            assert not out.exists()
        else:
            seen.append("sealed")
            table.verify()
            assert all(
                np.array_equal(
                    rows_of(table, layer), table.fmt.encode(rows_of(parent, layer).view(np.float32))
                )
                for layer in LAYERS
            )
    assert set(seen) == {"nothing", "unsealed", "sealed"} and seen == sorted(
        seen, key=["nothing", "unsealed", "sealed"].index
    )


# Comparing.


def test_a_table_equals_its_copy_and_the_same_numbers_in_another_format(tmp_path):
    make(tmp_path / "a", "bf16")
    make(tmp_path / "same", "bf16")
    quantize(tmp_path / "a", tmp_path / "wide", "f32")
    for other in ("same", "wide"):
        found = compare(tmp_path / "a", tmp_path / other)
        assert found.equal and found.difference is not None
        assert all(
            each.different == 0 and each.max_abs == 0.0 for each in found.difference.values()
        )
    assert compare(tmp_path / "a", tmp_path / "wide").kinds == ("bf16", "f32")


def test_rows_that_differ_are_counted(tmp_path):
    def change(layer, values_Nd):
        if layer == 3:
            values_Nd[[1, 40]] += 0.5
            values_Nd[41, 7] += 2

    a, b = make(tmp_path / "a"), make(tmp_path / "b", change=change)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (
        found.difference is not None
        and not found.equal
        and found.table_ids == (a.table_id, b.table_id)
    )
    assert found.difference[1].different == 0 and found.difference[3].different == 3
    assert found.difference[3].max_abs == pytest.approx(2)
    assert found.difference[3].mean_abs == pytest.approx((64 * 0.5 + 2) / values(3).size)


def test_rows_of_other_addresses_are_not_compared(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", spec_seed=1)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert not found.equal and found.difference is None
    assert found.address_digests == (a.address_digest, b.address_digest)


def test_rows_that_are_no_numbers_are_counted_and_left_out(tmp_path):
    def change(layer, values_Nd):
        values_Nd[5, 0], values_Nd[6, 0] = np.nan, np.inf

    make(tmp_path / "a", change=change)
    make(tmp_path / "b", change=change)
    make(tmp_path / "whole")
    same, other = (
        compare(tmp_path / "a", tmp_path / "b"),
        compare(tmp_path / "a", tmp_path / "whole"),
    )
    assert same.equal and same.difference is not None and other.difference is not None
    for layer in LAYERS:
        assert (same.difference[layer].different, same.difference[layer].not_finite) == (0, 2)
        assert (other.difference[layer].different, other.difference[layer].not_finite) == (2, 2)
        assert other.difference[layer].max_abs == 0.0


def test_a_reference_of_zeros_has_no_relative_error(tmp_path):
    make(tmp_path / "a", change=lambda layer, values_Nd: values_Nd.fill(0))
    make(tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b").difference
    assert found is not None
    assert (found[1].relative_rms, found[1].mean_cosine, found[1].min_cosine) == (None, None, None)
    assert found[1].max_abs > 0
