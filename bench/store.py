"""What each path of a store reaches, beside the limit of the machine that is probed in the same
run.

    python bench/store.py [--gib 4] [--path DIR] [--peer DIR] [--out FILE]
    python bench/store.py --quick       # seconds, small tables: whether it runs, not how fast anything is

Limits: copies of random rows by a small C program that shares nothing with the library
(bench/probe.c), the best of some distances of prefetching, past the caches or not; reads of random
4 KiB pages of the same files by 1 to 128 threads, O_DIRECT or not. Each round runs every variant
once, in an order of its own, on fresh random ids, so that noise and cold rows meet all alike;
figures are of the medians. Tables are far larger than the caches; nothing else should run.

RAM: `out` is reused, except by nn.Embedding, which has no way to. Probe, nn.Embedding and
index_select read the store's own memory: of two tables of a virtual machine one may be backed by
small pages of its host, which costs half. Cache: each row was read before as often as a cache
counts. Cold: the page cache is emptied of the table before each run, and looked at. Warm: each page
is in the page table of whoever maps the files; probe and numpy have all shards in one piece.
Readers: threads, and processes, that ask for the same hot rows.

Beside it, where it is found, engramdb-python 0.3.0 on the same files (hard links; it takes a
shard's header for rows):

    pip install --no-deps --target DIR engramdb-python==0.3.0     # then --peer DIR

By default 8.7 GiB of memory besides the page cache, 4 GiB on the disk, and at the end 4 GiB in
/dev/shm.
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

CACHED = {264: 0.5, 128: 0.35}  # row size -> what hits are asked to reach of a gather from RAM
PARTS = ("ram", "cache", "disk", "readers")


@dataclass(frozen=True)
class Sizes:
    """gib: of each table; cache_gib: of the rows in a cache; row_sizes: of the gathers from RAM;
    ids: rows a gather; cold, warm: rows a call of the file; calls: of a reader."""

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
    """The parts that need a table on disk, which is removed at the end."""
    found: list[Any] = []
    folder = Path(tempfile.mkdtemp(prefix="engraphy-bench-", dir=options.path))
    try:
        table = store_disk.make_table(folder, int(sizes.gib * 2**30))
        if "disk" in options.parts:
            peer = store_disk.find_peer(options.peer)
            store_disk.check(table, peer)
            found.append(store_disk.cold(probe, table, peer, sizes.cold, threads[-1], sizes.rounds))
            found += [
                store_disk.warm(probe, table, peer, sizes.warm, count, sizes.rounds)
                for count in threads
            ]
        if "readers" in options.parts:
            found += store_readers.readers(probe, table, sizes.calls, sizes.rounds)
            found += store_readers.copies(table, options.pool)
    finally:
        shutil.rmtree(folder)
    return found


def main() -> None:
    options, begun = arguments(), time.monotonic()
    sizes = QUICK if options.quick else Sizes(options.gib)
    sizes = sizes if options.rounds is None else dataclasses.replace(sizes, rounds=options.rounds)
    about, probe = machine(options.path), Probe()
    about |= {
        "torch": torch.__version__,
        "engraphy": engraphy.__version__,
        "native": _native.reason,
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    threads = sorted({1, about["cores"]})
    found: list[Any] = []
    if "ram" in options.parts:
        found += store_ram.ram(
            probe, int(sizes.gib * 2**30), list(sizes.row_sizes), sizes.ids, threads, sizes.rounds
        )
    if "cache" in options.parts:
        found += store_ram.cache(
            int(sizes.cache_gib * 2**30), CACHED, sizes.ids, threads, sizes.rounds
        )
    if {"disk", "readers"} & set(options.parts):
        found += on_disk(probe, sizes, options, threads)
    missed = [text for each in found if isinstance(each, Result) for text in each.missed()]
    print("\nBelow what is asked:\n" + "\n".join(f"- {text}" for text in missed or ["nothing"]))
    print(f"{time.monotonic() - begun:.0f} s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figures = [each.to_json() if isinstance(each, Result) else each for each in found]
        options.out.write_text(
            json.dumps(
                {
                    "machine": about,
                    "sizes": dataclasses.asdict(sizes),
                    "missed": missed,
                    "figures": figures,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
