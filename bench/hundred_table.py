"""A table far larger than the disk: sparse shards, in which the rows of one workload are written.

Part of bench/hundred_billion.py. Everything lies in one folder:

    state.json      whose table this is, and the shards that are written
    workload.*      the text and the rows that it addresses
    rows-LAYER.npy  the rows of a layer that the text addresses, close together
    table/          the table
    rounds.jsonl    what was timed
    memory.json     what memory was taken

A run that was killed goes on where it ended: state.json is replaced after each shard.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hundred_workload import DIM, SIZES, Workload, make_workload
from probe import PAGE

from engraphy import Table
from engraphy.rows.init import normal_rows
from engraphy.store.pread import PreadStore
from engraphy.system.files import publish_file, write_file
from engraphy.table.shards import HEADER_BYTES

STATE = "state.json"
TABLE = "table"
STD = 0.02
WRITERS = 32  # threads
_PROBE = 1 << 26  # bytes of a hole
_CHUNK = 1 << 14  # rows


@dataclass(frozen=True)
class Space:
    """Bytes of a folder: as its files say, and on the disk."""

    logical: int
    real: int

    def __str__(self) -> str:
        return f"{self.logical / 1e9:,.2f} GB of files, {self.real / 1e9:,.2f} GB on the disk"


def prepare(folder: Path, size: str, data: str) -> Workload:
    """The workload of a folder, made there if it is new. Raises SystemExit for other folders."""
    state = read_state(folder)
    if state is None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SystemExit(f"{folder}: expected a new or empty folder, found other files in it")
        write_state(folder, {"size": size, "data": data, "digest": None, "written": []})
    elif (state["size"], state["data"]) != (size, data):
        raise SystemExit(
            f"{folder}: expected the table of --size {size} --data {data}, found that of --size "
            f"{state['size']} --data {state['data']}; give another folder, or --clean this one"
        )
    if (folder / "workload.json").exists():
        return Workload.load(folder)
    workload = make_workload(SIZES[size], data)
    workload.save(folder)
    return workload


def make_table(folder: Path, workload: Workload) -> None:
    """Makes the table, or what is missing of it.

    Raises SystemExit if the disk has too little space, or the file system knows no sparse files.
    """
    state = read_state(folder) or {}
    digest = workload.digest()
    if state["digest"] not in (None, digest):
        raise SystemExit(
            f"{folder}: expected rows of digest {digest}, found a table of {state['digest']}: this "
            "version computes other addresses; --clean the folder"
        )
    if state.get("sealed"):
        return
    needed = space_of(workload)
    print(
        f"{folder / TABLE}: {workload.config.table_parameters() / 1e9:.2f}e9 parameters, {needed}"
    )
    check_space(folder, needed)
    state["digest"] = digest
    write_state(folder, state)
    path = folder / TABLE
    if (path / "engram.json").exists():
        table = Table.open(path, "w")
    else:
        table = Table.create(
            path,
            workload.config,
            workload.format,
            workload.vocab,
            shard_rows=workload.sizes.shard_rows,
        )
    with_rows = 0
    for layer in table.layers:
        with_rows += _write_layer(folder, table, layer, workload, state)
    print(f"{path}: {with_rows:,} rows written now; the seal hashes all {needed.logical:,} bytes")
    table.seal()
    table.close()
    write_state(folder, {**state, "sealed": True})


def _write_layer(
    folder: Path, table: Table, layer: int, workload: Workload, state: dict[str, Any]
) -> int:
    """Writes the touched rows of the shards that are not written yet, in the order of rows.
    Returns how many."""
    store = PreadStore(table, layer, WRITERS)
    rows_N = workload.touched[layer]
    rows_NR = dense_rows(folder, workload, layer)
    written = 0
    for number, shard in enumerate(table.shards(layer)):
        if shard.name in state["written"]:
            continue
        first = number * table.shard_rows
        begin, end = np.searchsorted(rows_N, [first, first + shard.rows])
        ids_n = rows_N[begin:end]
        store.scatter(ids_n, np.ascontiguousarray(rows_NR[begin:end]))
        shard.sync()
        state["written"].append(shard.name)
        write_state(folder, state)
        written += len(ids_n)
    store.close()
    return written


def dense_rows(folder: Path, workload: Workload, layer: int) -> np.ndarray:
    """The touched rows of a layer in the order of their ids, uint8 [N, row_bytes]. They are made
    once, and kept beside the table: from there they come into memory in a second."""
    path = folder / f"rows-{layer}.npy"
    if not path.exists():
        rows_N = workload.touched[layer]
        rows_NR = np.empty((len(rows_N), workload.format.row_bytes), np.uint8)
        for first in range(0, len(rows_N), _CHUNK):
            ids_n = rows_N[first : first + _CHUNK]
            values_nd = normal_rows(0, layer, ids_n, DIM, STD)
            rows_NR[first : first + _CHUNK] = workload.format.encode(values_nd)
        with publish_file(path) as file:
            np.save(file, rows_NR)
    return np.load(path)


def space_of(workload: Workload) -> Space:
    """What the table will take: each page that has a touched row, and each shard's header."""
    config = workload.config
    row_bytes = workload.format.row_bytes
    shard_rows = workload.sizes.shard_rows or ((1 << 30) - HEADER_BYTES) // row_bytes
    pages = shards = 0
    for layer, rows_N in workload.touched.items():
        shard_N, local_N = np.divmod(rows_N, shard_rows)
        begin_N = HEADER_BYTES + local_N * row_bytes
        ends = np.stack([begin_N // PAGE, (begin_N + row_bytes - 1) // PAGE])
        pages += len(np.unique(shard_N * (1 << 40) + ends))
        shards += -(-config.hash.row_count(layer) // shard_rows)
    logical = config.table_bytes(row_bytes) + shards * HEADER_BYTES
    return Space(logical, (pages + shards) * PAGE)


def check_space(folder: Path, needed: Space) -> None:
    """Raises SystemExit unless the table fits on the disk as a sparse one."""
    missing = needed.real - left(folder).real
    free = shutil.disk_usage(folder).free
    if free < missing * 1.05:
        raise SystemExit(
            f"{folder}: expected {missing * 1.05 / 1e9:.2f} GB free on the disk, found "
            f"{free / 1e9:.2f}; give a folder on another disk"
        )
    taken = taken_by_hole(folder)
    if taken > _PROBE // 2:
        raise SystemExit(
            f"{folder}: expected a file system with sparse files, found that a hole of {_PROBE} "
            f"bytes takes {taken} bytes: the table would take {needed.logical / 1e9:.0f} GB"
        )


def taken_by_hole(folder: Path) -> int:
    """Bytes that a file of one hole takes on the disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(_PROBE)
        return os.fstat(file.fileno()).st_blocks * 512


def left(folder: Path) -> Space:
    """What a folder takes now."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return Space(sum(f.st_size for f in found), sum(f.st_blocks * 512 for f in found))


def clean(folder: Path) -> Space:
    """Removes everything of the benchmark. Returns what it took.

    Raises SystemExit if the folder is not one of this benchmark.
    """
    if read_state(folder) is None:
        raise SystemExit(f"{folder}: expected a folder of this benchmark, found no {STATE} in it")
    space = left(folder)
    shutil.rmtree(folder)
    return space


def read_state(folder: Path) -> dict[str, Any] | None:
    """What state.json says; None if there is none."""
    path = folder / STATE
    return json.loads(path.read_text()) if path.exists() else None


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Replaces state.json in one step."""
    write_file(folder / STATE, json.dumps(state))


def check_open_files(count: int) -> None:
    """Lets the process open so many shards. Raises SystemExit if the system refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft >= needed:
        return
    if hard < needed:
        raise SystemExit(
            f"expected a limit of {needed} open files (ulimit -Hn), found {hard}: give fewer --ways"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
