"""Random damage to tables, and the outcome: a named error, the right rows, or wrong rows, which
must never be.

    python bench/damage.py [--trials 100000] [--seed 0] [--folder /dev/shm] [--out
    results/damage/trials.json]

Each trial damages one of seven small tables, one for each row format, at a random place: before it
is opened, or while it is served. It is then read whole through a random store, with or without the
native core, as bytes and as numbers. These outcomes are counted:

- an error of Engraphy's own, at opening or at reading;
- the right rows;
- rows `served until verified`: bytes of rows were changed behind the table's back. Opening does not
  look at them, and `Table.verify` has to report them;
- WRONG ROWS: rows differ from those written, and `verify` reports nothing or no byte of a row was
  changed;
- an unnamed error: any other exception;
- a process that died: trials run in a process of their own.

The exit code is 1 if there is any of the last three. --first N begins at trial N: a trial depends
only on its seed and its number.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from damages import BEFORE, FORMATS, LAYERS, ROWS, SERVED, Damage, Specimen, make

from engraphy import _native
from engraphy.errors import EngraphyError
from engraphy.memory.prefetch import Prefetcher
from engraphy.rows import RowFormat, read
from engraphy.store import RowStore, open_store
from engraphy.table import Table

OUTCOMES = (
    "error at opening",
    "error at reading",
    "right rows",
    "served until verified",
    "WRONG ROWS",
    "unnamed error",
    "process died",
)
BAD = OUTCOMES[4:]
WAYS = (
    "file:{}?read=mmap",
    "file:{}?read=pread&threads=2",
    "file:{}?direct=1&threads=2",
    "file:{}?populate=1",
    "pool:{}",
    "file:{}?read=mmap&cache=64KiB",
    "file:{}?read=pread&cache=1MiB",
    "file:{}?direct=1&cache=16KiB",
    "Prefetcher file:{}?read=mmap",
    "Prefetcher file:{}?read=pread",
    "Prefetcher pool:{}",
)
SECONDS = 60  # a trial takes milliseconds; after so long it hangs


@dataclass(frozen=True)
class Outcome:
    """One trial.

    Attributes:
        trial: Its number.
        kind: Kind of damage.
        way: How the table was read.
        outcome: One of OUTCOMES.
        what: The exception's name, or where rows differ.
    """

    trial: int
    kind: str
    way: str
    outcome: str
    what: str


class WrongRows(Exception):
    """Rows that are not those written."""


class Reader:
    """All layers of a table, opened in one way."""

    def __init__(self, way: str, specimen: Specimen) -> None:
        self.specimen = specimen
        self._stores: dict[int, RowStore] = {}
        self._prefetcher: Prefetcher | None = None
        url = way.removeprefix("Prefetcher ").format(specimen.path)
        try:
            for layer in LAYERS:
                self._stores[layer] = open_store(url, layer=layer)
            if way.startswith("Prefetcher"):
                layers = {layer: (store, _fmt(store)) for layer, store in self._stores.items()}
                self._prefetcher = Prefetcher(layers, limit=1 << 20)
        except BaseException:
            self.close()
            raise

    def check(self, rng: np.random.Generator) -> None:
        """Reads every row, in random order, some of them twice. Raises WrongRows if they differ,
        and any error of reading."""
        ids = {}
        for layer, rows in self.specimen.records.items():
            again_N = rng.integers(0, len(rows), 16)
            ids[layer] = rng.permutation(np.r_[np.arange(len(rows)), again_N])
        if self._prefetcher is not None:
            ids_BTC = {layer: ids_N[None, :, None] for layer, ids_N in ids.items()}
            rows_BTE = self._prefetcher.submit(ids_BTC).wait()
            for layer, ids_N in ids.items():
                self._compare(layer, ids_N, None, rows_BTE[layer].numpy()[0])
            return
        for layer, store in self._stores.items():
            ids_N = ids[layer]
            fmt = _fmt(store)
            numbers = read(store, ids_N, fmt, np.full((len(ids_N), fmt.d), np.nan, np.float32))
            raw = np.full((len(ids_N), store.info.row_bytes), 0xA5, np.uint8)
            self._compare(layer, ids_N, store.gather(ids_N, out=raw), numbers)

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        for store in self._stores.values():
            store.close()

    def _compare(
        self, layer: int, ids_N: np.ndarray, raw_NR: np.ndarray | None, numbers_Nd: np.ndarray
    ) -> None:
        expected_NR = self.specimen.records[layer][ids_N]
        if raw_NR is not None and raw_NR.tobytes() != expected_NR.tobytes():
            raise WrongRows(
                f"layer {layer}: {(raw_NR != expected_NR).any(axis=1).sum()} rows of bytes"
            )
        if numbers_Nd.tobytes() != self.specimen.fmt.decode(expected_NR).tobytes():
            raise WrongRows(f"layer {layer}: rows of numbers")


def _fmt(store: RowStore) -> RowFormat:
    fmt = store.info.format
    assert fmt is not None
    return fmt


def before_opening(
    way: str, specimen: Specimen, damage: Damage, rng: np.random.Generator
) -> tuple[str, str]:
    """Damages, opens, reads and verifies a table. Returns `outcome` and `what` of an Outcome."""
    damage.apply(specimen, rng)
    try:
        reader = Reader(way, specimen)
    except EngraphyError as error:
        return "error at opening", type(error).__name__
    try:
        reader.check(rng)
        different = None
    except EngraphyError as error:
        return "error at reading", type(error).__name__
    except WrongRows as error:
        different = error
    finally:
        reader.close()
    return judged(specimen, damage, different)


def while_served(
    way: str, specimen: Specimen, damage: Damage, rng: np.random.Generator
) -> tuple[str, str]:
    """Opens a table, reads all of it or nothing, damages it and reads it twice. Returns `outcome`
    and `what` of an Outcome."""
    reader = Reader(way, specimen)
    errors: list[str] = []
    different = None
    try:
        if rng.random() < 0.7:
            reader.check(rng)
        damage.apply(specimen, rng)
        for _ in range(2):
            try:
                reader.check(rng)
            except EngraphyError as error:
                errors.append(type(error).__name__)
            except WrongRows as error:
                different = error
    finally:
        reader.close()
    if errors and different is None:
        return "error at reading", errors[0]
    return judged(specimen, damage, different)


def judged(specimen: Specimen, damage: Damage, different: WrongRows | None) -> tuple[str, str]:
    """Outcome of rows that were handed out without an error."""
    try:
        Table.open(specimen.path).verify()
        reported = None
    except EngraphyError as error:
        reported = type(error).__name__
    if reported is None and specimen.rows_changed():
        return "WRONG ROWS", "verify does not report rows that were changed"
    if different is None:
        return "right rows", f"verify: {reported}" if reported else ""
    if damage.kind in ROWS and reported is not None:
        return "served until verified", reported
    return "WRONG ROWS", str(different)


def run(trial: int, seed: int, specimens: list[Specimen]) -> Outcome:
    """Runs one trial and puts the table right again."""
    rng = np.random.default_rng((seed, trial))
    specimen = specimens[rng.integers(len(specimens))]
    way = str(rng.choice(WAYS))
    served = rng.random() < 0.3
    damages = SERVED if served else BEFORE
    attempt = while_served if served else before_opening
    damage = damages[rng.integers(len(damages))]
    plain = _native.core is None or rng.random() >= 0.8
    kind = f"{damage.kind}, while served" if served else damage.kind
    try:
        with _native.forced("off" if plain else "auto"):
            outcome, what = attempt(way, specimen, damage, rng)
    except Exception as error:
        outcome = "unnamed error"
        what = f"{type(error).__name__}: {error}"
    finally:
        specimen.restore()
    return Outcome(trial, kind, f"{way}, plain" if plain else way, outcome, what)


def work(first: int, last: int, seed: int, specimens: list[Specimen], pipe: int) -> None:
    """Runs trials in a process of its own and writes one line for each."""
    with os.fdopen(pipe, "w") as file:
        for trial in range(first, last):
            file.write(json.dumps(vars(run(trial, seed, specimens))) + "\n")
            file.flush()


def results(first: int, last: int, seed: int, specimens: list[Specimen]) -> Iterator[Outcome]:
    """The outcome of each trial, also if the process did not survive it."""
    while first < last:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            try:
                work(first, last, seed, specimens, writing)
            finally:
                os._exit(0)  # nothing of the parent's is cleaned up
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as file:
            rest = b""
            while select.select([file], [], [], SECONDS)[0] and (chunk := file.read(1 << 16)):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield Outcome(**json.loads(line))
                    first += 1
        if first < last:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            what = f"status {os.waitstatus_to_exitcode(status)}"
            yield Outcome(first, "?", "?", "process died", what)
            first += 1
            for specimen in specimens:
                specimen.restore(all_of_it=True)
        else:
            os.waitpid(child, 0)


def table(title: str, outcomes: list[Outcome], key: str) -> str:
    """Counts of outcomes, a line for each value of `key`."""
    names = sorted({getattr(outcome, key) for outcome in outcomes})
    counts = Counter((getattr(outcome, key), outcome.outcome) for outcome in outcomes)
    totals = Counter(outcome.outcome for outcome in outcomes)
    width = max(map(len, [*names, title]))
    lines = [_line(title, width, OUTCOMES)]
    for name in names:
        lines.append(_line(name, width, [counts[name, outcome] or "" for outcome in OUTCOMES]))
    lines.append(_line("all", width, [totals[outcome] or "" for outcome in OUTCOMES]))
    return "\n".join(lines)


def _line(name: str, width: int, cells: Sequence[object]) -> str:
    columns = zip(cells, OUTCOMES, strict=True)
    return f"{name:{width}}" + "".join(f"{cell:>{len(outcome) + 2}}" for cell, outcome in columns)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where small tables are made; by default where temporary files go",
    )
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    ids = np.random.default_rng(options.seed)
    # The same tables for the same seed, and no flush: nothing here is to survive a power cut.
    secrets.token_hex = lambda nbytes=None: ids.bytes(nbytes or 16).hex()
    os.fsync = lambda fd: None
    begun = time.monotonic()
    last = options.first + options.trials
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        specimens = [make(Path(folder), *sizes) for sizes in FORMATS]
        outcomes = list(results(options.first, last, options.seed, specimens))
    seconds = time.monotonic() - begun
    print(f"native: {_native.reason}")
    print(f"{len(outcomes)} trials, seed {options.seed}, {seconds:.0f} s\n")
    print(table("damage", outcomes, "kind") + "\n\n" + table("read through", outcomes, "way"))
    errors = Counter(item.what for item in outcomes if item.outcome.startswith("error"))
    print("\nerrors: " + ", ".join(f"{name} {count}" for name, count in errors.most_common()))
    bad = [item for item in outcomes if item.outcome in BAD]
    for item in bad[:20]:
        print(
            f"--seed {options.seed} --first {item.trial} --trials 1: {item.outcome}, {item.kind}, "
            f"{item.way}: {item.what}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = summary(outcomes, errors, options)
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    sys.exit(1 if bad else 0)


def summary(
    outcomes: list[Outcome], errors: Counter[str], options: argparse.Namespace
) -> dict[str, Any]:
    """What --out writes."""
    by_damage: dict[str, Counter[str]] = {}
    for item in outcomes:
        by_damage.setdefault(item.kind, Counter())[item.outcome] += 1
    totals = Counter(item.outcome for item in outcomes)
    return {
        "trials": len(outcomes),
        "first": options.first,
        "seed": options.seed,
        "native": _native.reason,
        "outcomes": {name: totals[name] for name in OUTCOMES},
        "by_damage": dict(sorted(by_damage.items())),
        "errors": dict(errors),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads that have ended
    main()
