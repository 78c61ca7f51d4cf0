"""What a plan says a model waits for, beside what it waits for.

    python bench/plan.py [--rounds 20] [--disk FOLDER] [--json FILE]

A decoder of 6 blocks with a memory at blocks 1 and 4 runs on one thread. Its rows come from RAM, or
from RAM after a pause of 0, 0.1, 1 or 10 ms in each read. They are read ahead, or each block looks
up its own (a memory for each layer then). The blocks are those of the reference model; they compute
alone, or pause after that until 3 ms are over. Two shapes: a prompt of 32 tokens, and one token of
each of 8 sequences.

All take turns, in an order that is drawn each round. Clocks stand around the waits for rows, and
around look-ups in blocks. Measured is the median, over the rounds, of what a forward waits more
than the one without a pause in the same round. "forward longer" is the same for the whole forward,
whose noise is that of the blocks; what the forward without a pause takes more than that from RAM is
below each table. The plan knows 3 ms a block, or the median time of a forward from RAM by the
number of blocks, and the latency of a read. It holds if the two differ by at most 20 % of the plan
or 0.3 ms, whichever is more.

--disk: also a table of 2 GiB in that folder, removed afterwards, whose disk is probed first. Reads
are direct. This is not part of what the plan has to hold: reads then take CPU time from the blocks.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import passive  # noqa: F401  before torch
import torch
from claims import Claim, write
from delays import Delayed
from probe import Probe, machine

from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, RowFormat, Table, VocabMap
from engraphy.lm.config import LMConfig
from engraphy.lm.model import LM
from engraphy.plan import Layout, Plan, Tier, measure, plan
from engraphy.store import RamStore
from engraphy.store.base import RowStore

BLOCKS, LAYERS = 6, (1, 4)
HIDDEN, FFN, VOCAB = 256, 688, 4096
ORDERS, HEADS, DIM = (2, 3), 8, 128
ROWS_PER_HEAD = 5_000
KNOWN = 3e-3  # seconds of a block that sleeps
DELAYS = (0.0, 1e-4, 1e-3, 1e-2)
SHAPES = {"a prompt of 32 tokens": (1, 32), "one token of 8 sequences": (8, 1)}
FORMAT = RowFormat("bf16", DIM)
LEAST, SHARE = 3e-4, 0.2  # of the goal
DISK_BYTES = 1 << 30  # of a layer
CHUNK = 1 << 17  # rows that are written at a time
RAM = "RAM"

Forward = Callable[[torch.Tensor], float]
"""Takes token ids; returns the seconds that blocks waited for their rows."""


@dataclass(frozen=True)
class Row:
    """One line of a table: the wait planned, and measured with its standard error; how much longer
    the forward took."""

    name: str
    planned: float
    measured: float
    error: float
    longer: float

    @property
    def tolerance(self) -> float:
        return max(SHARE * self.planned, LEAST)

    @property
    def off(self) -> float:
        """The difference as a part of what is allowed."""
        return abs(self.measured - self.planned) / self.tolerance


@dataclass(frozen=True)
class Turns:
    """By forward, in each round: seconds of the forward, and those that its blocks waited."""

    seconds: dict[str, list[float]]
    waited: dict[str, list[float]]


class Decoder:
    """Blocks of the reference model. With `known`, each sleeps until that many seconds are over."""

    def __init__(self, tokens: int, known: float | None, probe: Probe) -> None:
        torch.manual_seed(0)
        model = LM(LMConfig(VOCAB, HIDDEN, BLOCKS, 8, FFN)).eval()
        self._blocks = model.blocks
        self._embed = model.embed
        self._rotation = torch.view_as_complex(model.rotation[:tokens])
        self._known = known
        self._pause = probe.pause

    def ahead(self, memory: EngramMemory) -> Forward:
        """A forward that asks for all rows first."""

        def forward(ids_BT: torch.Tensor) -> float:
            lookup = memory.lookup(ids_BT, memory.state(len(ids_BT)))
            x_BTD = self._embed(ids_BT)
            waited = 0.0
            for number in range(BLOCKS):
                if number in LAYERS:
                    begun = time.perf_counter()
                    lookup.rows[number]
                    waited += time.perf_counter() - begun
                    x_BTD = memory.fuse(number, x_BTD, lookup)
                x_BTD = self._block(number, x_BTD)
            return waited

        return forward

    def in_blocks(self, memories: dict[int, EngramMemory]) -> Forward:
        """A forward whose blocks look up their own rows."""

        def forward(ids_BT: torch.Tensor) -> float:
            x_BTD = self._embed(ids_BT)
            waited = 0.0
            for number in range(BLOCKS):
                if number in LAYERS:
                    memory = memories[number]
                    begun = time.perf_counter()
                    lookup = memory.lookup(ids_BT, memory.state(len(ids_BT)))
                    lookup.rows[number]
                    waited += time.perf_counter() - begun
                    x_BTD = memory.fuse(number, x_BTD, lookup)
                x_BTD = self._block(number, x_BTD)
            return waited

        return forward

    def _block(self, number: int, x_BTD: torch.Tensor) -> torch.Tensor:
        begun = time.perf_counter()
        x_BTD = self._blocks[number](x_BTD, self._rotation, None)
        if self._known is not None:
            self._pause(begun + self._known - time.perf_counter())
        return x_BTD


def config_of(layers: tuple[int, ...], rows_per_head: int = ROWS_PER_HEAD) -> EngramConfig:
    spec = HashSpec.demo(layers, ORDERS, HEADS, rows_per_head, VOCAB, pad_id=0)
    return EngramConfig(spec, LayerSpec(HIDDEN, spec.columns * DIM), DIM)


def memory_of(config: EngramConfig, stores: dict[int, RowStore]) -> EngramMemory:
    torch.manual_seed(1)
    memory = EngramMemory(config, VocabMap.identity(VOCAB), stores, FORMAT)
    return memory.eval()


def ram(config: EngramConfig) -> dict[int, RowStore]:
    return {
        layer: RamStore(config.hash.row_count(layer), FORMAT.row_bytes)
        for layer in config.hash.layer_ids
    }


def delayed(config: EngramConfig, delay: float, probe: Probe) -> dict[int, RowStore]:
    return {layer: Delayed(store, delay, probe.pause) for layer, store in ram(config).items()}


def forwards(decoder: Decoder, probe: Probe) -> dict[str, Forward]:
    """From RAM, and with each delay, read ahead and in the blocks."""
    whole = config_of(LAYERS)
    made = {RAM: decoder.ahead(memory_of(whole, ram(whole)))}
    for delay in DELAYS:
        made[_ahead(delay)] = decoder.ahead(memory_of(whole, delayed(whole, delay, probe)))
        single = {}
        for layer in LAYERS:
            config = config_of((layer,))
            single[layer] = memory_of(config, delayed(config, delay, probe))
        made[_in_blocks(delay)] = decoder.in_blocks(single)
    return made


def _ahead(delay: float) -> str:
    return f"{delay * 1e3:g} ms a read, ahead"


def _in_blocks(delay: float) -> str:
    return f"{delay * 1e3:g} ms a read, in the blocks"


def take_turns(made: dict[str, Forward], shape: tuple[int, int], rounds: int) -> Turns:
    """Runs each forward once a round; one round before them is not counted."""
    generator = torch.Generator().manual_seed(2)
    shuffle = random.Random(3).shuffle
    order = list(made)
    turns = Turns({name: [] for name in made}, {name: [] for name in made})
    with torch.no_grad():
        for number in range(rounds + 1):
            shuffle(order)
            for name in order:
                ids_BT = torch.randint(1, VOCAB, shape, generator=generator)
                begun = time.perf_counter()
                waited = made[name](ids_BT)
                taken = time.perf_counter() - begun
                if number:
                    turns.seconds[name].append(taken)
                    turns.waited[name].append(waited)
    return turns


def more(values: dict[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """Median of the differences from `base` in the same round; its standard error."""
    pairs = zip(values[name], values[base], strict=True)
    differences = [one - other for one, other in pairs]
    error = 1.25 * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.median(differences), error


def planned(tier: Tier, shape: tuple[int, int], block_seconds: float) -> Plan:
    layout = Layout("the decoder", config_of(LAYERS), BLOCKS, FORMAT, "bench/plan.py")
    batch, tokens = shape
    return plan(layout, tier, batch=batch, tokens=tokens, block_seconds=block_seconds)


def injected(
    title: str, known: float | None, shape: tuple[int, int], rounds: int, probe: Probe
) -> list[Row]:
    """The lines of one decoder and shape."""
    turns = take_turns(forwards(Decoder(shape[1], known, probe), probe), shape, rounds)
    from_ram = statistics.median(turns.seconds[RAM])
    block = from_ram / BLOCKS if known is None else known
    rows = []
    for delay in DELAYS[1:]:
        tier = Tier(f"{delay} s", "a pause", 0, delay, math.inf)
        expected = planned(tier, shape, block)
        for name_of, what in ((_ahead, expected.exposed), (_in_blocks, expected.synchronous)):
            name = name_of(delay)
            longer, _ = more(turns.seconds, name, name_of(0.0))
            rows.append(Row(name, what, *more(turns.waited, name, name_of(0.0)), longer))
    show(f"{title}, {block * 1e3:.2f} ms a block", rows, from_ram)
    for name in (_ahead(0.0), _in_blocks(0.0)):
        found, error = more(turns.seconds, name, RAM)
        print(f"{name}: a forward of {found * 1e3:.2f} +- {error * 1e3:.2f} ms more than from RAM")
    return rows


def show(title: str, rows: list[Row], forward: float) -> None:
    print(f"\n### {title}, {forward * 1e3:.1f} ms a forward from RAM\n")
    print("| rows | wait planned, ms | measured | off by | allowed | holds | forward longer |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        difference = (row.measured - row.planned) * 1e3
        print(
            f"| {row.name} | {row.planned * 1e3:.2f} | {row.measured * 1e3:.2f} "
            f"+- {row.error * 1e3:.2f} | {difference:+.2f} | {row.tolerance * 1e3:.2f} | "
            f"{'yes' if row.off <= 1 else 'NO'} | {row.longer * 1e3:.2f} |",
            flush=True,
        )


def pauses(probe: Probe) -> None:
    """How long the pauses take that stand for a read: no plan comes closer than that."""
    parts = []
    for delay in DELAYS[1:]:
        taken = []
        for _ in range(20):
            begun = time.perf_counter()
            probe.pause(delay)
            taken.append(time.perf_counter() - begun)
        parts.append(f"{delay * 1e3:g} ms: {statistics.median(taken) * 1e3:.3f}")
    print(f"pauses of {', '.join(parts)} ms")


@contextmanager
def table_on_disk(folder: Path) -> Iterator[Path]:
    """A table of random rows in the decoder's layers."""
    rows_per_head = DISK_BYTES // (HEADS * len(ORDERS)) // FORMAT.row_bytes
    config = config_of(LAYERS, rows_per_head)
    rng = np.random.default_rng(4)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        table = Table.create(
            Path(place, "table"), config, FORMAT, VocabMap.identity(VOCAB), shard_rows=1 << 22
        )
        for layer in LAYERS:
            count = config.hash.row_count(layer)
            for first in range(0, count, CHUNK):
                number = min(CHUNK, count - first)
                raw = np.frombuffer(rng.bytes(number * FORMAT.row_bytes), np.uint8)
                table.write_rows(layer, first, raw.reshape(number, -1))
        table.seal()
        table.close()
        yield table.path


def on_disk(folder: Path, rounds: int, probe: Probe) -> None:
    """The decoder with a table on disk, and what a probe of that disk makes of it."""
    with table_on_disk(folder) as path:
        found = measure(path, size=DISK_BYTES // 2)
        for item in found.batches:
            print(f"probe: {item.reads} reads in {item.seconds * 1e3:.3f} ms")
        print(
            "\n### a table on disk, 3 ms a block, read ahead; ms\n\n"
            "| shape | a layer's read, probed | in the model | wait planned, by the probe "
            "| by the reads in the model | wait clocked | longer than from RAM |\n"
            "|---|---|---|---|---|---|---|"
        )
        for title, shape in SHAPES.items():
            print(f"| {title} | {_from_disk(path, found.tier, shape, rounds, probe)} |", flush=True)


def _from_disk(path: Path, tier: Tier, shape: tuple[int, int], rounds: int, probe: Probe) -> str:
    decoder = Decoder(shape[1], KNOWN, probe)
    whole = config_of(LAYERS)
    table = Table.open(path)
    table.close()
    store = f"file:{path}?direct=1"
    with EngramMemory(table.config, VocabMap.identity(VOCAB), store).eval() as memory:
        made = {RAM: decoder.ahead(memory_of(whole, ram(whole))), "disk": decoder.ahead(memory)}
        turns = take_turns(made, shape, rounds)
        reads = [memory.stores[layer].stats.latency for layer in LAYERS]
    waited = statistics.median(turns.waited["disk"])
    read = sum(latency.seconds for latency in reads) / sum(latency.calls for latency in reads)
    by_probe = planned(tier, shape, KNOWN)
    by_reads = planned(Tier("disk", "its reads in the model", 0, read, math.inf), shape, KNOWN)
    longer, error = more(turns.seconds, "disk", RAM)
    times = (by_probe.layers[0].read_seconds, read, by_probe.exposed, by_reads.exposed, waited)
    columns = " | ".join(f"{time * 1e3:.2f}" for time in times)
    return f"{columns} | {longer * 1e3:.2f} +- {error * 1e3:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--disk", type=Path, help="folder for a table of 2 GiB")
    parser.add_argument("--json", type=Path, help="writes what is claimed to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine(options.disk or Path(tempfile.gettempdir()))
    print(" | ".join(f"{key} {value}" for key, value in where.items()))
    probe = Probe()
    pauses(probe)
    claims = []
    for title, shape in SHAPES.items():
        for kind, known in (("blocks that sleep", KNOWN), ("blocks that compute", None)):
            rows = injected(f"{title}, {kind}", known, shape, options.rounds, probe)
            worst = max(row.off for row in rows)
            what = f"{title}, {kind}: the plan's largest error, of what is allowed"
            claims.append(Claim(what, worst, "", 1.0, "at most"))
    if options.disk is not None:
        on_disk(options.disk, options.rounds, probe)
    write(options.json, "plan", where, claims)


if __name__ == "__main__":
    main()
