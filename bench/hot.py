"""A hot index: building it beside sorting its keys, looking it up beside a C program's loads.

    python bench/hot.py [--keys 1000000 10000000] [--orders 2] [--rounds 5] [--json FILE]

Keys are random n-grams of 99,092 ids, in random order. They are sorted three ways: by std::sort and
by a radix sort of the n ids of 32 bits, and, bigrams only, as 64-bit integers by numpy (which on a
CPU with AVX-512 sorts those in vectors, and nothing wider). The look-ups are a million hot n-grams
and a million others, in random order; the C program does as many dependent random loads for each,
in memory of the same sizes. Building and sorting take turns, and so do look-ups and loads; medians
over the rounds. One thread, except where two are named. The plain version runs once, on at most a
million keys. 100 million keys take 9 GB and two minutes: --keys 100000000 --rounds 1.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from claims import Claim, write
from probe import Probe, machine

from engraphy import _native
from engraphy.addresses import HotIndex, Ngrams

IDS = 99_092
ASKED = 1_000_000
PLAIN = 1_000_000


def some_ngrams(count: int, order: int, seed: int) -> np.ndarray:
    """int32 [count, order], distinct, in random order."""
    rng = np.random.default_rng(seed)
    if order == 2:
        # A product with an odd number leaves numbers below 2**33 distinct; all of them are bigrams.
        numbers = np.arange(count, dtype=np.uint64) + np.uint64(seed)
        mixed = numbers * np.uint64(0x9E3779B97F4A7C15) % np.uint64(2**33)
        mixed ^= mixed >> np.uint64(17)
        return ids_of(mixed.astype(np.int64))
    found = rng.integers(0, IDS, (count, order), np.int32)
    found[:, -1] = np.arange(count) % IDS  # with the one before: distinct
    found[:, -2] = np.arange(count) // IDS
    return rng.permutation(found)


def ids_of(packed: np.ndarray) -> np.ndarray:
    """int32 [N, 2] of numbers below 99,092 ** 2."""
    ids = np.empty((len(packed), 2), np.int32)
    ids[:, 0], ids[:, 1] = np.divmod(packed, IDS)
    return ids


class Sorts:
    """Sorts of n-grams in C++."""

    def __init__(self) -> None:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise SystemExit("expected a C++ compiler for the sorts, found none")
        source = Path(__file__).with_name("hot_sorts.cpp")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "sorts.so"
            command = [compiler, "-O3", "-march=native", "-std=c++17", "-shared", "-fPIC"]
            subprocess.run([*command, str(source), "-o", str(library)], check=True)
            self._sort = ctypes.CDLL(str(library)).sort_ngrams
        self._sort.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
        self._sort.restype = ctypes.c_double

    def seconds(self, ids: np.ndarray, by_digits: bool) -> float:
        copied = ids.copy()
        return self._sort(copied.ctypes.data, *ids.shape, by_digits)


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def loads_of(index: HotIndex, order: int) -> float:
    """Lines that a hot n-gram costs on average, before its record."""
    sizes = index.part(order).perfect.sizes
    lines = index.part(order).perfect.blocks_BW
    before = lines[np.cumsum(sizes)[:-1], 0].astype(np.int64)  # keys of all levels before
    keys_of_level = np.diff([0, *before.tolist(), index.spec.slots])
    return float((keys_of_level * np.arange(1, len(sizes) + 1)).sum() / index.spec.slots)


def measure(count: int, order: int, rounds: int, probe: Probe, sorts: Sorts) -> list[Claim]:
    ids = some_ngrams(count, order, 0)
    ngrams = Ngrams({order: ids}, "0" * 64)
    times: dict[str, list[float]] = {"build": [], "std::sort": [], "radix sort": []}
    index = HotIndex.build(ngrams)
    for _ in range(rounds):
        times["build"].append(seconds(lambda: HotIndex.build(ngrams)))
        times["std::sort"].append(sorts.seconds(ids, False))
        times["radix sort"].append(sorts.seconds(ids, True))
        if order == 2:
            packed = ids[:, 0].astype(np.int64) * IDS + ids[:, 1]
            times.setdefault("numpy's sort", []).append(seconds(packed.sort))
    _native.set_threads(2)
    both = seconds(lambda: HotIndex.build(ngrams))
    _native.set_threads(1)
    looks = look_ups(index, ids, rounds, probe)
    medians = {name: statistics.median(values) for name, values in (times | looks).items()}
    built = medians["build"]
    part = index.part(order)
    print(
        f"\n{count:,} keys of {order} ids, {index.bytes / count:.1f} bytes a key "
        f"({part.perfect.blocks_BW.nbytes * 8 / count:.2f} bits of them levels), "
        f"{loads_of(index, order):.2f} lines and a record a look-up"
    )
    print(f"build {built:.3f} s ({count / built / 1e6:.1f} M keys/s), with 2 threads {both:.3f} s")
    for name in list(times)[1:]:
        print(f"  {built / medians[name]:.2f} times {name}, {medians[name]:.3f} s")
    for name in looks:
        value = medians[name]
        print(f"{name:8}{ASKED / value / 1e6:8.1f} M/s{medians['loads'] / value:8.2f} of the loads")
    if count <= PLAIN:
        hot = ids[np.random.default_rng(1).integers(0, count, ASKED)]
        plain(ngrams, hot, built, medians["hot"])
    what = f"hot index of {count:,} keys of {order} ids"
    claims = [
        Claim(f"{what}: build beside {name}", built / medians[name], sense="at most")
        for name in list(times)[1:]
    ]
    claims[0] = replace(claims[0], goal=3.0)
    found = medians["loads"] / medians["hot"]
    return [*claims, Claim(f"{what}: look-ups beside as many loads in C", found, goal=0.5)]


def look_ups(index: HotIndex, ids: np.ndarray, rounds: int, probe: Probe) -> dict[str, list[float]]:
    """Seconds of look-ups, and of as many loads."""
    order = ids.shape[1]
    rng = np.random.default_rng(1)
    hot = ids[rng.integers(0, len(ids), ASKED)]
    others = rng.integers(0, IDS, (ASKED, order), np.int32)
    part = index.part(order)
    loads = loads_of(index, order)
    small = np.random.default_rng(2).integers(0, 2**32, part.perfect.blocks_BW.size, np.uint32)
    large = np.random.default_rng(3).integers(0, 2**32, part.records_NR.size, np.uint32)
    starts = np.random.default_rng(4).integers(0, 2**32, ASKED, np.uint32)
    out = np.empty(ASKED, np.uint32)
    times: dict[str, list[float]] = {"hot": [], "others": [], "loads": []}
    for _ in range(3 * rounds):
        times["hot"].append(seconds(lambda: index.slots_of(hot)))
        times["others"].append(seconds(lambda: index.slots_of(others)))
        times["loads"].append(probe.chase(small, large, starts, loads, out))
    return times


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
    parser.add_argument("--orders", type=int, nargs="+", default=[2], help="2, 3 or 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _native.compiled()
    _native.set_threads(1)
    where = machine(Path(tempfile.gettempdir()))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    probe = Probe()
    claims: list[Claim] = []
    sorts = Sorts()
    for count in options.keys:
        for order in options.orders:
            claims += measure(count, order, options.rounds, probe, sorts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\nmost memory {peak / 2**20:.2f} GiB")
    write(options.json, "hot", where, claims)


if __name__ == "__main__":
    main()
