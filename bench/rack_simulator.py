"""Simulated racks: 8 servers on a pool of 4 TB, and 1,000 servers on row servers.

    python bench/rack_simulator.py [--pictures docs/results] [--json FILE]

Nothing is timed: the clock is virtual (`engraphy.plan.simulate`), so the answers are the same on
every machine. bench/simulate.py compares the clock with servers that run. It prints the tables of
docs/results/rack-simulator.md, writes its pictures, and with --json all numbers.

No number here was measured with CXL: its figures are published ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engraphy.plan import (
    LAYOUTS,
    TIERS,
    Layout,
    Load,
    Shared,
    Simulation,
    Tier,
    hit_rates,
    layout,
    plan,
    simulate,
)
from engraphy.report.grid import grid
from engraphy.report.lines import Line, share_by_number, share_by_size

SPEED = 5683.7  # tokens/s: the 4B model of arXiv 2603.10087 with its rows in local DRAM
BATCH = 64  # sequences; not what the paper used, which is not known here
CARDS, CARD_RATE = 16, 32e9 / 64  # 256 GB each; PCIe 5.0 with 8 lanes gives 32 GB/s each way
ROW_RATE = 20_000 / 7.945e-3  # rows a second of one row server
FLIGHT = Tier(
    "row server",
    "Arrow Flight over the loopback, two cores, minima: 48 rows in 0.247 ms, 20,000 in 7.945",
    0,
    247e-6,
    ROW_RATE,
)
HIT = 0.5  # of a cache of some GiB: docs/results/hit-rate.md


@dataclasses.dataclass(frozen=True)
class Rack:
    """A way to give rows to servers."""

    name: str
    tier: Tier
    shared: Shared


def racks(row_servers: int = 2) -> list[Rack]:
    """What 8 servers may have: each its own drive, row servers, or a pool."""
    return [
        Rack("CXL pool", TIERS["cxl"], Shared(CARDS, CARD_RATE)),
        Rack("RDMA", TIERS["rdma"], Shared(row_servers, TIERS["rdma"].rate)),
        Rack("row servers", FLIGHT, Shared(row_servers, ROW_RATE)),
        Rack("fast drive", TIERS["nvme-datacentre"], Shared()),
        Rack("drive", TIERS["nvme"], Shared()),
    ]


def forward_seconds(batch: int) -> float:
    """Of one decoding step: as long for few sequences as for 64, then in proportion."""
    return max(batch, BATCH) / SPEED


def load(memory: Layout, servers: int, batch: int = BATCH, hit: float = 0.0) -> Load:
    return Load(servers, batch, 1, forward_seconds(batch) / memory.blocks, hit)


def run(memory: Layout, rack: Rack, work: Load, **more: Any) -> Simulation:
    return simulate(memory, rack.tier, work, rack.shared, forwards=8, **more)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


# --- which tier hides at which layer ---

FIRSTS = (0, 1, 2, 3, 5, 8, 12, 16)


def placed(memory: Layout, first: int) -> list[int]:
    """The layout's layers, moved so that the first one is `first`; those beyond the end meet it."""
    moved = [layer - memory.layers[0] + first for layer in memory.layers]
    return sorted({min(layer, memory.blocks - 1) for layer in moved})


def by_layer(hit: float) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for name in LAYOUTS:
        memory = layout(name)
        work = load(memory, 8, hit=hit)
        found[name] = {
            rack.name: [
                run(memory, rack, work, layers=placed(memory, first)).loss for first in FIRSTS
            ]
            for rack in racks()
        }
    return found


# --- batch, cache, servers ---

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CACHES = (64, 256, 1024, 4096, 16384)  # MiB of one server, all layers


def by_batch(memory: Layout) -> dict[str, list[float]]:
    return {
        rack.name: [run(memory, rack, load(memory, 8, batch)).loss for batch in BATCHES]
        for rack in racks()
    }


def by_cache(memory: Layout, results: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for text, file in (("books", "v41-books.json"), ("code", "v41-python.json")):
        rates = hit_rates(results / file, streams=8)
        for rack in racks()[2:]:
            if rack.name == "fast drive":
                continue
            found[f"{rack.name}, {text}"] = [
                run(memory, rack, load(memory, 8, hit=rates.rate_of(size << 20))).loss
                for size in CACHES
            ]
    return found


SERVERS = (8, 32, 128, 256, 512, 1024)
ROW_SERVERS = (16, 32, 64, 128, 256, 512)


def by_servers(memory: Layout) -> dict[str, list[Simulation]]:
    """Ever more servers on the cards of one pool."""
    found: dict[str, list[Simulation]] = {}
    for cards in (1, 4, 16):
        rack = Rack("CXL pool", TIERS["cxl"], Shared(cards, CARD_RATE))
        name = f"{cards} card{'s' if cards > 1 else ''}"
        found[name] = [run(memory, rack, load(memory, servers)) for servers in SERVERS]
    return found


def thousand(memory: Layout, hit: float, **more: Any) -> list[Simulation]:
    """1,000 servers, by the number of row servers."""
    return [
        run(
            memory,
            Rack("row servers", FLIGHT, Shared(count, ROW_RATE, copies=2)),
            load(memory, 1000, hit=hit),
            **more,
        )
        for count in ROW_SERVERS
    ]


# --- failures ---


def failures(memory: Layout) -> list[list[str]]:
    pool = Shared(CARDS, CARD_RATE)
    drive = TIERS["nvme-datacentre"]
    rows = Shared(128, ROW_RATE, copies=2, hedge=5e-3)
    cases = [
        ("8 servers, pool of 16 cards", 8, TIERS["cxl"], pool, 0, 0.0),
        ("a card fails, two copies", 8, TIERS["cxl"], _with(pool, copies=2), 1, 0.0),
        ("a card fails, fast drives", 8, TIERS["cxl"], _with(pool, standby=drive), 1, 0.0),
        ("a card fails, drives", 8, TIERS["cxl"], _with(pool, standby=TIERS["nvme"]), 1, 0.0),
        ("the same, and a cache", 8, TIERS["cxl"], _with(pool, standby=TIERS["nvme"]), 1, HIT),
        ("a card fails, row servers", 8, TIERS["cxl"], _with(pool, standby=FLIGHT), 1, 0.0),
        ("1,000 servers, 128 row servers, a cache", 1000, FLIGHT, rows, 0, HIT),
        ("one row server fails", 1000, FLIGHT, rows, 1, HIT),
        ("4 neighbours fail, the next one has all", 1000, FLIGHT, _with(rows, copies=5), 4, HIT),
    ]
    lines: list[list[str]] = []
    for title, servers, tier, shared, failed, hit in cases:
        work = load(memory, servers, hit=hit)
        found = simulate(memory, tier, work, shared, failed=failed, forwards=8)
        longest = (found.longest - found.forward_seconds) * 1e3
        later = simulate(memory, tier, work, _with(shared, hedge=0.0), failed=failed, forwards=8)
        cells = [title, percent(later.loss), f"{longest:.2f}", f"{later.busy:.0%}"]
        name, used = later.tightest
        lines.append([*cells, f"{name}, {used:.0%}"])
    return lines


def _with(shared: Shared, **changes: Any) -> Shared:
    return dataclasses.replace(shared, **changes)


# --- the published point ---


def published(memory: Layout) -> list[list[str]]:
    """Where the clock puts what arXiv 2603.10087 reports: 1.2 % of 5,683.7 tokens/s."""
    lines: list[list[str]] = []
    block = forward_seconds(BATCH) / memory.blocks
    for in_flight in (8, 16, 32, 64, 539):
        tier = TIERS["cxl"].limited(in_flight)
        ahead = simulate(memory, tier, Load(8, BATCH, 1, block), Shared(CARDS, CARD_RATE))
        first = simulate(
            memory, tier, Load(8, BATCH, 1, block), Shared(CARDS, CARD_RATE), layers=(0, 14)
        )
        inside = plan(memory, tier, batch=BATCH, block_seconds=block)
        lines.append(
            [
                str(in_flight),
                f"{inside.layers[0].read_seconds * 1e3:.3f}",
                percent(ahead.loss),
                percent(first.loss),
                percent(inside.synchronous_loss),
            ]
        )
    return lines


# --- output ---


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n\n{markdown(head, rows)}", flush=True)


def percents(values: Sequence[float]) -> list[str]:
    return [percent(value) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results/hit-rate"))
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    v41 = layout("V4.1")
    found: dict[str, Any] = {}

    layers = found["loss by first layer"] = {
        f"hit rate {hit:.0%}": by_layer(hit) for hit in (0.0, HIT)
    }
    for hit, groups in layers.items():
        rows = [
            [name, rack, *percents(losses)]
            for name, by_rack in groups.items()
            for rack, losses in by_rack.items()
        ]
        show(f"% lost by first layer, {hit}", ["layout", "tier", *map(str, FIRSTS)], rows)

    batches = found["loss by batch"] = by_batch(v41)
    rows = [[name, *percents(losses)] for name, losses in batches.items()]
    show("% lost by batch", ["tier", *map(str, BATCHES)], rows)

    caches = found["loss by cache"] = by_cache(v41, options.results)
    rows = [[name, *percents(losses)] for name, losses in caches.items()]
    show("% lost by cache, MiB a server", ["tier, text", *map(str, CACHES)], rows)

    servers = by_servers(v41)
    rows = [
        [name, *(f"{percent(one.loss)}, {one.busy:.0%} busy" for one in runs)]
        for name, runs in servers.items()
    ]
    show("% lost by servers on one pool", ["cards", *map(str, SERVERS)], rows)
    found["loss by servers"] = _losses(servers)

    many = {f"hit rate {hit:.0%}": thousand(v41, hit) for hit in (0.0, HIT)}
    rows = [
        [name, *(f"{percent(one.loss)}, {one.busy:.0%} busy" for one in runs)]
        for name, runs in many.items()
    ]
    show("% lost by 1,000 servers", ["row servers", *map(str, ROW_SERVERS)], rows)
    found["loss by row servers"] = _losses(many)

    lines = found["failures"] = failures(v41)
    head = ["case", "% lost", "longest wait once, ms", "busiest part", "used most"]
    show("failures", head, lines)
    lines = found["published"] = published(layout("27B"))
    head = [
        "lines in flight",
        "read, ms",
        "% lost, blocks 1 and 14",
        "blocks 0 and 14",
        "in blocks",
    ]
    show("the published point", head, lines)

    if options.pictures is not None:
        for name, svg in pictures(layers, batches, caches, servers, many).items():
            (options.pictures / name).write_text(svg)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _losses(runs: dict[str, list[Simulation]]) -> dict[str, list[dict[str, float]]]:
    return {
        name: [{"loss": one.loss, "busy": min(1.0, one.busy)} for one in line]
        for name, line in runs.items()
    }


def pictures(
    layers: dict[str, dict[str, dict[str, list[float]]]],
    batches: dict[str, list[float]],
    caches: dict[str, list[float]],
    servers: dict[str, list[Simulation]],
    many: dict[str, list[Simulation]],
) -> dict[str, str]:
    """The SVGs by file name."""
    lost = "% of tokens/s lost"
    drawn = {
        "rack-layers.svg": grid(
            "Which tier hides at which layer: tokens per second lost by 8 servers without a cache",
            [str(first) for first in FIRSTS],
            next(iter(layers.values())),
            f"{lost}, by the first block with a memory",
        ),
        "rack-batch.svg": share_by_number(
            "Tokens per second lost by 8 servers, by batch, DeepSeek-V4.1's layout",
            [Line(name, BATCHES, losses) for name, losses in batches.items()],
            "sequences that decode together",
            lost,
        ),
        "rack-cache.svg": share_by_size(
            "Tokens per second lost by 8 servers, by cache, DeepSeek-V4.1's layout",
            [Line(name, CACHES, losses) for name, losses in caches.items()],
            "cache of a server, all layers",
            lost,
        ),
        "rack-servers.svg": share_by_number(
            "Tokens per second lost by servers that share the cards of one pool",
            [Line(name, SERVERS, [one.loss for one in runs]) for name, runs in servers.items()],
            "servers on one pool",
            lost,
        ),
        "rack-thousand.svg": share_by_number(
            "Tokens per second lost by 1,000 servers, by row servers",
            [Line(name, ROW_SERVERS, [one.loss for one in runs]) for name, runs in many.items()],
            "row servers for 1,000 servers",
            lost,
        ),
    }
    return drawn


if __name__ == "__main__":
    main()
