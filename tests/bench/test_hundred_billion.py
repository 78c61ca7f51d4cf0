"""bench/hundred_billion.py at its smallest size: rows, resuming, cleaning, refusals."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engraphy import Table, open_store
from engraphy.store.pread import PreadStore

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
DOCS = str(ROOT / "docs")


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    import hundred_table

    return hundred_table.prepare(tmp_path_factory.mktemp("workload") / "made", "small", DOCS)


@pytest.fixture
def folder(tmp_path, workload):
    """A folder of the benchmark, without a table."""
    import hundred_table

    made = tmp_path / "made"
    hundred_table.write_state(
        _new(made), {"size": "small", "data": DOCS, "digest": None, "written": []}
    )
    workload.save(made)
    return made


def _new(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_run_measures_reports_and_does_nothing_twice(tmp_path):
    folder = tmp_path / "made"
    command = [sys.executable, str(BENCH / "hundred_billion.py"), str(folder), "--size", "small"]
    command += ["--data", DOCS, "--ways", "fixed,ram,sync-cold,warm-10"]
    command += ["--only", "table,prefill-1,decode-2,report", "--json", str(tmp_path / "out.json")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    rounds = (folder / "rounds.jsonl").read_text()
    subprocess.run(command, capture_output=True, text=True, check=True)

    assert "0.03e9 parameters, 0.03 GB of files" in first.stdout  # before anything is made
    assert "--clean removes it" in first.stdout
    assert (folder / "rounds.jsonl").read_text() == rounds
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["cells"]) == 2
    found = {row["way"]: row for row in result["cells"]["decode, batch 2, 1 threads"]}
    assert set(found) == {"fixed", "ram", "sync-cold", "warm-10"}
    assert all(row["rounds"] == 2 for row in found.values())
    assert found["warm-10"]["hits"] > 0
    assert any("fixed" in claim["what"] for claim in result["claims"])


def test_every_row_of_the_text_is_written_and_no_other(folder, workload):
    import hundred_table

    hundred_table.make_table(folder, workload)
    for layer, rows_N in workload.touched.items():
        store = open_store(f"file:{folder / 'table'}", layer=layer)
        assert (store.gather(rows_N)[:, :256] != 0).any(axis=1).all()
        others_M = np.setdiff1d(np.arange(store.info.rows), rows_N)
        assert not store.gather(others_M).any()


def test_a_forward_reads_only_rows_that_are_written(folder, workload):
    import hundred_table
    import hundred_ways
    import torch

    from engraphy.memory import Trace

    hundred_table.make_table(folder, workload)
    way = hundred_ways.Ways(folder, workload).serve(["ram"])["ram"]
    for cell in workload.sizes.cells:
        for ids_BT in torch.from_numpy(workload.tokens(cell)):
            trace = Trace()
            way.memory.eval().lookup(ids_BT, trace=trace)
            for layer, ids_BTC in trace.row_ids.items():
                assert np.isin(ids_BTC, workload.touched[layer]).all()


def test_a_run_that_was_killed_writes_only_what_is_missing(folder, workload, monkeypatch):
    import hundred_table

    scatter, written = PreadStore.scatter, []

    def dying(store, ids_N, rows_NR):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(ids_N)
        scatter(store, ids_N, rows_NR)

    monkeypatch.setattr(PreadStore, "scatter", dying)
    with pytest.raises(KeyboardInterrupt):
        hundred_table.make_table(folder, workload)
    assert len(hundred_table.read_state(folder)["written"]) == 2

    second = []
    monkeypatch.setattr(
        PreadStore,
        "scatter",
        lambda store, ids_N, rows_NR: (second.append(ids_N), scatter(store, ids_N, rows_NR)),
    )
    hundred_table.make_table(folder, workload)
    assert sum(map(len, written + second)) == workload.rows
    table = Table.open(folder / "table")
    assert table.verify().shards == sum(len(table.shards(layer)) for layer in table.layers)


def test_a_table_that_was_made_is_not_made_again(folder, workload, monkeypatch):
    import hundred_table

    hundred_table.make_table(folder, workload)
    table_id = Table.open(folder / "table").table_id
    monkeypatch.setattr(Table, "seal", None)
    hundred_table.make_table(folder, workload)
    assert Table.open(folder / "table").table_id == table_id


def test_rows_of_other_addresses_are_refused(folder, workload):
    import hundred_table

    hundred_table.make_table(folder, workload)
    touched = {layer: rows_N[1:] for layer, rows_N in workload.touched.items()}
    with pytest.raises(SystemExit, match="computes other addresses"):
        hundred_table.make_table(folder, dataclasses.replace(workload, touched=touched))


def test_a_full_disk_is_an_error_before_anything_is_written(folder, workload, monkeypatch):
    import hundred_table

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(SystemExit, match="expected 0.02 GB free on the disk, found 0.00"):
        hundred_table.make_table(folder, workload)
    assert not (folder / "table").exists()


def test_a_file_system_without_holes_is_an_error(folder, workload, monkeypatch):
    import hundred_table

    monkeypatch.setattr(hundred_table, "taken_by_hole", lambda _: 1 << 26)
    with pytest.raises(SystemExit, match="expected a file system with sparse files"):
        hundred_table.make_table(folder, workload)
    assert not (folder / "table").exists()


def test_what_is_said_to_be_taken_is_what_is_taken(folder, workload):
    import hundred_table

    hundred_table.make_table(folder, workload)
    needed = hundred_table.space_of(workload)
    files = list((folder / "table").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) == needed.logical
    taken = hundred_table.left(folder / "table").real
    assert abs(taken - needed.real) < 0.05 * needed.real + 200_000


def test_clean_removes_the_folder_and_refuses_others(folder, workload, tmp_path):
    import hundred_table

    hundred_table.make_table(folder, workload)
    assert hundred_table.clean(folder).real > 0
    assert not folder.exists()
    other = _new(tmp_path / "other")
    (other / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit, match="found no state.json"):
        hundred_table.clean(other)
    with pytest.raises(SystemExit, match="expected a new or empty folder"):
        hundred_table.prepare(other, "small", DOCS)
    assert (other / "mine.txt").exists()
