"""Rows that are pinned from n-gram counts, beside a row cache of equal bytes: hit rates on real
text, and tokens a second.

    python bench/hot_rows.py --books FOLDER [--text books python ...] [--rounds 3] [--json FILE]

The layout is DeepSeek-V4.1's (its tokenizer, orders 2 to 4, 8 heads, rows of 264 bytes), one of its
two layers with half of each budget; all 24 rows of a token are read. N-grams are counted on some
text (`count_ngrams`), their rows ranked (`frequent_rows`), and pinned (`warm(pin=True)`). Another
100,000 tokens are read to warm the caches, then the 50,000 that count: books that were held out,
or Python's library, of which the rest is counted. `python, books counted` pins the rows of books,
and reads code. One stream reads document after document; eight read one token each in turn.

- `cache` is CacheStore (S3-FIFO in sets of 16), warm from what was read before.
- `pinned` is the fixed set. It does not depend on what was read before.
- `half` is a cache of half the bytes behind a fixed set of the other half.
- `start` are the first 20,000 tokens after a start: the cache empty, or filled from the counts.

Tokens a second: calls of one token of each stream, from a store that takes 0, 1 or 10 microseconds
for each row that it reads, busy meanwhile: about memory, memory of another host, and a disk that
reads 100,000 pages a second. Ways and stores take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from claims import Claim, write
from hit_rate import interleaved
from hit_rate_texts import Layout, _library_texts, layout
from probe import Probe, machine

from engraphy import _native
from engraphy.addresses import frequent_rows
from engraphy.addresses.counting import count_ngrams
from engraphy.data.books import Books, read_books
from engraphy.data.tokens import encode
from engraphy.store import CacheStore, RowStore, StoreInfo, warm

SIZES = (64, 256, 1024)  # MiB for both layers
TIMED = 1024
LAYERS = 2
STREAMS = (1, 8)
BEFORE = 100_000  # tokens that warm the caches
COUNTED = 50_000  # tokens that count
START = 20_000
TOP = 4_000_000  # n-grams of an order
CALL = 512  # tokens of a call where nothing is timed
TIERS = (0, 1, 10)  # microseconds a row
SPAN = 2000  # tokens that are timed together
WAYS = ("cache", "pinned", "half")


class Made(RowStore):
    """Rows that are made when they are read, in a given time for each."""

    def __init__(self, rows: int, row_bytes: int, probe: Probe) -> None:
        super().__init__()
        self._info = StoreInfo("made", rows, row_bytes, writable=False)
        self._probe = probe
        self.microseconds = 0.0

    @property
    def info(self) -> StoreInfo:
        return self._info

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        out_NR[:, :8] = ids_N[:, None].view(np.uint8)
        if self.microseconds:
            self._probe.pause(self.microseconds * 1e-6 * len(ids_N))

    def _scatter(self, ids_N: np.ndarray, rows_NR: np.ndarray) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Reads:
    """Row ids of a text, int64 [tokens, 24], stream after stream: those before, and those that
    count."""

    before_TC: np.ndarray
    counted_TC: np.ndarray


def documents(made: Layout, texts: Sequence[str], tokens: int) -> list[np.ndarray]:
    """The first documents that have so many tokens together."""
    found: list[np.ndarray] = []
    total = 0
    for text in texts:
        if total >= tokens:
            break
        ids = encode(made.tokenizer, [text])[0][: tokens - total]
        if len(ids):
            found.append(ids)
            total += len(ids)
    return found


def ranked(made: Layout, docs: list[np.ndarray]) -> np.ndarray:
    """Rows of the first layer by the counts of n-grams, most first."""
    begins = np.cumsum([0, *map(len, docs)])[:-1]
    ngrams = count_ngrams(made.addresser, np.concatenate(docs), TOP, begins=begins, memory=2 << 30)
    for order, share in ngrams.coverage().items():
        print(f"  order {order}: {len(ngrams.ids[order]):,} n-grams, {share:.1%} of the text")
    most = 3 * (SIZES[-1] << 20) // LAYERS // made.row_bytes
    return frequent_rows(made.addresser, ngrams, made.addresser.spec.layer_ids[0], most)


def rows_of(made: Layout, docs: list[np.ndarray], streams: int) -> np.ndarray:
    """Row ids in the order in which streams read them."""
    ids = np.concatenate(docs).astype(np.int64)
    starts = np.zeros(len(ids), bool)
    lengths = np.array([len(document) for document in docs])
    starts[np.cumsum(lengths) - lengths] = True
    layer = made.addresser.spec.layer_ids[0]
    rows_TC = made.addresser.rows(ids[None], layer, starts=starts[None])[0]
    return rows_TC[interleaved(lengths, streams)]


def pieces(docs: list[np.ndarray], streams: int) -> list[np.ndarray]:
    """Documents cut so that there are some for every stream."""
    most = max(1, sum(map(len, docs)) // (4 * streams))
    return [ids[at : at + most] for ids in docs for at in range(0, len(ids), most)]


def store_of(way: str, behind: Made, size: int, order_n: np.ndarray) -> CacheStore:
    budget = (size << 20) // LAYERS
    if way == "cache":
        return CacheStore(behind, budget)
    if way == "half":
        outer = CacheStore(CacheStore(behind, budget // 2), budget // 2)
    else:
        outer = CacheStore(behind, budget)
    warm(outer, order_n[: 3 * outer.capacity], pin=True)
    return outer


def read_all(store: RowStore, rows_TC: np.ndarray, call: int) -> None:
    out = np.empty((call * rows_TC.shape[1], store.info.row_bytes), np.uint8)
    for first in range(0, len(rows_TC), call):
        ids = rows_TC[first : first + call].reshape(-1)
        store.gather(ids, out=out[: len(ids)])


def misses(store: CacheStore) -> int:
    """Rows that were read behind all caches."""
    inner = store.inner
    return (inner.stats.misses if isinstance(inner, CacheStore) else store.stats.misses) or 0


def hit_rate(store: CacheStore, rows_TC: np.ndarray) -> float:
    before = misses(store)
    read_all(store, rows_TC, CALL)
    return 1 - (misses(store) - before) / rows_TC.size


def hit_rates(reads: Reads, behind: Made, order_n: np.ndarray) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for size in SIZES:
        for way in WAYS:
            store = store_of(way, behind, size, order_n)
            if way != "pinned":
                read_all(store, reads.before_TC, CALL)
            found.setdefault(way, []).append(hit_rate(store, reads.counted_TC))
        start_TC = reads.counted_TC[:START]
        cold = store_of("cache", behind, size, order_n)
        found.setdefault("start, empty cache", []).append(hit_rate(cold, start_TC))
        filled = store_of("cache", behind, size, order_n)
        warm(filled, order_n[: filled.capacity])
        found.setdefault("start, cache filled from counts", []).append(hit_rate(filled, start_TC))
        fixed = store_of("pinned", behind, size, order_n)
        found.setdefault("start, pinned", []).append(hit_rate(fixed, start_TC))
    return found


def tokens_a_second(
    reads: Reads, behind: Made, order_n: np.ndarray, streams: int, rounds: int
) -> dict[tuple[str, int], float]:
    stores = {way: store_of(way, behind, TIMED, order_n) for way in WAYS}
    for store in stores.values():
        read_all(store, reads.before_TC, CALL)
    taken: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds * len(TIERS)):
        tier = TIERS[number % len(TIERS)]
        rows_TC = reads.counted_TC[number * SPAN : (number + 1) * SPAN]
        for way, store in stores.items():
            behind.microseconds = tier
            begun = time.perf_counter()
            read_all(store, rows_TC, streams)
            taken.setdefault((way, tier), []).append(time.perf_counter() - begun)
            behind.microseconds = 0.0
    return {key: SPAN / statistics.median(values) for key, values in taken.items()}


def measure(
    name: str,
    made: Layout,
    docs: dict[str, list[np.ndarray]],
    order_n: np.ndarray,
    rounds: int,
    parts: list[str],
) -> list[Claim]:
    claims: list[Claim] = []
    rows = made.addresser.spec.row_count(made.addresser.spec.layer_ids[0])
    behind = Made(rows, made.row_bytes, Probe())
    for streams in STREAMS:
        before = rows_of(made, pieces(docs["before"], streams), streams)
        counted = rows_of(made, pieces(docs["counted"], streams), streams)
        reads = Reads(before, counted)
        if "rates" in parts:
            found = hit_rates(reads, behind, order_n)
            print(f"\n{name}, {streams} streams: hit rate in %, by MiB for both layers\n")
            print(
                "| rows kept | " + " | ".join(map(str, SIZES)) + " |\n|---|" + "---|" * len(SIZES)
            )
            for way, rates in found.items():
                print(
                    f"| {way} | " + " | ".join(f"{100 * rate:.1f}" for rate in rates) + " |",
                    flush=True,
                )
        if "speeds" not in parts:
            continue
        speeds = tokens_a_second(reads, behind, order_n, streams, rounds)
        print(f"\n{name}, {streams} streams: thousand tokens a second, {TIMED} MiB\n")
        print("| microseconds a row | " + " | ".join(map(str, TIERS)) + " |")
        print("|---|" + "---|" * len(TIERS))
        for way in WAYS:
            cells = " | ".join(f"{speeds[way, tier] / 1000:.3g}" for tier in TIERS)
            print(f"| {way} | {cells} |", flush=True)
        for tier in TIERS:
            what = (
                f"{name}, {streams} streams, {tier} us a row: pinned rows beside a cache, tokens/s"
            )
            claims.append(Claim(what, speeds["pinned", tier] / speeds["cache", tier]))
    return claims


def split(
    name: str, made: Layout, books: Books, tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Documents whose n-grams are counted, documents that warm the caches, those that count."""
    counted = books.train[:-8]
    if name == "books":
        before = documents(made, books.train[-8:], BEFORE)
        return documents(made, counted, tokens), before, documents(made, books.heldout, COUNTED)
    library = _library_texts()
    order = np.random.default_rng(0).permutation(len(library))
    texts = [library[i] for i in order]
    code = documents(made, texts, tokens)
    ends = np.cumsum([len(ids) for ids in code])
    first, second = np.searchsorted(ends, ends[-1] - np.array([BEFORE + COUNTED, COUNTED]))
    own = documents(made, counted, tokens) if "books" in name else code[:first]
    return own, code[first:second], code[second:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ["books", "python", "python, books counted"]
    parser.add_argument("--books", type=Path, required=True, help="folder of the books")
    parser.add_argument("--text", nargs="+", default=choices, choices=choices)
    parser.add_argument("--tokens", type=int, default=1_500_000, help="that are counted, at most")
    parser.add_argument("--parts", nargs="+", default=["rates", "speeds"], help="one or both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _native.set_threads(1)
    where = machine(Path(tempfile.gettempdir()))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    made = layout("v41")
    claims: list[Claim] = []
    for name in options.text:
        print(f"\n## {name}")
        counted, before, read = split(name, made, read_books(options.books), options.tokens)
        docs = {"before": before, "counted": read}
        claims += measure(name, made, docs, ranked(made, counted), options.rounds, options.parts)
    write(options.json, "hot_rows", where, claims)


if __name__ == "__main__":
    main()
