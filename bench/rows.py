"""Reading rows of a table in RAM, as bytes and as numbers, beside what a C program reaches.

    python bench/rows.py [--gib 2] [--ids 65536] [--rounds 9] [--threads 1 2] [--json FILE]

Random rows, into reused buffers whose pages have been touched. Each round runs every variant once,
in an order of its own, on ids that were not used lately; medians over the rounds.

Two limits are probed by C loops (probe.c) that share no code with the library. Both try several
distances and targets of prefetching, and stores past the caches or not; the best counts.
`gather` copies the bytes of the rows. `as wide` reads the same rows and writes as many bytes as
their numbers take. A row of int4 becomes eight times as many bytes in float32, so no program that
writes them can be as fast as `gather`: then the share that `as wide` reaches is the goal.

Every byte of the table is an ordinary code and an ordinary part of a scale in every row format, so
one table serves them all.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import claims
import numpy as np
from claims import Claim
from memory_store import MemoryStore
from probe import Probe, huge, machine
from turns import Variant, seconds_by_round

from engraphy import _native
from engraphy.rows import RowFormat, read
from engraphy.store.ram import zeros

ROW_BYTES = (64, 128, 256, 264, 512)
KINDS = ("fp8", "int8", "int4")
DIMS = (64, 128, 256)
OUTPUTS = {"f32": np.float32, "bf16": np.uint16}
PREFETCHES = ((8, False), (16, True), (32, True), (64, True))  # rows ahead, to the second level
GATHER_GOAL = 0.8
NUMBERS_GOAL = 0.7
TOKEN_ROWS = 48  # of one decoded token
CALLS = 200  # of one decoded token, in a row, per round

Seconds = dict[str, list[float]]


def ordinary_memory(size: int) -> np.ndarray:
    """uint8 [size], as a RamStore has it: e4m3 and bf16 codes, ue8m0 and f16 scales, all finite."""
    memory = zeros(1, size).reshape(-1)
    some = np.random.default_rng(0).integers(0x60, 0x78, 1 << 26, np.uint8)
    for first in range(0, size, len(some)):
        memory[first : first + len(some)] = some[: size - first]
    return memory


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all measurements share.

    Attributes:
        memory: The table.
        buffer: Touched memory for outputs and for copies.
        ids: Rows a call.
    """

    probe: Probe
    memory: np.ndarray
    buffer: np.ndarray
    ids: int
    rounds: int

    def out(self, width: int) -> np.ndarray:
        """uint8 [ids, width] of the buffer."""
        return self.buffer[: self.ids * width].reshape(self.ids, width)

    def variants(self, row_bytes: int, runs: dict[str, Callable]) -> dict[str, Variant]:
        """Each run gets fresh ids."""
        rng = np.random.default_rng(1)
        rows = self.memory.size // row_bytes
        return {
            name: Variant(self.ids, lambda: rng.integers(0, rows, self.ids), run)
            for name, run in runs.items()
        }

    def limits(self, name: str, row_bytes: int, width: int, threads: int) -> dict[str, Callable]:
        """The ways of the C program to read rows and write `width` bytes for each."""
        out = self.out(width)

        def limit(ahead: int, second: bool, stream: bool) -> Callable:
            return lambda ids_N: self.probe.widen(
                self.memory, ids_N, row_bytes, out, threads, ahead, second, stream
            )

        streams = (False, True) if width % 64 == 0 else (False,)
        return {
            f"{name} {ahead} {second} {stream}": limit(ahead, second, stream)
            for (ahead, second), stream in itertools.product(PREFETCHES, streams)
        }

    def seconds(self, row_bytes: int, runs: dict[str, Callable]) -> Seconds:
        return seconds_by_round(self.variants(row_bytes, runs), self.rounds, seed=row_bytes)


def best(seconds: Seconds, name: str) -> list[float]:
    """The fastest of the variants whose names begin with this one."""
    return min(
        (values for key, values in seconds.items() if key.startswith(name)), key=statistics.median
    )


def share(limit: list[float], found: list[float]) -> tuple[float, float]:
    """What `found` reaches of a limit, and the standard error of this median."""
    by_round = [a / b for a, b in zip(limit, found, strict=True)]
    error = 1.2533 * statistics.stdev(by_round) / len(by_round) ** 0.5
    return statistics.median(limit) / statistics.median(found), error


def nanoseconds(seconds: list[float], ids: int) -> float:
    """Median time of a row."""
    return statistics.median(seconds) / ids * 1e9


def gathers(bench: Bench, threads: int) -> list[Claim]:
    """Rows as bytes."""
    print(
        f"\nrows as bytes, {threads} thread(s), ns a row\n"
        f"{'bytes':>6}{'C gather':>10}{'gather(out=)':>14}{'of C':>7}{'goal':>6}{'new array':>11}"
    )
    found = []
    for row_bytes in ROW_BYTES:
        store = MemoryStore(bench.memory, row_bytes)
        out = bench.out(row_bytes)
        runs = bench.limits("C", row_bytes, row_bytes, threads)
        runs["out="] = lambda ids_N, store=store, out=out: store.gather(ids_N, out=out)
        runs["new"] = lambda ids_N, store=store: store.gather(ids_N)
        seconds = bench.seconds(row_bytes, runs)
        limit = best(seconds, "C ")
        ratio, error = share(limit, seconds["out="])
        gather, given, new = (
            nanoseconds(values, bench.ids) for values in (limit, seconds["out="], seconds["new"])
        )
        print(
            f"{row_bytes:6}{gather:10.1f}{given:14.1f}{ratio:7.2f}{GATHER_GOAL:6.2f}{new:11.1f}",
            flush=True,
        )
        what = f"gather(out=) of {row_bytes} B rows, {threads} thread(s), of a C gather"
        found.append(Claim(what, ratio, goal=GATHER_GOAL, error=error))
    return found


def numbers(bench: Bench, threads: int, with_plain: bool) -> list[Claim]:
    """Rows as float32 and as bf16. with_plain: beside the plain version, too."""
    native_columns = f"{'plain':>8}{'native':>8}{'ratio':>7}" if with_plain else f"{'native':>8}"
    print(
        f"\nrows as numbers, {threads} thread(s), ns a row\n"
        f"{'rows':>5}{'d':>5}{'out':>6}{native_columns}{'C gather':>10}"
        f"{'of it':>7}{'C as wide':>11}{'of it':>7}{'goal':>6}"
    )
    found = []
    for kind, d in itertools.product(KINDS, DIMS):
        fmt = RowFormat(kind, d)
        store = MemoryStore(bench.memory, fmt.row_bytes)
        runs = bench.limits("gather", fmt.row_bytes, fmt.row_bytes, threads)
        for name, dtype in OUTPUTS.items():
            out_Nd = bench.out(d * np.dtype(dtype).itemsize).view(dtype)

            def native(ids_N: np.ndarray, store=store, fmt=fmt, out_Nd=out_Nd) -> None:
                read(store, ids_N, fmt, out_Nd)

            def plain(ids_N: np.ndarray, native=native) -> None:
                with _native.forced("off"):
                    native(ids_N)

            runs[f"native {name}"] = native
            if with_plain:
                runs[f"plain {name}"] = plain
            runs |= bench.limits(f"wide {name}", fmt.row_bytes, out_Nd.nbytes // bench.ids, threads)
        seconds = bench.seconds(fmt.row_bytes, runs)
        for name in OUTPUTS:
            claim, line = numbers_line(bench.ids, seconds, name)
            what = f"{kind} d = {d} into {name}, {threads} thread(s), of a C gather of its bytes"
            found.append(dataclasses.replace(claim, what=what))
            print(f"{kind:>5}{d:5}{name:>6}{line}", flush=True)
        ratio, error = share(seconds["native f32"], seconds["native bf16"])
        what = f"{kind} d = {d} into bf16, {threads} thread(s), beside into f32"
        found.append(Claim(what, ratio, goal=1.0, error=error))
    return found


def numbers_line(ids: int, seconds: Seconds, name: str) -> tuple[Claim, str]:
    """The claim for one output, and its line of the table: with the plain version if it was run."""
    gather = best(seconds, "gather ")
    wide = best(seconds, f"wide {name} ")
    native = seconds[f"native {name}"]
    plain = seconds.get(f"plain {name}")
    ratio, error = share(gather, native)
    reached, _ = share(gather, wide)
    of_wide, _ = share(wide, native)
    claim = Claim("", ratio, goal=NUMBERS_GOAL, limit=reached, error=error)
    native_columns = f"{nanoseconds(native, ids):8.1f}"
    if plain is not None:
        times = statistics.median(plain) / statistics.median(native)
        native_columns = f"{nanoseconds(plain, ids):8.1f}{native_columns}{times:7.1f}"
    return claim, (
        f"{native_columns}{nanoseconds(gather, ids):10.1f}{ratio:7.2f}"
        f"{nanoseconds(wide, ids):11.1f}{of_wide:7.2f}{claim.effective_goal:6.2f}"
    )


def small_calls(bench: Bench) -> None:
    """What a call costs around its rows: those of one token, in the cache."""
    fmt = RowFormat("fp8", 256)
    store = MemoryStore(bench.memory[: 1 << 24], fmt.row_bytes)
    ids = np.random.default_rng(2).integers(0, store.info.rows, TOKEN_ROWS)
    out = np.zeros((TOKEN_ROWS, fmt.d), np.float32)
    raw = np.zeros((TOKEN_ROWS, fmt.row_bytes), np.uint8)

    def times(call: Callable[[], object]) -> Callable:
        def run(_: object) -> None:
            for _ in range(CALLS):
                call()

        return run

    runs = {
        "rows.read": times(lambda: read(store, ids, fmt, out)),
        "store.gather(out=)": times(lambda: store.gather(ids, out=raw)),
    }
    print(f"\none decoded token: {TOKEN_ROWS} rows of {fmt.row_bytes} bytes, in the cache")
    for name, values in bench.seconds(fmt.row_bytes, runs).items():
        print(f"{name:>20}{statistics.median(values) / CALLS * 1e6:7.2f} us a call")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the table")
    parser.add_argument("--ids", type=int, default=65_536, help="rows a call")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="write the claims to this file")
    options = parser.parse_args()

    where = machine(Path("."))
    print(f"{where['cpu']}, L3 {where['l3']}; native: {_native.reason}")
    print(f"{options.ids} rows a call, a table of {options.gib:g} GiB, {options.rounds} rounds")
    memory = ordinary_memory(int(options.gib * 2**30))
    widest = max(DIMS) * 4
    buffer = huge(options.ids * widest)
    buffer[:] = 1
    bench = Bench(Probe(), memory, buffer, options.ids, options.rounds)
    found: list[Claim] = []
    for threads in options.threads:
        _native.set_threads(threads)
        found += gathers(bench, threads)
        found += numbers(bench, threads, with_plain=threads == options.threads[0])
    small_calls(bench)
    claims.write(options.json, "rows", where, found)


if __name__ == "__main__":
    main()
