"""Reading rows as numbers: the plain version and the native kernel side by side, and the cost of
moving the bytes alone.

    python bench/rows.py [--gib 2] [--ids 65536] [--rounds 9]

One thread, random rows of a table in RAM, into a reused buffer. Each round runs every variant once,
on ids that were not used lately, so that noise and cold rows meet all of them alike; medians over
the rounds. Two limits are probed in the same run. `take` copies the same records, undecoded, into a
reused buffer. `copy` copies as many bytes as `out` has; the kernel's bytes read and written are
compared with its speed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from address import at, medians

from engraphy import _native
from engraphy.rows import RowFormat, read
from engraphy.store import RamStore

KINDS = ("f32", "bf16", "fp8", "int8", "int4")
DIMS = (64, 128, 256)
OUTPUTS = {"f32": np.float32, "bf16": np.uint16}
TOKEN_ROWS = 48  # of one decoded token
CALLS = 200  # of one decoded token, in a row, per round


def filled(fmt: RowFormat, table_bytes: int) -> RamStore:
    """A store that repeats 4096 encoded rows."""
    rows = max(1, table_bytes // fmt.row_bytes)
    some = fmt.encode(np.random.default_rng(0).standard_normal((4096, fmt.d), dtype=np.float32))
    store = RamStore(rows, fmt.row_bytes)
    for first in range(0, rows, len(some)):
        ids = np.arange(first, min(first + len(some), rows))
        store.scatter(ids, some[: len(ids)])
    return store


def measure(
    store: RamStore, fmt: RowFormat, out: np.ndarray, levels: dict[str, str], rounds: int
) -> dict[str, float]:
    """Median seconds of each variant for len(out) rows."""
    rng = np.random.default_rng(1)
    info = store.info
    batches = itertools.cycle([rng.integers(0, info.rows, len(out)) for _ in range(31)])
    raw = np.zeros((len(out), info.row_bytes), np.uint8)
    copy = np.zeros_like(out)
    variants: dict[str, Callable[[], object]] = {
        name: at(level, lambda: read(store, next(batches), fmt, out))
        for name, level in levels.items()
    }
    with store.reading() as shards:
        assert shards is not None
        table = shards[0]
    variants["take"] = lambda: np.take(table, next(batches), axis=0, out=raw, mode="clip")
    variants["copy"] = lambda: np.copyto(copy, out)
    return medians(variants, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of each table")
    parser.add_argument("--ids", type=int, default=65_536, help="rows a call")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    levels = {"plain": "off"}
    if _native.core is not None:
        levels["native"] = _native.level()
    last = list(levels)[-1]

    print(f"native: {_native.reason}")
    print(
        f"\n{options.ids} rows a call, tables of {options.gib:g} GiB, {options.rounds} rounds; "
        f"ns a row; of take, of copy: what {last} reaches of that limit"
    )
    print(
        f"{'rows':>5}{'d':>5}{'out':>6}{'plain':>9}{last:>9}{'ratio':>7}"
        f"{'take':>8}{'of take':>9}{'copy GB/s':>11}{'of copy':>9}"
    )
    for kind, d in itertools.product(KINDS, DIMS):
        fmt = RowFormat(kind, d)
        store = filled(fmt, int(options.gib * 2**30))
        for name, dtype in OUTPUTS.items():
            out = np.zeros((options.ids, d), dtype)
            seconds = measure(store, fmt, out, levels, options.rounds)
            plain, best, take = (
                seconds[key] / options.ids * 1e9 for key in ("plain", last, "take")
            )
            copied = out.nbytes / seconds["copy"] / 1e9
            moved = (options.ids * fmt.row_bytes + out.nbytes) / 2 / seconds[last] / 1e9
            print(
                f"{kind:>5}{d:5}{name:>6}{plain:9.1f}{best:9.1f}{plain / best:7.1f}"
                f"{take:8.1f}{take / best:9.1%}{copied:11.1f}{moved / copied:9.1%}",
                flush=True,
            )
        store.close()

    fmt = RowFormat("fp8", 256)
    store = filled(fmt, 2**24)
    out = np.zeros((TOKEN_ROWS, 256), np.float32)
    ids = np.random.default_rng(2).integers(0, store.info.rows, TOKEN_ROWS)
    calls: dict[str, Callable[[], object]] = {
        name: at(level, lambda: read(store, ids, fmt, out), CALLS) for name, level in levels.items()
    }
    print(f"\none decoded token: {TOKEN_ROWS} rows of {fmt.row_bytes} bytes, in the cache")
    for name, value in medians(calls, options.rounds).items():
        print(f"{name:>8}{value / CALLS * 1e6:9.2f} us a call")


if __name__ == "__main__":
    main()
