"""Random damage to tables, and what came of it: a named error, the right rows, or, never, wrong
ones.

    python bench/damage.py [--trials 100000] [--seed 0] [--folder /dev/shm] [--out
    results/damage/trials.json]

Each trial damages one of seven small tables, one a row format, at a random place: before it is
opened, or while it is served. It is then read whole through a random store, with or without the
native core, as bytes and as numbers. Counted are: an error of Engraphy's own at opening, at
reading; the right rows; and for bytes of rows that were changed behind the table's back, which
opening does not look at, rows `served until verified`: `Table.verify` has to report them.

Rows that differ from those written and that `verify` finds nothing wrong with, or that differ
although no byte of a row was changed, are WRONG ROWS; every other exception is an unnamed error;
trials run in a process of their own, since one may die. The exit code is 1 unless there is none of
these. --first N begins at trial N: a trial depends on seed and number alone.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from damages import BEFORE, ROWS, SERVED, Damage, Specimen

from engraphy import _native
from engraphy.addresses.vocab import VocabMap
from engraphy.errors import EngraphyError
from engraphy.memory.prefetch import Prefetcher
from engraphy.rows import RowFormat, read
from engraphy.spec import EngramConfig, HashSpec, LayerSpec
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
LAYERS = (1, 3)
# Kind, d, rows of a head and of a shard.
FORMATS = (
    ("f32", 64, 60, 90),
    ("f16", 32, 30, None),
    ("bf16", 32, 60, 130),
    ("fp8", 64, 40, 64),
    ("fp8_scaled", 32, 40, 90),
    ("int8", 32, 20, None),
    ("int4", 32, 60, 140),
)
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
SECONDS = 60  # a trial takes milliseconds; one that takes so long hangs


@dataclass(frozen=True)
class Told:
    """One trial. what: the exception's name, or where rows differ."""

    trial: int
    kind: str
    way: str
    outcome: str
    what: str


class WrongRows(Exception):
    """Rows that are not those written."""


def make(folder: Path, kind: str, d: int, rows: int, shard_rows: int | None) -> Specimen:
    """A sealed table, the same one before its rows were changed, and another of the same addresses
    and sizes."""
    spec = HashSpec.demo(LAYERS, (2, 3), 2, rows, 50, 0)
    fmt = RowFormat(kind, d, 0.01 if kind == "fp8_scaled" else None)
    config = EngramConfig(spec, LayerSpec(8, spec.columns * d), d)
    rng = np.random.default_rng(rows)

    def fill(table: Table) -> dict[int, np.ndarray]:
        records = {
            layer: fmt.encode(rng.standard_normal((table.rows(layer), d), dtype=np.float32))
            for layer in LAYERS
        }
        for layer, rows_NR in records.items():
            table.write_rows(layer, 0, rows_NR)
        table.seal()
        return records

    def files(path: Path) -> dict[str, bytes]:
        return {
            file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.stat().st_size
        }

    path, other = folder / kind, folder / "other"
    fill(Table.create(path, config, fmt, VocabMap.identity(50), shard_rows=shard_rows))
    before = files(path)
    records = fill(Table.open(path, "w"))
    fill(Table.create(other, config, fmt, VocabMap.identity(50), shard_rows=shard_rows))
    twin = files(other)
    shutil.rmtree(other)
    return Specimen(path, fmt, records, files(path), before, twin)


class Reader:
    """All layers of a table, opened in one way."""

    def __init__(self, way: str, specimen: Specimen) -> None:
        self.specimen, self._stores, self._prefetcher = specimen, {}, None
        try:
            for layer in LAYERS:
                self._stores[layer] = open_store(
                    way.removeprefix("Prefetcher ").format(specimen.path), layer=layer
                )
            if way.startswith("Prefetcher"):
                self._prefetcher = Prefetcher(
                    {layer: (store, self._fmt(store)) for layer, store in self._stores.items()},
                    limit=1 << 20,
                )
        except BaseException:
            self.close()
            raise

    def check(self, rng: np.random.Generator) -> None:
        """Read every row, in random order, some of them twice. Raises WrongRows, and what reading
        raises."""
        ids = {
            layer: rng.permutation(np.r_[np.arange(len(rows)), rng.integers(0, len(rows), 16)])
            for layer, rows in self.specimen.records.items()
        }
        if self._prefetcher is not None:
            found = self._prefetcher.submit(
                {layer: ids_N[None, :, None] for layer, ids_N in ids.items()}
            ).wait()
            for layer, ids_N in ids.items():
                self._compare(layer, ids_N, None, found[layer].numpy()[0])
            return
        for layer, store in self._stores.items():
            ids_N, fmt = ids[layer], self._fmt(store)
            numbers = read(store, ids_N, fmt, np.full((len(ids_N), fmt.d), np.nan, np.float32))
            raw = np.full((len(ids_N), store.info.row_bytes), 0xA5, np.uint8)
            self._compare(layer, ids_N, store.gather(ids_N, out=raw), numbers)

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
        for store in self._stores.values():
            store.close()

    def _fmt(self, store: RowStore) -> RowFormat:
        fmt = store.info.format
        assert fmt is not None
        return fmt

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


def before_opening(
    way: str, specimen: Specimen, damage: Damage, rng: np.random.Generator
) -> tuple[str, str]:
    """Damage, open, read, verify. Returns outcome and what."""
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
    """Open, read all or nothing, damage, read several times: each time the right rows or an error."""
    reader, errors, different = Reader(way, specimen), [], None
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
    """What rows that were handed out without an error are worth."""
    try:
        Table.open(specimen.path).verify()
        reported = None
    except EngraphyError as error:
        reported = type(error).__name__
    if reported is None and specimen.rows_changed():
        return "WRONG ROWS", "verify reports nothing of rows that were changed"
    if different is None:
        return "right rows", f"verify: {reported}" if reported else ""
    if damage.kind in ROWS and reported is not None:
        return "served until verified", reported
    return "WRONG ROWS", str(different)


def run(trial: int, seed: int, specimens: list[Specimen]) -> Told:
    rng = np.random.default_rng((seed, trial))
    specimen, way = specimens[rng.integers(len(specimens))], str(rng.choice(WAYS))
    served = rng.random() < 0.3
    damage = (SERVED if served else BEFORE)[rng.integers(len(SERVED if served else BEFORE))]
    engine = "auto" if _native.core is not None and rng.random() < 0.8 else "off"
    kind = f"{damage.kind}{', while served' if served else ''}"
    try:
        with _native.forced(engine):
            outcome, what = (while_served if served else before_opening)(way, specimen, damage, rng)
    except Exception as error:
        outcome, what = "unnamed error", f"{type(error).__name__}: {error}"
    finally:
        specimen.restore()
    return Told(trial, kind, f"{way}{'' if engine == 'auto' else ', plain'}", outcome, what)


def work(first: int, last: int, seed: int, specimens: list[Specimen], pipe: int) -> None:
    """In a process of its own: one line for each trial."""
    with os.fdopen(pipe, "w") as file:
        for trial in range(first, last):
            file.write(json.dumps(vars(run(trial, seed, specimens))) + "\n")
            file.flush()


def results(first: int, last: int, seed: int, specimens: list[Specimen]) -> Iterator[Told]:
    """What came of each trial, those too that a process did not survive."""
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
                    yield Told(**json.loads(line))
                    first += 1
        if first < last:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            yield Told(
                first, "?", "?", "process died", f"status {os.waitstatus_to_exitcode(status)}"
            )
            first += 1
            for specimen in specimens:
                specimen.restore(all_of_it=True)
        else:
            os.waitpid(child, 0)


def table(title: str, told: list[Told], key: str) -> str:
    """Counts of outcomes, a line for each value of `key`."""
    names = sorted({getattr(each, key) for each in told})
    counts = Counter((getattr(each, key), each.outcome) for each in told)
    width = max(map(len, [*names, title]))
    lines = [f"{title:{width}}" + "".join(f"{outcome:>{len(outcome) + 2}}" for outcome in OUTCOMES)]
    for name in [*names, "all"]:
        cells = [
            sum(1 for each in told if each.outcome == outcome)
            if name == "all"
            else counts[name, outcome]
            for outcome in OUTCOMES
        ]
        lines.append(
            f"{name:{width}}"
            + "".join(
                f"{cell or '':>{len(outcome) + 2}}"
                for cell, outcome in zip(cells, OUTCOMES, strict=True)
            )
        )
    return "\n".join(lines)


def main() -> None:
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
    options = parser.parse_args()
    ids = np.random.default_rng(options.seed)
    secrets.token_hex = lambda nbytes=None: ids.bytes(
        nbytes or 16
    ).hex()  # the same tables for the same seed
    os.fsync = lambda fd: None  # nobody pulls the plug here
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        specimens = [make(Path(folder), *sizes) for sizes in FORMATS]
        told = list(results(options.first, options.first + options.trials, options.seed, specimens))
    print(
        f"native: {_native.reason}\n{len(told)} trials, seed {options.seed}, {time.monotonic() - begun:.0f} s\n"
    )
    print(table("damage", told, "kind") + "\n\n" + table("read through", told, "way"))
    errors = Counter(each.what for each in told if each.outcome.startswith("error"))
    print("\nerrors: " + ", ".join(f"{name} {count}" for name, count in errors.most_common()))
    bad = [each for each in told if each.outcome in BAD]
    for each in bad[:20]:
        print(
            f"--seed {options.seed} --first {each.trial} --trials 1: {each.outcome}, {each.kind}, {each.way}: "
            f"{each.what}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        kinds = {
            kind: Counter(each.outcome for each in told if each.kind == kind)
            for kind in {t.kind for t in told}
        }
        options.out.write_text(
            json.dumps(
                {
                    "trials": len(told),
                    "first": options.first,
                    "seed": options.seed,
                    "native": _native.reason,
                    "outcomes": {
                        name: sum(each.outcome == name for each in told) for name in OUTCOMES
                    },
                    "by_damage": dict(sorted(kinds.items())),
                    "errors": dict(errors),
                },
                indent=1,
            )
            + "\n"
        )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads that have ended
    main()
