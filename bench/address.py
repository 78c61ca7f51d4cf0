"""Row addresses: the plain version and the native kernel side by side, and the cost of writing the
result alone.

    python bench/address.py [--rounds 15] [--json FILE]

One thread. The variants take turns, so that noise meets all of them alike; medians over the rounds.
A turn is one call, which finds the caches as another variant left them, or several calls in a row,
as in use. The limit is a fill of the same buffer: addresses cannot be computed faster than they are
written.
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
from probe import machine

from engraphy import _native
from engraphy.addresses.addresser import Addresser
from engraphy.addresses.vocab import VocabMap
from engraphy.spec import HashSpec

BATCH = 8
TOKENS = 2048
RAW_IDS = 129_280
COMPRESSED_IDS = 99_092
CALLS = 200  # single tokens in a row, per turn
IN_A_ROW = 8  # batches in a row, per turn


def production_like() -> Addresser:
    """Two layers, 2- and 3-grams, 8 heads: 16 columns a layer. The vocabulary map is as large as
    the released one."""
    rng = np.random.default_rng(0)
    table = np.concatenate(
        [np.arange(COMPRESSED_IDS), rng.integers(0, COMPRESSED_IDS, size=RAW_IDS - COMPRESSED_IDS)]
    )
    vocab = VocabMap(rng.permutation(table))
    return Addresser(HashSpec.demo((1, 14), (2, 3), 8, 2_262_400, len(vocab), pad_id=2), vocab)


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant, the variants taking turns; one round before them is not
    counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def at(level: str, call: Callable[[], object], times: int = 1) -> Callable[[], None]:
    """`call` on one kernel; switching it costs microseconds, so short calls are repeated."""

    def run() -> None:
        with _native.forced(level):
            for _ in range(times):
                call()

    return run


def batches(addresser: Addresser, levels: dict[str, str], times: int, rounds: int) -> list[Claim]:
    """Calls for a batch, `times` in a row. levels: name -> kernel."""
    ids = np.random.default_rng(1).integers(0, RAW_IDS, size=(BATCH, TOKENS))
    out = np.empty((2, BATCH, TOKENS, addresser.spec.columns), dtype=np.int64)
    calls: dict[str, Callable[[], object]] = {
        "fill of the buffer": at("auto", lambda: out.fill(7), times)
    }
    for name, level in levels.items():
        calls[f"{name}, into out="] = at(level, lambda: addresser.all_rows(ids, out=out), times)
        calls[f"{name}, new array"] = at(level, lambda: addresser.all_rows(ids), times)
    print(
        f"\nB={BATCH} T={TOKENS}, 2 layers x 16 columns, "
        f"{out.nbytes / 2**20:.0f} MiB of row ids, {rounds} rounds, {times} in a row"
    )
    seconds = {name: value / times for name, value in medians(calls, rounds).items()}
    fill = seconds["fill of the buffer"]
    plain = seconds["plain, into out="]
    print(f"{'':24}{'ms':>10}{'M tokens/s':>12}{'x plain':>10}{'of limit':>10}")
    for name, value in seconds.items():
        print(
            f"{name:24}{value * 1e3:10.3f}{ids.size / value / 1e6:12.2f}{plain / value:10.1f}"
            f"{fill / value:10.1%}"
        )
    print(f"fill: {out.nbytes / fill / 1e9:.1f} GB/s")
    claims = []
    for target in ("into out=", "new array"):
        if _native.core is not None:
            ratio = plain / seconds[f"{_native.level()}, {target}"]
            what = f"addresses of {ids.size} tokens, {times} in a row, {target}, beside plain"
            claims.append(Claim(what, ratio, goal=10.0, limit=plain / fill))
    return claims


def one_token(addresser: Addresser, levels: dict[str, str], rounds: int) -> None:
    """Calls for one decoded token."""
    ids = np.random.default_rng(1).integers(0, RAW_IDS, size=(1, 3))
    history, token = ids[:, :2].copy(), ids[:, 2:].copy()
    out = np.empty((2, 1, 1, addresser.spec.columns), dtype=np.int64)
    calls: dict[str, Callable[[], object]] = {}
    for name, level in levels.items():
        calls[f"{name}, into out="] = at(
            level, lambda: addresser.all_rows(token, history, out=out), times=CALLS
        )
        calls[f"{name}, new array"] = at(
            level, lambda: addresser.all_rows(token, history), times=CALLS
        )
    print("\none decoded token (B=1 T=1, with history)")
    seconds = medians(calls, rounds)
    print(f"{'':24}{'us':>10}{'x plain':>12}")
    for name, value in seconds.items():
        print(f"{name:24}{value / CALLS * 1e6:10.2f}{seconds['plain, into out='] / value:12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="writes what is claimed to this file")
    options = parser.parse_args()
    addresser = production_like()
    levels = {"plain": "off"}
    if _native.core is not None:
        levels[_native.level()] = _native.level()
    print(f"native: {_native.reason}")
    claims: list[Claim] = []
    for times in (1, IN_A_ROW):
        claims += batches(addresser, levels, times, options.rounds)
    one_token(addresser, levels, options.rounds)
    write(options.json, "address", machine(Path(tempfile.gettempdir())), claims)


if __name__ == "__main__":
    main()
