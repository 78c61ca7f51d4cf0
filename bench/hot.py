"""A hot index: building it beside sorting its keys, looking it up beside a C program's loads.

    python bench/hot.py [--keys 1000000 10000000] [--rounds 5] [--json FILE]

Keys are random bigrams of 99,092 ids, in random order. The sort is numpy's, of the same bigrams as
one 64-bit integer each. The look-ups are a million hot bigrams and a million others, in random
order; the C program does as many dependent random loads for each, in memory of the same sizes.
Building and sorting take turns, and so do look-ups and loads; medians over the rounds. One thread,
except where two are named. The plain version runs once, on at most a million keys.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from claims import Claim, write
from probe import Probe, machine

from engraphy import _native
from engraphy.addresses import HotIndex, Ngrams

IDS = 99_092
ASKED = 1_000_000
PLAIN = 1_000_000


def bigrams(count: int, seed: int) -> np.ndarray:
    """int64 [count], distinct, in random order."""
    rng = np.random.default_rng(seed)
    found = np.unique(rng.integers(0, IDS * IDS, int(count * 1.02) + 1000))
    rng.shuffle(found)
    return found[:count]


def ids_of(packed: np.ndarray) -> np.ndarray:
    """int32 [N, 2]."""
    ids = np.empty((len(packed), 2), np.int32)
    ids[:, 0], ids[:, 1] = np.divmod(packed, IDS)
    return ids


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def loads_of(index: HotIndex) -> float:
    """Lines that a hot n-gram costs on average, before its record."""
    sizes = index.part(2).perfect.sizes
    lines = index.part(2).perfect.blocks_BW
    before = lines[np.cumsum(sizes)[:-1], 0].astype(np.int64)  # keys of all levels before
    keys_of_level = np.diff([0, *before.tolist(), index.spec.slots])
    return float((keys_of_level * np.arange(1, len(sizes) + 1)).sum() / index.spec.slots)


def measure(count: int, rounds: int, probe: Probe) -> list[Claim]:
    packed = bigrams(count, 0)
    ids = ids_of(packed)
    ngrams = Ngrams({2: ids}, "0" * 64)
    rng = np.random.default_rng(1)
    hot = ids[rng.integers(0, count, ASKED)]
    others = ids_of(rng.integers(0, IDS * IDS, ASKED))
    build: list[float] = []
    sort: list[float] = []
    index = HotIndex.build(ngrams)
    for _ in range(rounds):
        build.append(seconds(lambda: HotIndex.build(ngrams)))
        sort.append(seconds(lambda: np.sort(packed)))
    _native.set_threads(2)
    both = seconds(lambda: HotIndex.build(ngrams))
    _native.set_threads(1)
    loads = loads_of(index)
    part = index.part(2)
    small = np.random.default_rng(2).integers(0, 2**32, part.perfect.blocks_BW.size, np.uint32)
    large = np.random.default_rng(3).integers(0, 2**32, part.records_NR.size, np.uint32)
    starts = np.random.default_rng(4).integers(0, 2**32, ASKED, np.uint32)
    out = np.empty(ASKED, np.uint32)
    times: dict[str, list[float]] = {"hot": [], "others": [], "loads": []}
    for _ in range(3 * rounds):
        times["hot"].append(seconds(lambda: index.slots_of(hot)))
        times["others"].append(seconds(lambda: index.slots_of(others)))
        times["loads"].append(probe.chase(small, large, starts, loads, out))
    medians = {name: statistics.median(values) for name, values in times.items()}
    built, sorted_ = statistics.median(build), statistics.median(sort)
    print(
        f"\n{count:,} keys, {index.bytes / count:.1f} bytes a key "
        f"({part.perfect.blocks_BW.nbytes * 8 / count:.2f} bits of them levels), "
        f"{loads:.2f} lines and a record a look-up"
    )
    print(
        f"build {built:.3f} s ({count / built / 1e6:.1f} M keys/s), with 2 threads {both:.3f} s; "
        f"sort {sorted_:.3f} s: {built / sorted_:.2f} times it"
    )
    for name, value in medians.items():
        print(f"{name:8}{ASKED / value / 1e6:8.1f} M/s{medians['loads'] / value:8.2f} of the loads")
    if count <= PLAIN:
        plain(ngrams, hot, built, medians["hot"])
    return [
        Claim(
            f"hot index of {count:,} keys: build beside a sort",
            built / sorted_,
            goal=3.0,
            sense="at most",
        ),
        Claim(
            f"hot index of {count:,} keys: look-ups beside as many dependent loads in C",
            medians["loads"] / medians["hot"],
            goal=0.5,
        ),
    ]


def plain(ngrams: Ngrams, hot: np.ndarray, built: float, looked: float) -> None:
    with _native.forced("off"):
        build = seconds(lambda: HotIndex.build(ngrams))
        index = HotIndex.build(ngrams)
        look = seconds(lambda: index.slots_of(hot))
    print(
        f"plain: build {build:.2f} s ({build / built:.0f} times native), "
        f"{ASKED / look / 1e6:.2f} M look-ups/s ({look / looked:.0f} times slower)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _native.compiled()
    _native.set_threads(1)
    where = machine(Path(tempfile.gettempdir()))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    probe = Probe()
    claims: list[Claim] = []
    for count in options.keys:
        claims += measure(count, options.rounds, probe)
    write(options.json, "hot", where, claims)


if __name__ == "__main__":
    main()
