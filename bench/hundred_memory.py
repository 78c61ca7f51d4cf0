"""The memory that a model with a very large table takes, and what the disk gives.

Part of bench/hundred_billion.py.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hundred_table import TABLE
from hundred_ways import FIXED, PERCENTS, Ways
from hundred_workload import Workload
from probe import PAGE, Probe

import engraphy
from engraphy import Table
from engraphy.table.shards import HEADER_BYTES

MEMORY, DISK = "memory.json", "disk.json"
PROMPTS = 3  # of a prefill, while memory is watched
TOKENS = 16  # decoded
READS = {1: 1000, 128: 20_000}  # depth -> pages


def measure_memory(folder: Path, workload: Workload, threads: int) -> None:
    """Writes the most memory of a process that serves, for each way, to memory.json."""
    path = folder / MEMORY
    if path.exists():
        return
    most: dict[str, Any] = {}
    for name in (FIXED, *(f"disk-{percent:g}" for percent in PERCENTS)):
        # A new process each, since what is freed does not always go back to the system.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            most[name] = pool.submit(serve_and_watch, folder, name, threads).result()
    for name, taken in most.items():
        percent = 0.0 if name == FIXED else float(name.split("-")[1])
        layers = workload.touched if percent else ()
        taken["budget"] = sum(workload.budget(layer, percent) for layer in layers)
        taken["grown"] = taken["bytes"] - most[FIXED]["bytes"]
    path.write_text(json.dumps(most, indent=1))


@torch.no_grad()
def serve_and_watch(folder: Path, name: str, threads: int) -> dict[str, int]:
    """Serves prompts and decodes tokens at the largest batch of each. Returns the most memory."""
    torch.set_num_threads(threads)
    engraphy.set_threads(threads)
    workload = Workload.load(folder)
    served = Ways(folder, workload).serve([name])[name]
    most = 0
    for phase in ("prefill", "decode"):
        cells = [cell for cell in workload.sizes.cells if cell.phase == phase]
        cell = max(cells, key=lambda cell: cell.batch)
        ids = torch.from_numpy(workload.tokens(cell))
        if phase == "prefill":
            prompts = list(ids[:PROMPTS])
        else:
            prompts = [ids[0, :, : cell.prompt], *ids[0, :, cell.prompt :].split(1, 1)[:TOKENS]]
        for number, ids_BT in enumerate(prompts):
            if phase == "prefill" or not number:
                served.restart()
            served.forward(ids_BT.contiguous())
            most = max(most, own_memory())
    served.close()
    return {"bytes": most}


def own_memory() -> int:
    """Bytes of anonymous memory and of private file pages of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return max(kib["Anonymous"], private) * 1024


def probe_disk(folder: Path, workload: Workload) -> None:
    """Writes what a C program reads of the touched pages, one and 128 reads under way, directly."""
    path = folder / DISK
    if path.exists():
        return
    table = Table.open(folder / TABLE)
    layer = table.layers[0]
    files = [os.open(s.path, os.O_RDONLY | os.O_DIRECT) for s in table.shards(layer)]
    rng = np.random.default_rng(0)
    probe = Probe()
    found = {}
    for depth, reads in READS.items():
        rows_N = rng.choice(workload.touched[layer], reads)
        shard_N, local_N = np.divmod(rows_N, table.shard_rows)
        page_N = (HEADER_BYTES + local_N * table.row_bytes) // PAGE
        size_N = np.array([shard.size for shard in table.shards(layer)])[shard_N]
        page_N = np.minimum(page_N, size_N // PAGE - 1)  # the last one may be cut
        seconds = probe.pread(np.array(files)[shard_N], page_N * PAGE, depth)
        found[f"reads a second, {depth} under way"] = reads / seconds
    for file in files:
        os.close(file)
    table.close()
    path.write_text(json.dumps(found, indent=1))
