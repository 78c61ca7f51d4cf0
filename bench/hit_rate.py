"""What text asks of a table: hit rates by cache size and n-gram order, static hot sets, Zipf's law,
and the distinct rows and pages of a chunk.

    python bench/hit_rate.py --books FOLDER [--only v41-books ...] [--out results/hit-rate]

It writes one JSON for each layout and text, part by part, and skips parts that are there already: a
run that was stopped goes on. `python bench/hit_rate_page.py` makes tables and pictures of them.

The layouts are DeepSeek-V4.1's (its tokenizer, orders 2 to 4, 2 layers of 8 heads, rows of 264
bytes) and Qwen4-Exp's (orders 2 and 3, 1 layer of 8 heads, bf16 rows of 320 bytes; Qwen3's
tokenizer stands in for its own). The texts are books (`engraphy data books FOLDER`), this Python's
standard library, and summaries of Wikipedia in three languages. Documents come in one random order,
the books in that of their list.

The heads of an order read the rows of one n-gram, so they hit and miss together. One of 8 heads in
one layer is followed, with its share of the budget; `whole` follows all rows of a short text, to
show that this changes nothing. A budget of N MiB holds the rows that CacheStore would keep in it.

The first half of a text, for books those to train on, comes before what is counted: caches are
warm, and hot sets are counted there. `lru` is exact for every size at once: stack distances over
the reads of all orders, one read after the other. `store` is CacheStore itself (S3-FIFO in sets of
16), asked for 512 tokens a call. `shuffled` are the same reads in random order: what is left of the
hit rate if only the frequencies count. `ever` is a cache of unlimited size. `ngrams` has the share
of n-grams that were read before, without the rows that another n-gram has brought in.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hit_rate_texts import TEXTS, Layout, Text, layout, load_text

from engraphy.addresses.counts import Counts, ngram_keys
from engraphy.analysis.reuse import hit_rates, stack_distances, zipf_exponent
from engraphy.store import RamStore
from engraphy.store.cache import CacheStore
from engraphy.store.sets import WAYS, set_bytes

LAYOUTS = ("v41", "qwen4")
SIZES = [2**power for power in range(18)]  # MiB
STORE_SIZES = [256, 2048, 16384]  # MiB
STREAMS = (1, 8)
CALL = 512  # tokens of a call of the store
SHORT = 300_000  # tokens before, and as many counted: the same for every text
MEDIUM = 2_400_000  # tokens before, where a text has so many
WHOLE = 100_000  # tokens before, and as many counted, with all rows of a token
RANKED = 2**23  # rows of the hot set of the books that the other texts are tested on
GROUPS = 8  # of documents; pairs of them give the error of Zipf's exponent
CHUNKS = (1, 16, 128, 1024, 8192, 65536)  # tokens
CHUNK_SAMPLES = 32
PAGE = 4096
FIRST_ROW = 4096  # byte of a shard at which row 0 lies


def rows_within(budget: int, layout: Layout) -> int:
    """Rows of one head of one layer, all orders, that a budget of MiB holds."""
    return (budget << 20) // set_bytes(layout.row_bytes) * WAYS // layout.sharing


def interleaved(lengths: np.ndarray, streams: int) -> np.ndarray:
    """Positions of the tokens in the order in which streams read them, int64 [tokens].

    Streams take documents in turn, and then one token each.
    """
    begins = np.cumsum(lengths) - lengths
    keys = np.empty(int(lengths.sum()), dtype=np.int64)
    steps = np.zeros(streams, dtype=np.int64)
    for document, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
        stream = document % streams
        step = steps[stream] + np.arange(length)
        keys[begin : begin + length] = step * streams + stream
        steps[stream] += length
    return np.argsort(keys, kind="stable")


def read_order(text: Text, streams: int) -> np.ndarray:
    """Positions of all tokens as they are read. What is counted begins when the rest is read."""
    before = interleaved(text.lengths[: text.split], streams)
    counted = interleaved(text.lengths[text.split :], streams)
    return np.concatenate([before, text.before + counted])


def by_order(rates: Any, orders: Sequence[int], distances_NO: np.ndarray) -> dict[str, Any]:
    """A number or a list for each order, and for all of them."""
    parts = {str(order): distances_NO[:, place] for place, order in enumerate(orders)}
    parts["all"] = distances_NO.reshape(-1)
    return {name: np.round(rates(part), 4).tolist() for name, part in parts.items()}


def distances(rows_NO: np.ndarray) -> np.ndarray:
    """Stack distances of all reads, token by token, in the shape of the rows."""
    return stack_distances(rows_NO.reshape(-1)).reshape(rows_NO.shape)


def lru(distances_NO: np.ndarray, counted: int, layout: Layout) -> dict[str, Any]:
    """Hit rates of LRU over the last `counted` tokens."""
    last_NO = distances_NO[-counted:]
    orders = layout.addresser.spec.orders
    sizes = [rows_within(size, layout) for size in SIZES]
    return {
        "before": len(distances_NO) - counted,
        "counted": counted,
        "ever": by_order(lambda part: np.mean(part >= 0), orders, last_NO),
        "lru": by_order(lambda part: hit_rates(part, sizes), orders, last_NO),
    }


def store_rate(rows_NO: np.ndarray, counted: int, budget: int, layout: Layout) -> float:
    """The hit rate of CacheStore over the last `counted` tokens, all orders together."""
    sets = (budget << 20) // set_bytes(layout.row_bytes) // layout.sharing
    table = RamStore(layout.addresser.spec.row_count(layout.addresser.spec.layer_ids[0]), 1)
    cache = CacheStore(table, sets * set_bytes(1))
    hits = 0
    for first, last in calls(len(rows_NO), len(rows_NO) - counted):
        if first == len(rows_NO) - counted:
            hits = cache.stats.hits or 0
        cache.gather(rows_NO[first:last].reshape(-1).astype(np.int64))
    return round(((cache.stats.hits or 0) - hits) / rows_NO[-counted:].size, 4)


def calls(count: int, before: int) -> Iterator[tuple[int, int]]:
    """Calls of CALL tokens, one of which begins at `before`."""
    for begin, end in ((0, before), (before, count)):
        for first in range(begin, end, CALL):
            yield first, min(first + CALL, end)


def runs(rows_NO: np.ndarray, text: Text, layout: Layout) -> dict[str, Any]:
    """Hit rates of LRU and of the store for each way to read the text."""
    counted = len(rows_NO) - text.before
    short = min(SHORT, counted)
    results: dict[str, Any] = {}
    for streams in STREAMS:
        name = f"{streams} stream{'s' if streams > 1 else ''}"
        read_NO = rows_NO[read_order(text, streams)]
        distances_NO = distances(read_NO)
        results[name] = lru(distances_NO, counted, layout)
        if streams == 1:
            results["long"] = lru(distances_NO[: text.before + short], short, layout)
        del distances_NO
        results[name]["store"] = {
            str(budget): store_rate(read_NO, counted, budget, layout) for budget in STORE_SIZES
        }
    shuffled = rows_NO.copy()
    random = np.random.default_rng(0)
    for part in (shuffled[: text.before], shuffled[text.before :]):
        random.permuted(part, axis=0, out=part)
    results["shuffled"] = lru(distances(shuffled), counted, layout)
    for name, before in (("short", SHORT), ("medium", MEDIUM)):
        if before <= text.before:
            window = rows_NO[text.before - before : text.before + short]
            results[name] = lru(distances(window), short, layout)
    return results


def whole(text: Text, rows_NO: np.ndarray, layout: Layout) -> dict[str, Any]:
    """All rows of a token beside those that are followed, for the same budgets."""
    first, last = text.before - WHOLE, text.before + WHOLE
    rows_LTC = layout.rows(text, first, last)
    specs = layout.addresser.spec
    offsets = np.cumsum([0, *(specs.row_count(layer) for layer in specs.layer_ids[:-1])])
    keys_TLC = (rows_LTC + offsets[:, None, None]).transpose(1, 0, 2).reshape(last - first, -1)
    sizes = [rows_within(size, layout) for size in SIZES]
    followed = hit_rates(distances(rows_NO[first:last])[WHOLE:].reshape(-1), sizes)
    all_sizes = [size * layout.sharing for size in sizes]
    every = hit_rates(distances(keys_TLC)[WHOLE:].reshape(-1), all_sizes)
    return {"followed": np.round(followed, 4).tolist(), "whole": np.round(every, 4).tolist()}


def hot_sets(rows_NO: np.ndarray, text: Text, layout: Layout, work: Path) -> dict[str, Any]:
    """Hit rates of static sets of the rows that were read most.

    `other` was counted before what is counted, `known` on it, `books` on the books to train on.
    """
    sizes = [rows_within(size, layout) for size in SIZES]
    tested = Counts(rows_NO[text.before :])
    ranked = Counts(rows_NO[: text.before]).by_count()
    books = work / f"{layout.name}-ranked.npy"
    if text.about["text"] == "books":
        np.save(books, ranked[:RANKED])
    choices = {"other": ranked, "known": tested.by_count()}
    if books.exists():
        choices["books"] = np.load(books)
    return {
        name: np.round(tested.served_by(choice, sizes), 4).tolist()
        for name, choice in choices.items()
    }


def zipf(rows_NO: np.ndarray, text: Text, layout: Layout) -> dict[str, Any]:
    """Zipf's exponent for each order: mean and standard error over pairs of groups of documents."""
    group = np.repeat(np.arange(len(text.lengths)) % GROUPS, text.lengths)
    results = {}
    for place, order in enumerate(layout.addresser.spec.orders):
        counts = [Counts(rows_NO[group == number, place]) for number in range(GROUPS)]
        pairs = list(zip(counts[::2], counts[1::2], strict=True))
        found = [zipf_exponent(ranked, measured) for ranked, measured in pairs]
        last = [int(np.count_nonzero(ranked.counts_K >= 10)) for ranked, _ in pairs]
        results[str(order)] = {
            "exponent": round(float(np.mean(found)), 3),
            "error": round(float(np.std(found, ddof=1) / len(found) ** 0.5), 3),
            "ranks": [10, int(np.median(last))],
        }
    return results


def chunks(text: Text, layout: Layout) -> list[dict[str, Any]]:
    """Means over chunks of what is counted: reads, distinct rows, and pages of 4 KiB."""
    results = []
    for tokens in CHUNKS:
        room = len(text.ids) - text.before - tokens
        if room < 0:
            continue
        rows = pages = 0
        begins = np.linspace(text.before, text.before + room, CHUNK_SAMPLES).astype(int)
        for first in begins.tolist():
            for rows_TC in layout.rows(text, first, first + tokens):
                distinct = without_repeats(rows_TC)
                begin = FIRST_ROW + distinct * layout.row_bytes
                touched = np.concatenate([begin, begin + layout.row_bytes - 1]) // PAGE
                rows += len(distinct)
                pages += len(without_repeats(touched))
        reads = tokens * layout.addresser.spec.columns * len(layout.addresser.spec.layer_ids)
        results.append(
            {
                "tokens": tokens,
                "reads": reads,
                "rows": round(rows / CHUNK_SAMPLES, 1),
                "pages": round(pages / CHUNK_SAMPLES, 1),
            }
        )
    return results


def without_repeats(values: np.ndarray) -> np.ndarray:
    """Distinct values, ascending; np.unique alone goes through a hash table, and takes longer."""
    ordered = np.sort(values, axis=None)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]


def ngrams(rows_NO: np.ndarray, text: Text, layout: Layout) -> dict[str, Any]:
    """For each order the share of counted n-grams that were read before, and of rows ever read."""
    spec = layout.addresser.spec
    compressed = layout.addresser.vocab(text.ids)
    primes = spec.primes(spec.layer_ids[0])
    results = {}
    for place, order in enumerate(spec.orders):
        keys = ngram_keys(compressed, text.starts, order)
        _, first = np.unique(keys, return_index=True)
        seen = np.ones(len(keys), dtype=bool)
        seen[first] = False
        rows = len(without_repeats(rows_NO[:, place]))
        results[str(order)] = {
            "ever": round(float(seen[text.before :].mean()), 4),
            "distinct": len(first),
            "rows": round(rows / primes[place * spec.heads], 4),
        }
    return results


def measure(path: Path, text: Text, layout: Layout, work: Path) -> None:
    """Writes what is missing in one result file."""
    results: dict[str, Any] = {
        "layout": layout.name,
        **text.about,
        "tokens": len(text.ids),
        "before": text.before,
        "sizes_MiB": SIZES,
        "rows_of_MiB": [rows_within(size, layout) for size in SIZES],
        "cpu_seconds": 0,
    }
    if path.exists():
        results = json.loads(path.read_text())
        if results["sha256"] != text.about["sha256"]:
            raise SystemExit(f"{path}: expected the text {text.about['sha256']}, found another one")
    rows_NO = layout.followed(text)
    parts: dict[str, Callable[[], Any]] = {
        "hot": lambda: hot_sets(rows_NO, text, layout, work),
        "ngrams": lambda: ngrams(rows_NO, text, layout),
        "zipf": lambda: zipf(rows_NO, text, layout),
        "chunks": lambda: chunks(text, layout),
        "whole": lambda: whole(text, rows_NO, layout),
        "runs": lambda: runs(rows_NO, text, layout),
    }
    for name, make in parts.items():
        if name in results:
            continue
        begun = time.process_time()
        results[name] = make()
        results["cpu_seconds"] += round(time.process_time() - begun)
        path.write_text(compact(results))
        print(f"  {name}: {time.process_time() - begun:.0f} s", flush=True)


def compact(value: Any) -> str:
    """JSON with each list of numbers in one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--books", type=Path, required=True, help="folder of the books")
    parser.add_argument("--only", nargs="+", help="such as v41-books; default: all, books first")
    parser.add_argument("--out", type=Path, default=Path("results/hit-rate"))
    parser.add_argument("--work", type=Path, default=Path("runs/hit-rate"), help="kept tokens")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in LAYOUTS:
        wanted = [
            text for text in TEXTS if options.only is None or f"{name}-{text}" in options.only
        ]
        if not wanted:
            continue
        made = layout(name)
        for text in wanted:
            print(f"{name}-{text}", flush=True)
            loaded = load_text(text, made, options.books, options.work)
            measure(options.out / f"{name}-{text}.json", loaded, made, options.work)


if __name__ == "__main__":
    main()
