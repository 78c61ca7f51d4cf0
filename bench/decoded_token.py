"""One decoded token: what a memory takes between the blocks of a model, caches cold.

    python bench/decoded_token.py [--rounds 40] [--json FILE]

A memory with the columns of `EngramConfig.for_model` (2 layers, 16 columns each), rows in a RAM
table of 2 GB, hidden size 576 and 2048, weights in float32 and bfloat16, batch 1, one thread.
Around it runs the rest of a model: the matrix products, norms and sums of 30 blocks of the shape of
SmolLM2-135M, 212 MB of weights in bfloat16 and 425 MB in float32, without attention. So the memory
finds the caches as it does between the blocks of a model: the look-up before the first block, the
layers before the second and the fifteenth.

Three kinds of tokens take turns: with the memory; with the C probe in its place, which touches as
many rows where the look-up would be, and reads the dense weights of a layer once where the layer
would be; and with the native calls of the memory alone. The goals are ratios of medians:

- the look-up beside one native call from Python that touches as many cold rows;
- look-up, fusion and state together beside the time in which the dense weights stream from memory.

With mapped tables of 1 and of 100 shards a layer, in the page cache, the look-up alone is measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from claims import Claim, median_and_error, write
from probe import Probe, machine
from torch import Tensor

from engraphy import EngramConfig, EngramMemory, VocabMap, _native
from engraphy.table import Table

VOCAB = 49_152
BLOCKS = 30
TABLE_BYTES = 2 << 30
FILE_ROWS = 100_000  # of a head, in mapped tables
AHEAD = (0, 4096)  # bytes that the probe fetches ahead: the faster one is the limit
HIDDEN = 576  # of the rest of the model
SHAPES = (
    [(HIDDEN, HIDDEN), (192, HIDDEN), (192, HIDDEN), (HIDDEN, HIDDEN)]
    + [(1536, HIDDEN), (1536, HIDDEN), (HIDDEN, 1536)]
)  # fmt: skip


class Rest:
    """The blocks of a model without attention. Each reads its weights from memory once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._weights = [
            [torch.randn(shape).mul_(0.02).to(dtype) for shape in SHAPES] for _ in range(BLOCKS)
        ]
        self._norm = torch.ones(HIDDEN, dtype=dtype)
        self._hidden = torch.randn(1, 1, HIDDEN).to(dtype)

    def run(self, first: int, last: int) -> None:
        """Blocks `first` to `last` - 1."""
        for q, k, v, o, gate, up, down in self._weights[first:last]:
            hidden = self._hidden
            x = F.rms_norm(hidden, (HIDDEN,), self._norm)
            F.linear(x, k)
            F.linear(x, v)
            hidden = hidden + F.linear(F.linear(x, q), o)
            x = F.rms_norm(hidden, (HIDDEN,), self._norm)
            hidden = hidden + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            self._hidden = hidden / hidden.abs().max()


class Subject:
    """A memory, the state of one sequence, and tokens for it."""

    def __init__(self, memory: EngramMemory, dtype: torch.dtype, seed: int) -> None:
        self.memory = memory.eval()
        memory.blocks.to(dtype)
        for parameter in memory.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        self.ids = np.random.default_rng(seed)
        hidden = memory.config.layer.hidden_size
        self.x = torch.randn(1, 1, hidden).to(dtype)
        self.state = memory.state(1)
        prompt = torch.from_numpy(self.ids.integers(1, VOCAB, (1, 16)))
        lookup = memory.lookup(prompt, self.state)
        for layer in memory.layers:
            memory.fuse(layer, torch.randn(1, 16, hidden).to(dtype), lookup)

    def token(self) -> Tensor:
        return torch.from_numpy(self.ids.integers(1, VOCAB, (1, 1)))

    def weights(self, layer: int) -> list[Tensor]:
        return list(self.memory.blocks[str(layer)].parameters())


Clock = Callable[[str, Callable[[], Any]], Any]


class Tokens:
    """Seconds of each part of tokens of one kind."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def clock(self, name: str, run: Callable[[], Any]) -> Any:
        time.perf_counter()  # the clock itself is not cold
        begun = time.perf_counter()
        answer = run()
        self.add(name, time.perf_counter() - begun)
        return answer

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def median(self, *names: str) -> float:
        """Median of the sum of these parts."""
        return statistics.median(self.sums(*names))

    def sums(self, *names: str) -> list[float]:
        return [sum(parts) for parts in zip(*[self.seconds[name] for name in names], strict=True)]


def with_memory(subject: Subject, rest: Rest | None, tokens: Tokens) -> None:
    """One token. rest: None = the caches stay warm."""
    memory, ids = subject.memory, subject.token()
    lookup = tokens.clock("look-up", lambda: memory.lookup(ids, subject.state))
    done = 0
    for layer in memory.layers:
        if rest is not None:
            rest.run(done, layer)
            done = layer
        tokens.clock(f"layer {layer}", lambda at=layer: memory.fuse(at, subject.x, lookup))
    if rest is not None:
        rest.run(done, BLOCKS)


def with_probe(subject: Subject, rest: Rest, probe: Probe, tokens: Tokens, ahead: int) -> None:
    """One token with the C probe in the place of the memory."""
    memory = subject.memory
    stores = list(memory.stores.values())
    shards: list[Any] = [store.pinned[0] for store in stores]  # pyright: ignore
    tables = np.array([shard.ctypes.data for shard in shards], np.uint64)
    columns = memory.config.hash.columns
    ids = np.stack([subject.ids.integers(0, store.info.rows, columns) for store in stores])
    row_bytes = memory.format.row_bytes
    out = np.empty(ids.size * row_bytes, np.uint8)
    seconds = tokens.clock("call", lambda: probe.few(tables, ids, row_bytes, out))
    tokens.add("in C", seconds)
    done = 0
    for layer in memory.layers:
        rest.run(done, layer)
        done = layer
        parts = [(weight.data_ptr(), weight.nbytes) for weight in subject.weights(layer)]
        taken = sum(probe.stream(address, size, ahead) for address, size in parts)
        tokens.add(f"layer {layer}, {ahead} B ahead", taken)
    rest.run(done, BLOCKS)


def native_alone(subject: Subject, rest: Rest, tokens: Tokens) -> None:
    """One token by the native calls alone, without the Python around them."""
    memory, ids, state = subject.memory, subject.token(), subject.state
    cursor = state.cursor()
    native = memory._tokens._known  # pyright: ignore[reportPrivateUsage]
    assert cursor is not None and native is not None
    read = native.reader.read_pinned
    values = tokens.clock("look-up", lambda: read(ids, cursor))
    done = 0
    for number, layer in enumerate(memory.layers):
        rest.run(done, layer)
        done = layer
        block: Any = memory.blocks[str(layer)]
        fuse = block._fuser.plan.fuse_token
        tokens.clock(
            f"layer {layer}",
            lambda n=number, call=fuse: call(n, subject.x, values, cursor),
        )
    rest.run(done, BLOCKS)


def config_for(hidden: int, rows_per_head: int) -> EngramConfig:
    sizes = {"num_hidden_layers": BLOCKS, "hidden_size": hidden, "vocab_size": VOCAB}
    return EngramConfig.for_model({**sizes, "pad_token_id": 0}, rows_per_head=rows_per_head)


def ram_memory(hidden: int) -> EngramMemory:
    row_bytes = config_for(hidden, 1000).dim * 4
    config = config_for(hidden, TABLE_BYTES // row_bytes // 32)
    memory = EngramMemory(config, VocabMap.identity(VOCAB))
    for store in memory.stores.values():
        with store.updating() as shards:
            assert shards is not None
            for shard in shards:
                shard[:] = 0x3C  # every page is touched; the values are 0.0115
    return memory


def in_ram(
    hidden: int, dtype: torch.dtype, rounds: int, memory: EngramMemory, rest: Rest, probe: Probe
) -> list[Claim]:
    """Measures one memory; prints what it found."""
    subject = Subject(memory, dtype, seed=hidden)
    memory_tokens, probe_tokens, native_tokens, warm = Tokens(), Tokens(), Tokens(), Tokens()
    kinds = [
        lambda: with_memory(subject, rest, memory_tokens),
        lambda: native_alone(subject, rest, native_tokens),
        *[lambda a=ahead: with_probe(subject, rest, probe, probe_tokens, a) for ahead in AHEAD],
    ]
    shuffle = random.Random(hidden).shuffle
    for _ in range(3):
        with_memory(subject, rest, Tokens())  # not counted
    for _ in range(rounds):
        shuffle(kinds)
        for kind in kinds:
            kind()
    for _ in range(10 * rounds):
        with_memory(subject, None, warm)
    layers = [f"layer {layer}" for layer in memory.layers]
    whole = ["look-up", *layers]
    streamed = min(
        probe_tokens.median(*[f"{layer}, {ahead} B ahead" for layer in layers]) for ahead in AHEAD
    )
    call, in_c = probe_tokens.median("call"), probe_tokens.median("in C")
    found, native = memory_tokens.median(*whole), native_tokens.median(*whole)
    lookup = memory_tokens.median("look-up")
    kind = str(dtype).removeprefix("torch.")
    dense = sum(weight.nbytes for layer in memory.layers for weight in subject.weights(layer))
    print(f"\nD = {hidden}, {kind}: {dense / 1e6:.1f} MB of dense weights, microseconds")
    print(f"{'':34}{'look-up':>9}{'layer':>9}{'layer':>9}{'all':>9}")
    for title, tokens in (
        ("memory, caches cold", memory_tokens),
        ("its native calls alone, cold", native_tokens),
        ("memory, caches warm", warm),
    ):
        parts = [tokens.median(name) for name in whole]
        print(f"{title:34}" + "".join(f"{x * 1e6:9.1f}" for x in [*parts, tokens.median(*whole)]))
    print(f"{'C: rows touched, weights streamed':34}{in_c * 1e6:9.1f}{'':18}{streamed * 1e6:9.1f}")
    print(f"{'the touching call, from Python':34}{call * 1e6:9.1f}")
    print(
        f"look-up {lookup / call:.2f} times the call, {lookup / in_c:.0f} times its time in C; "
        f"all {found / streamed:.2f} times the stream, its native calls {native / streamed:.2f}; "
        f"share of Python {1 - native / found:.0%}"
    )
    _, error = median_and_error(memory_tokens.sums(*whole))
    _, lookup_error = median_and_error(memory_tokens.sums("look-up"))
    return [
        Claim(
            f"look-up of a token, D {hidden}, {kind}, beside a call that touches the rows",
            lookup / call, goal=3.0, sense="at most",
            error=lookup_error / call,
        ),
        Claim(
            f"memory of a token, D {hidden}, {kind}, beside the stream of its weights",
            found / streamed, goal=1.5, sense="at most", error=error / streamed,
        ),
    ]  # fmt: skip


def mapped(rounds: int, folder: Path, rest: Rest) -> None:
    """Prints the look-up of tables with 1 and with 100 shards a layer, in the page cache."""
    config = config_for(HIDDEN, FILE_ROWS)
    subjects: dict[int, Subject] = {}
    most = max(config.hash.row_count(layer) for layer in config.hash.layer_ids)
    source = EngramMemory(config, VocabMap.identity(VOCAB))
    source.init_rows(std=0.1, seed=0)
    for shards in (1, 100):
        path = folder / str(shards)
        rows = -(-most // shards)
        table = Table.create(path, config, source.format, source.vocab, shard_rows=rows)
        source.stores.copy_to(table)
        table.seal()
        memory = EngramMemory(config, source.vocab, f"file:{path}?read=mmap")
        subjects[shards] = Subject(memory, torch.bfloat16, seed=shards)
    found = {shards: (Tokens(), Tokens()) for shards in subjects}
    for turn in range(rounds + 3):
        for shards, subject in subjects.items():
            cold, warm = found[shards]
            with_memory(subject, rest, cold if turn > 2 else Tokens())
            for _ in range(5):
                with_memory(subject, None, warm)
    print("\nThe look-up of a mapped table, D = 576, microseconds")
    for shards, (cold, warm) in found.items():
        print(
            f"{shards:4} shards a layer: caches cold {cold.median('look-up') * 1e6:6.1f}, "
            f"warm {warm.median('look-up') * 1e6:6.1f}"
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="tokens of each kind")
    parser.add_argument("--json", type=Path, help="write the claims to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _native.set_threads(1)
    torch.manual_seed(0)
    here = machine(Path(tempfile.gettempdir()))
    print(f"{here['cpu']}, {here['cores']} cores, L3 {here['l3']}; {_native.reason}; one thread")
    probe = Probe()
    rests = {dtype: Rest(dtype) for dtype in (torch.bfloat16, torch.float32)}
    claims: list[Claim] = []
    for hidden in (HIDDEN, 2048):
        memory = ram_memory(hidden)
        for dtype, rest in rests.items():
            claims += in_ram(hidden, dtype, options.rounds, memory, rest, probe)
        memory.close()
        del memory
    with tempfile.TemporaryDirectory() as folder:
        mapped(options.rounds // 2, Path(folder), rests[torch.bfloat16])
    write(options.json, "decoded_token", here, claims)


if __name__ == "__main__":
    main()
