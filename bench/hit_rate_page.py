"""Tables and pictures of what bench/hit_rate.py measured.

    python bench/hit_rate_page.py [--results results/hit-rate] [--pictures docs/results]

It prints the tables of docs/results/hit-rate.md, and writes its pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hit_rate import SIZES, STORE_SIZES
from hit_rate_texts import TEXTS

from engraphy.report.lines import Line, binary_size, share_by_size

LAYOUTS = {"v41": "DeepSeek-V4.1", "qwen4": "Qwen4-Exp"}
SHOWN = [16, 64, 256, 1024, 4096, 16384, 65536]  # MiB, columns of tables
CHUNK_TEXTS = ("books", "python")

Result = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def at(curve: Sequence[float], sizes: Sequence[int] = SHOWN) -> list[str]:
    """The values of a curve at some sizes, as percent."""
    return [percent(curve[SIZES.index(size)]) for size in sizes]


def millions(tokens: int) -> str:
    return f"{tokens / 1e6:.1f} M"


def by_order(results: dict[tuple[str, str], Result]) -> str:
    rows = []
    for name, title in LAYOUTS.items():
        if (name, "books") not in results:
            continue
        run = results[name, "books"]["runs"]["1 stream"]
        for order, curve in run["lru"].items():
            rows.append([title, order, *at(curve), percent(run["ever"][order])])
    return table(["layout", "order", *map(binary_size, SHOWN), "ever"], rows)


def by_text(results: dict[tuple[str, str], Result]) -> str:
    rows = []
    for (name, text), result in results.items():
        run = result["runs"]["1 stream"]
        row = [LAYOUTS[name], TEXTS[text], millions(run["before"]), millions(run["counted"])]
        rows.append([*row, *at(run["lru"]["all"]), percent(run["ever"]["all"])])
    head = ["layout", "text", "before", "counted", *map(binary_size, SHOWN)]
    return table([*head, "ever"], rows)


def repeats(results: dict[tuple[str, str], Result]) -> str:
    rows = []
    for (name, text), result in results.items():
        cells = [LAYOUTS[name], TEXTS[text]]
        ever = result["runs"]["1 stream"]["ever"]
        for order in "234":
            found = result["ngrams"].get(order)
            if found is None:
                cells.append("-")
                continue
            shares = [percent(share) for share in (found["ever"], ever[order], found["rows"])]
            cells.append(" / ".join(shares))
        rows.append(cells)
    return table(["layout", "text", "order 2", "order 3", "order 4"], rows)


def by_length(results: dict[tuple[str, str], Result]) -> str:
    rows = []
    for (name, text), result in results.items():
        runs = result["runs"]
        for length in ("short", "medium", "long"):
            if length not in runs or (length == "long" and text != "books"):
                continue
            run = runs[length]
            shares = [*at(run["lru"]["all"]), percent(run["ever"]["all"])]
            rows.append([LAYOUTS[name], TEXTS[text], millions(run["before"]), *shares])
    return table(["layout", "text", "before", *map(binary_size, SHOWN), "ever"], rows)


def by_streams(results: dict[tuple[str, str], Result]) -> str:
    few = [4, 16, 64]
    rows = []
    for (name, text), result in results.items():
        one = result["runs"]["1 stream"]
        eight = result["runs"]["8 streams"]
        cells = [LAYOUTS[name], TEXTS[text]]
        for size in few:
            pair = (at(run["lru"]["all"], [size])[0] for run in (one, eight))
            cells.append(" / ".join(pair))
        for size in STORE_SIZES:
            store = [percent(run["store"][str(size)]) for run in (one, eight)]
            cells.append(f"{at(one['lru']['all'], [size])[0]} / {' / '.join(store)}")
        rows.append(cells)
    head = ["layout", "text", *(f"LRU, {binary_size(size)}: 1 / 8" for size in few)]
    head += [f"{binary_size(size)}: LRU / store 1 / store 8" for size in STORE_SIZES]
    return table(head, rows)


def by_choice(results: dict[tuple[str, str], Result]) -> str:
    rows = []
    for (name, text), result in results.items():
        start = [LAYOUTS[name], TEXTS[text]]
        curves = {
            "hot set, counted on other text": result["hot"]["other"],
            "hot set, counted on this text": result["hot"]["known"],
            "LRU": result["runs"]["1 stream"]["lru"]["all"],
            "LRU, shuffled": result["runs"]["shuffled"]["lru"]["all"],
        }
        if text != "books" and "books" in result["hot"]:
            curves["hot set, counted on books"] = result["hot"]["books"]
        rows += [[*start, what, *at(curve)] for what, curve in curves.items()]
    return table(["layout", "text", "rows kept", *map(binary_size, SHOWN)], rows)


def exponents(results: dict[tuple[str, str], Result]) -> str:
    rows = []
    for (name, text), result in results.items():
        cells = [LAYOUTS[name], TEXTS[text]]
        for order in "234":
            fit = result["zipf"].get(order)
            if fit is None:
                cells.append("-")
                continue
            low, high = fit["ranks"]
            cells.append(f"{fit['exponent']:.3f} ± {fit['error']:.3f} ({low} to {high:,})")
        rows.append(cells)
    return table(["layout", "text", "order 2", "order 3", "order 4"], rows)


def chunks(results: dict[tuple[str, str], Result]) -> str:
    rows = []
    for (name, text), result in results.items():
        if text not in CHUNK_TEXTS:
            continue
        for chunk in result["chunks"]:
            reads = chunk["reads"]
            counts = [f"{chunk['tokens']:,}", f"{reads:,}", f"{chunk['rows']:,.0f}"]
            shares = [percent(chunk["rows"] / reads), f"{chunk['pages']:,.0f}"]
            rows.append([LAYOUTS[name], TEXTS[text], *counts, *shares])
    head = ["layout", "text", "tokens", "reads", "distinct rows", "% of reads", "pages of 4 KiB"]
    return table(head, rows)


def pictures(results: dict[tuple[str, str], Result]) -> dict[str, str]:
    """The SVGs by file name."""
    cache = "cache for all layers and heads"
    books = results["v41", "books"]
    run = books["runs"]["1 stream"]
    names = {"2": "order 2", "3": "order 3", "4": "order 4", "all": "all orders"}
    orders = [Line(names[order], SIZES, curve) for order, curve in run["lru"].items()]
    texts = [
        Line(title, SIZES, results["v41", text]["runs"]["1 stream"]["lru"]["all"])
        for text, title in TEXTS.items()
    ]
    choices = [
        Line("hot set, same text", SIZES, books["hot"]["known"]),
        Line("hot set, other books", SIZES, books["hot"]["other"]),
        Line("LRU", SIZES, run["lru"]["all"]),
        Line("CacheStore", STORE_SIZES, [run["store"][str(size)] for size in STORE_SIZES]),
        Line("LRU, reads shuffled", SIZES, books["runs"]["shuffled"]["lru"]["all"]),
    ]
    where = "DeepSeek-V4.1"
    return {
        "hit-rate-orders.svg": share_by_size(
            f"Hit rate of LRU by cache size and order: held-out books, {where}",
            orders,
            cache,
            f"hit rate, held-out books, {where}",
        ),
        "hit-rate-texts.svg": share_by_size(
            f"Hit rate of LRU by cache size and text: {where}, all orders",
            texts,
            cache,
            f"hit rate, all orders, {where}",
        ),
        "hit-rate-hot.svg": share_by_size(
            f"Hit rate of static hot sets beside LRU: held-out books, {where}",
            choices,
            cache,
            f"hit rate, held-out books, {where}",
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results/hit-rate"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    results: dict[tuple[str, str], Result] = {}
    for layout in LAYOUTS:
        for text in TEXTS:
            path = options.results / f"{layout}-{text}.json"
            if path.exists():
                results[layout, text] = json.loads(path.read_text())
    for make in (by_order, by_text, repeats, by_length, by_streams, by_choice, exponents, chunks):
        print(make(results))
    seconds = sum(result["cpu_seconds"] for result in results.values())
    print(f"{seconds / 60:.0f} minutes of CPU time")
    for name, svg in pictures(results).items():
        (options.pictures / name).write_text(svg)


if __name__ == "__main__":
    main()
