"""One server of a rack, for rack_pool.py, rack_engines.py and bench/pool.py: reads rows, runs the
memory layers.

    python -m tests.tools.rack_server ADDRESS PORT ROWS_PER_HEAD NAME=URL...

It opens the stores of every URL, says over TCP what that took, and then does what a connection asks
for, one JSON line each, until the connection ends:

    {"run": NAME, "seconds": 1.0, "seed": 0, "fuse": true}
                                -> tokens and seconds of batches that it looked up, and fused
    {"rows": NAME, "seed": 0}   -> SHA-256 of rows of each layer that the seed draws
    {"memory": PREFIX}          -> bytes of mappings of files below PREFIX: Rss and Pss
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engraphy import (
    EngramConfig,
    EngramMemory,
    HashSpec,
    LayerSpec,
    RowFormat,
    VocabMap,
    set_threads,
)
from engraphy.plan import TIERS, Tier
from engraphy.store import RowStore, WrapperStore, open_store

LAYERS = (1, 14)
VOCAB = 4096
FORMAT = RowFormat("fp8", 256)  # V4.1's rows: 264 bytes, 24 of them a token and layer
HIDDEN = 256  # V4.1 has 5120 and four streams: eight of those are too much for a small machine
SEQUENCES, TOKENS = 8, 8  # 64 tokens, as a decoding step of 64 sequences reads: 3,072 rows
MODELLED = "modelled"
IN_FLIGHT = 16  # cache lines that one core has under way


def config_of(rows_per_head: int) -> EngramConfig:
    """A memory with V4.1's orders, heads and rows, and fewer of them."""
    spec = HashSpec.demo(LAYERS, (2, 3, 4), 8, rows_per_head, VOCAB, pad_id=0)
    layer = LayerSpec(HIDDEN, spec.columns * FORMAT.d, order=spec.order)
    return EngramConfig(spec, layer, FORMAT.d)


class Modelled(WrapperStore):
    """Rows that come after the pause that published figures of CXL give: no measurement of CXL."""

    def __init__(self, store: RowStore, tier: Tier) -> None:
        super().__init__(store)
        self._tier = tier

    def _gather(self, ids_N: np.ndarray, out_NR: np.ndarray) -> None:
        until = time.perf_counter() + self._tier.seconds(len(ids_N), out_NR.shape[1])
        super()._gather(ids_N, out_NR)
        time.sleep(max(0.0, until - time.perf_counter()))


class Ways:
    """The stores of each URL, and a memory over each.

    Args:
        source: rows per head of a memory like V4.1's, or the folder of a saved one.
        urls: NAME -> URL.

    Attributes:
        opened: NAME -> seconds that opening its stores took, all pages mapped.
    """

    def __init__(self, source: int | Path, urls: dict[str, str]) -> None:
        self.opened: dict[str, float] = {}
        self._memories: dict[str, EngramMemory] = {}
        for name, url in urls.items():
            torch.manual_seed(0)
            begun = time.perf_counter()
            if isinstance(source, Path):
                memory = EngramMemory.load(source, url)
            else:
                config = config_of(source)
                stores = {layer: open_store(url, layer=layer) for layer in LAYERS}
                self.opened[name] = time.perf_counter() - begun
                if name == MODELLED:
                    tier = TIERS["cxl"].limited(IN_FLIGHT)
                    stores = {layer: Modelled(store, tier) for layer, store in stores.items()}
                memory = EngramMemory(config, VocabMap.identity(VOCAB), stores)
            for first in self._memories.values():
                memory.blocks = first.blocks  # the same weights, once
            self._memories[name] = memory.eval()

    def run(self, name: str, seconds: float, seed: int, fuse: bool) -> dict[str, float]:
        """Looks up batches of 64 tokens, and runs the memory layers, until the time is over."""
        memory = self._memories[name]
        generator = torch.Generator().manual_seed(seed)
        vocab_size = memory.vocab.raw_size
        x_BTSD = torch.randn(SEQUENCES, TOKENS, 1, memory.config.layer.hidden_size)
        tokens = 0
        begun = time.perf_counter()
        with torch.no_grad():
            while time.perf_counter() - begun < seconds:
                ids_BT = torch.randint(1, vocab_size, (SEQUENCES, TOKENS), generator=generator)
                lookup = memory.lookup(ids_BT)
                for layer in memory.layers:
                    if fuse:
                        memory.fuse(layer, x_BTSD, lookup)
                    else:
                        lookup.rows[layer]
                tokens += ids_BT.numel()
        return {"tokens": tokens, "seconds": time.perf_counter() - begun}

    def rows(self, name: str, seed: int) -> dict[str, str]:
        """SHA-256 of the rows of each layer that a seed draws."""
        return {
            str(layer): hashlib.sha256(store.gather(drawn(store.info.rows, seed))).hexdigest()
            for layer, store in self._memories[name].stores.items()
        }


def drawn(rows: int, seed: int) -> np.ndarray:
    """10,000 row ids."""
    return np.random.default_rng(seed).integers(0, rows, 10_000)


def mapped(prefix: str, process: str = "self") -> dict[str, int]:
    """Bytes of a process's mappings of files below a path, as the system counts them for it."""
    sizes = {"Rss": 0, "Pss": 0}
    ours = False
    for words in map(str.split, Path(f"/proc/{process}/smaps").read_text().splitlines()):
        if "-" in words[0] and ":" not in words[0]:
            ours = words[-1].startswith(prefix)
        elif ours and words[0][:-1] in sizes:
            sizes[words[0][:-1]] += int(words[1]) * 1024
    return sizes


def answer(ways: Ways, asked: dict[str, Any]) -> Any:
    if "run" in asked:
        return ways.run(asked["run"], asked["seconds"], asked["seed"], asked["fuse"])
    if "rows" in asked:
        return ways.rows(asked["rows"], asked["seed"])
    return mapped(asked["memory"])


def serve(address: str, port: int, source: int | Path, urls: dict[str, str]) -> None:
    """Opens the stores, and answers one connection until it ends."""
    torch.set_num_threads(1)
    set_threads(1)
    ways = Ways(source, urls)
    with socket.create_server((address, port)) as listener:
        connection, _ = listener.accept()
    with connection, connection.makefile("rw") as lines:
        print(json.dumps({"opened": ways.opened}), file=lines, flush=True)
        for line in lines:
            print(json.dumps(answer(ways, json.loads(line))), file=lines, flush=True)


def main() -> None:
    address, port, rows_per_head, *pairs = sys.argv[1:]
    serve(address, int(port), int(rows_per_head), dict(pair.split("=", 1) for pair in pairs))


if __name__ == "__main__":
    main()
