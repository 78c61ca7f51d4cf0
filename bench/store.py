"""The speed of each path of a store, beside the limit of the machine, which is probed in the same
run.

    python bench/store.py [--gib 4] [--path DIR] [--peer DIR] [--out FILE]
    python bench/store.py --quick       # seconds, small tables: shows that it runs, not how fast

Limits: copies of random rows by a small C program that shares nothing with the library
(bench/probe.c), the best of several prefetch distances, with and without the caches; reads of
random 4 KiB pages of the same files by 1 to 128 threads, with and without O_DIRECT. Each round runs
every variant once, in an order of its own, on fresh random ids, so that noise and cold rows meet
all alike. Figures are medians. Tables are far larger than the caches. Nothing else should run.

RAM: `out` is reused, except by nn.Embedding, which has no such argument. Probe, nn.Embedding and
index_select read the store's own memory: on a virtual machine, the host may back one of two tables
by small pages, which halves the speed. Cache: each row was read before, as often as a cache counts.
Cold: before each run the table is dropped from the page cache, and that is checked. Warm: each page
is in the page table of the process that maps the files; probe and numpy have all shards in one
piece. Readers: threads, and processes, that ask for the same hot rows.

If engramdb-python 0.3.0 is installed, it reads the same files (hard links; it takes a shard's
header for rows):

    pip install --no-deps --target DIR engramdb-python==0.3.0     # then --peer DIR

By default this takes 8.7 GiB of memory besides the page cache, 4 GiB on the disk, and at the end
4 GiB in /dev/shm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import passive  # noqa: F401
import store_disk
import store_ram
import store_readers
import torch
from probe import Probe, machine
from turns import Result

import engraphy
from engraphy import _native

CACHED = {264: 0.5, 128: 0.35}  # row size -> the share of a gather from RAM that hits should reach
PARTS = ("ram", "cache", "disk", "readers")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    Attributes:
        gib: GiB of each table.
        cache_gib: GiB of the rows in a cache.
        row_sizes: Bytes of a row, in gathers from RAM.
        ids: Rows of a gather.
        cold: Rows a call of the file that is not in the page cache.
        warm: Rows a call of the file that is.
        calls: Calls of each reader.
        rounds: Runs of each variant.
    """

    gib: float
    cache_gib: float = 1.0
    row_sizes: tuple[int, ...] = (64, 128, 256, 264, 512)
    ids: int = 1 << 18
    cold: int = 16_384
    warm: int = 1 << 16
    calls: int = 1000
    rounds: int = 7


QUICK = Sizes(0.125, 0.03, (128, 264), 1 << 14, 1024, 1 << 13, 200, 3)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=4.0, help="size of each table")
    parser.add_argument(
        "--path", type=Path, default=Path(tempfile.gettempdir()), help="a folder of the disk"
    )
    parser.add_argument(
        "--pool", type=Path, default=Path("/dev/shm"), help="a folder in memory, for a pool"
    )
    parser.add_argument(
        "--peer", type=Path, help="where engramdb-python was installed with pip --target"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    return parser.parse_args()


def on_disk(
    probe: Probe, sizes: Sizes, options: argparse.Namespace, threads: list[int]
) -> list[Any]:
    """Runs the parts that need a table on disk, and removes it at the end."""
    figures: list[Any] = []
    folder = Path(tempfile.mkdtemp(prefix="engraphy-bench-", dir=options.path))
    try:
        table = store_disk.make_table(folder, int(sizes.gib * 2**30))
        if "disk" in options.parts:
            peer = store_disk.find_peer(options.peer)
            store_disk.check(table, peer)
            figures.append(
                store_disk.cold(probe, table, peer, sizes.cold, threads[-1], sizes.rounds)
            )
            for count in threads:
                figures.append(store_disk.warm(probe, table, peer, sizes.warm, count, sizes.rounds))
        if "readers" in options.parts:
            figures += store_readers.readers(probe, table, sizes.calls, sizes.rounds)
            figures += store_readers.copies(table, options.pool)
    finally:
        shutil.rmtree(folder)
    return figures


def main() -> None:
    options = arguments()
    begun = time.monotonic()
    sizes = QUICK if options.quick else Sizes(options.gib)
    if options.rounds is not None:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    about = machine(options.path)
    probe = Probe()
    about |= {
        "torch": torch.__version__,
        "engraphy": engraphy.__version__,
        "native": _native.reason,
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    threads = sorted({1, about["cores"]})
    figures: list[Any] = []
    if "ram" in options.parts:
        table_bytes = int(sizes.gib * 2**30)
        row_sizes = list(sizes.row_sizes)
        figures += store_ram.ram(probe, table_bytes, row_sizes, sizes.ids, threads, sizes.rounds)
    if "cache" in options.parts:
        cache_bytes = int(sizes.cache_gib * 2**30)
        figures += store_ram.cache(cache_bytes, CACHED, sizes.ids, threads, sizes.rounds)
    if {"disk", "readers"} & set(options.parts):
        figures += on_disk(probe, sizes, options, threads)
    missed = [line for figure in figures if isinstance(figure, Result) for line in figure.missed()]
    print("\nBelow what is asked:\n" + "\n".join(f"- {line}" for line in missed or ["nothing"]))
    print(f"{time.monotonic() - begun:.0f} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = {
            "machine": about,
            "sizes": dataclasses.asdict(sizes),
            "missed": missed,
            "figures": [
                figure.to_json() if isinstance(figure, Result) else figure for figure in figures
            ],
        }
        options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
