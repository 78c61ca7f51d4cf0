"""What a plan says a model waits for, beside what it waits for.

    python bench/plan.py [--rounds 20] [--disk FOLDER] [--json FILE]

A decoder of 6 blocks with a memory at blocks 1 and 4 runs on one thread. Its rows come from RAM, or
from RAM after a pause of 0, 0.1, 1 or 10 ms in each read. They are read ahead, or each block looks
up its own (a memory for each layer then). The blocks are those of the reference model; they compute
alone, or pause after that until 3 ms are over. Two shapes: a prompt of 32 tokens, and one token of
each of 8 sequences.

All take turns, in an order that is drawn each round. Measured is the median, over the rounds, of a
forward's time less that of the forward without a pause in the same round; what that one takes more
than the rows in RAM is printed below. The plan knows 3 ms a block, or the median time of a forward
from RAM by the number of blocks, and the latency of a read. It holds if the two differ by at most
20 % of the plan or 0.3 ms, whichever is more.

--disk: also a table of 2 GiB in that folder, removed afterwards, whose disk is probed first; the
plan then knows the probe. Reads are direct. This is not part of what the plan has to hold.
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

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One line of a table: what was planned, what was measured, and its standard error."""

    name: str
    planned: float
    measured: float
    error: float

    @property
    def tolerance(self) -> float:
        return max(SHARE * self.planned, LEAST)

    @property
    def off(self) -> float:
        """The difference as a part of what is allowed."""
        return abs(self.measured - self.planned) / self.tolerance


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

        def forward(ids_BT: torch.Tensor) -> torch.Tensor:
            lookup = memory.lookup(ids_BT, memory.state(len(ids_BT)))
            x_BTD = self._embed(ids_BT)
            for number in range(BLOCKS):
                if number in LAYERS:
                    x_BTD = memory.fuse(number, x_BTD, lookup)
                x_BTD = self._block(number, x_BTD)
            return x_BTD

        return forward

    def in_blocks(self, memories: dict[int, EngramMemory]) -> Forward:
        """A forward whose blocks look up their own rows."""

        def forward(ids_BT: torch.Tensor) -> torch.Tensor:
            x_BTD = self._embed(ids_BT)
            for number in range(BLOCKS):
                if number in LAYERS:
                    memory = memories[number]
                    lookup = memory.lookup(ids_BT, memory.state(len(ids_BT)))
                    x_BTD = memory.fuse(number, x_BTD, lookup)
                x_BTD = self._block(number, x_BTD)
            return x_BTD

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


def take_turns(
    made: dict[str, Forward], shape: tuple[int, int], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each forward in each round; one round before them is not counted."""
    generator = torch.Generator().manual_seed(2)
    shuffle = random.Random(3).shuffle
    order = list(made)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    with torch.no_grad():
        for _ in range(rounds + 1):
            shuffle(order)
            for name in order:
                ids_BT = torch.randint(1, VOCAB, shape, generator=generator)
                begun = time.perf_counter()
                made[name](ids_BT)
                seconds[name].append(time.perf_counter() - begun)
    return {name: values[1:] for name, values in seconds.items()}


def more(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """Median of what a forward takes more than `base` in its round; its standard error."""
    pairs = zip(seconds[name], seconds[base], strict=True)
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
    seconds = take_turns(forwards(Decoder(shape[1], known, probe), probe), shape, rounds)
    from_ram = statistics.median(seconds[RAM])
    block = from_ram / BLOCKS if known is None else known
    rows = []
    for delay in DELAYS[1:]:
        tier = Tier(f"{delay} s", "a pause", 0, delay, math.inf)
        expected = planned(tier, shape, block)
        for name_of, what in ((_ahead, expected.exposed), (_in_blocks, expected.synchronous)):
            name = name_of(delay)
            rows.append(Row(name, what, *more(seconds, name, name_of(0.0))))
    show(f"{title}, {block * 1e3:.2f} ms a block", rows, from_ram)
    for name in (_ahead(0.0), _in_blocks(0.0)):
        found, error = more(seconds, name, RAM)
        print(f"{name}: {found * 1e3:.2f} +- {error * 1e3:.2f} ms more than RAM")
    return rows


def show(title: str, rows: list[Row], forward: float) -> None:
    print(f"\n### {title}, {forward * 1e3:.1f} ms a forward from RAM\n")
    print("| rows | planned ms | measured ms | difference | allowed | holds |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        difference = (row.measured - row.planned) * 1e3
        print(
            f"| {row.name} | {row.planned * 1e3:.2f} | {row.measured * 1e3:.2f} "
            f"+- {row.error * 1e3:.2f} | {difference:+.2f} | {row.tolerance * 1e3:.2f} | "
            f"{'yes' if row.off <= 1 else 'NO'} |",
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
        for title, shape in SHAPES.items():
            decoder = Decoder(shape[1], KNOWN, probe)
            memory = EngramMemory(
                Table.open(path).config, VocabMap.identity(VOCAB), f"file:{path}?direct=1"
            ).eval()
            whole = config_of(LAYERS)
            made = {RAM: decoder.ahead(memory_of(whole, ram(whole)))}
            made["disk, ahead"] = decoder.ahead(memory)
            seconds = take_turns(made, shape, rounds)
            expected = planned(found.tier, shape, KNOWN)
            row = Row("disk, ahead", expected.exposed, *more(seconds, "disk, ahead", RAM))
            show(f"{title}, a table on disk", [row], statistics.median(seconds[RAM]))
            memory.close()


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
