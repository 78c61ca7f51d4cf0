"""What reading ahead hides when the table of a Qwen4-Exp model is served from a store.

    python bench/serve.py [--rounds 32] [--prompts 3] [--delay 1.0] [--threads 1] [--json FILE]

A model of 8 blocks and random weights, with tables at blocks 0, 2 and 6. Five copies share its
weights and take turns, for each prompt of 256 tokens and for each decoded token, in an order that
is drawn each time: the table as the model's own embedding; and served from RAM, without a delay and
with one of a millisecond a read, in each case read in the block (as if nothing were known before)
and read ahead. All give the same logits, bit for bit, or the benchmark ends.

Clocks stand around the look-up module of each table. What is read in the block is clocked there in
full; what is read ahead, as far as its block had to wait. So hidden = 1 - waited / read. Block 0
has only its own hashing to hide behind.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claim, median_and_error, write
from delays import Delayed
from probe import machine
from transformers import DynamicCache, Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from engraphy import RowFormat
from engraphy.hf.qwen4 import serve_table
from engraphy.hf.served import ServedRows, ServedTable
from engraphy.hf.versions import cache_argument
from engraphy.spec.config import EngramConfig
from engraphy.store import RamStore
from engraphy.store.base import RowStore
from engraphy.store.group import StoreGroup

VOCAB, PROMPT = 4096, 256
BLOCKS_WITH_TABLE = (0, 2, 6)
EMBEDDING = "the model's embedding"
IN_BLOCK, AHEAD = "in the block", "ahead"
CACHE = str(cache_argument(inspect.signature(Qwen4ExpForCausalLM.forward).parameters))


class Copy:
    """One of the copies: its model, and the seconds that its look-ups took, by block."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None
        self.lookups: dict[int, list[float]] = {block: [] for block in BLOCKS_WITH_TABLE}
        for block in BLOCKS_WITH_TABLE:
            module = model.model.layers[block].ple.ple_embedding.ngram_embedding
            begun: list[float] = []
            module.register_forward_pre_hook(
                lambda *_, begun=begun: begun.append(time.perf_counter())
            )
            module.register_forward_hook(
                lambda *_, begun=begun, block=block: self.lookups[block].append(
                    time.perf_counter() - begun.pop()
                )
            )

    def forward(self, ids_BT: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Seconds and logits of the tokens after those in the cache."""
        begun = time.perf_counter()
        out = self.model(ids_BT, **{CACHE: self.cache}, logits_to_keep=1)
        return time.perf_counter() - begun, out.logits

    def restart(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def forget(self) -> None:
        for seconds in self.lookups.values():
            seconds.clear()


def make_model() -> Any:
    torch.manual_seed(0)
    config = Qwen4ExpTextConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        hc_lowrank=16,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=64,
        indexer_budget=1024,
        indexer_compress_ratio=4,
        ple_layer_ids=[block + 1 for block in BLOCKS_WITH_TABLE],
        ple_embed_dim=1024,
        heads_per_ngram=8,
        ngram_vocab_size_base=20_000,
        eos_token_id=4,
    )
    model = Qwen4ExpForCausalLM(config).eval()
    for block in BLOCKS_WITH_TABLE:
        torch.nn.init.normal_(model.model.layers[block].ple.conv1d.weight, std=0.05)
    return model


def make_copies(model: Any, delay: float) -> dict[str, Copy]:
    """The copies by name. They share their weights."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    fmt = RowFormat("f32", EngramConfig.from_hf(model.config).dim)
    made = {EMBEDDING: Copy(copy.deepcopy(model, dict(shared)))}
    for seconds, where in ((0.0, "RAM"), (delay, f"RAM + {delay * 1e3:g} ms")):
        for serve in (serve_in_block, serve_ahead):
            served = copy.deepcopy(model, dict(shared))
            serve(served, _stores(model, fmt, seconds), fmt)
            made[f"{where}, {IN_BLOCK if serve is serve_in_block else AHEAD}"] = Copy(served)
    return made


def serve_ahead(model: Any, stores: dict[int, RowStore], fmt: RowFormat) -> None:
    serve_table(model, stores, fmt)


def serve_in_block(model: Any, stores: dict[int, RowStore], fmt: RowFormat) -> None:
    """Like serve_table, without the hooks that read ahead."""
    table = ServedTable(StoreGroup(stores, fmt), EngramConfig.from_hf(model.config).hash)
    for layer in stores:
        ple = model.model.layers[layer].ple
        module = ple.ple_embedding
        module.ngram_embedding = ServedRows(
            table, layer, ple.norm_key.weight, module.ngram_embedding
        )


def _stores(model: Any, fmt: RowFormat, delay: float) -> dict[int, RowStore]:
    stores: dict[int, RowStore] = {}
    for block in BLOCKS_WITH_TABLE:
        weight = model.model.layers[block].ple.ple_embedding.ngram_embedding.weight
        store = RamStore(len(weight), fmt.row_bytes)
        store.scatter(np.arange(len(weight)), fmt.encode(weight.detach().numpy()))
        stores[block] = Delayed(store, delay) if delay else store
    return stores


def take_turns(
    copies: dict[str, Copy], next_ids: Callable[[torch.Tensor | None], torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each copy and round. All copies get the same ids and have to give equal logits."""
    order = list(copies)
    shuffle = random.Random(1).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in copies}
    logits = None
    for _ in range(rounds):
        ids_BT = next_ids(logits)
        shuffle(order)
        found = {}
        for name in order:
            taken, found[name] = copies[name].forward(ids_BT)
            seconds[name].append(taken)
        logits = found[EMBEDDING]
        for name, values in found.items():
            if not torch.equal(values, logits):
                raise SystemExit(f"{name}: the logits are not those of {EMBEDDING}")
    return seconds


def report(title: str, seconds: dict[str, list[float]], copies: dict[str, Copy]) -> list[Claim]:
    """Prints a table, and returns what it claims."""
    print(
        f"\n### {title}\n\n| rows | ms | of the embedding's | ms in the look-up of blocks ", end=""
    )
    print(", ".join(map(str, BLOCKS_WITH_TABLE)), "|\n|---|---|---|---|")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    waits = {
        name: [statistics.median(copied.lookups[block]) for block in BLOCKS_WITH_TABLE]
        for name, copied in copies.items()
    }
    for name, median in medians.items():
        looked_up = ", ".join(f"{wait * 1e3:.3f}" for wait in waits[name])
        ratio = median / medians[EMBEDDING]
        print(f"| {name} | {median * 1e3:.2f} | {ratio:.3f} | {looked_up} |")
    claims = []
    _, _, in_ram, in_block, ahead = copies  # in the order of make_copies
    for number, block in enumerate(BLOCKS_WITH_TABLE):
        hidden = 100 * (1 - waits[ahead][number] / waits[in_block][number])
        what = f"{title}, read of block {block} hidden"
        claims.append(Claim(what, hidden, "%"))
    for name in (ahead, in_ram):
        ratio, error = median_and_error(np.divide(seconds[name], seconds[EMBEDDING]))
        what = f"{title}, {name}, beside the embedding"
        claims.append(Claim(what, ratio, error=error))
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=32, help="decoded tokens")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--delay", type=float, default=1.0, help="milliseconds")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, help="writes what is claimed to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(Path(tempfile.gettempdir()))
    print(" | ".join(f"{key} {value}" for key, value in where.items()))

    copies = make_copies(make_model(), options.delay / 1e3)
    generator = torch.Generator().manual_seed(2)
    claims = []

    def prompt(_: torch.Tensor | None) -> torch.Tensor:
        for copied in copies.values():
            copied.restart()
        return torch.randint(5, VOCAB, (1, PROMPT), generator=generator)

    def token(logits: torch.Tensor | None) -> torch.Tensor:
        return torch.tensor([[7]]) if logits is None else logits[:, -1].argmax(-1)[:, None]

    titles = {"a prompt of 256 tokens": (prompt, options.prompts)}
    titles["a decoded token"] = (token, options.rounds)
    with torch.no_grad():
        for title, (next_ids, rounds) in titles.items():
            take_turns(copies, next_ids, 1)  # not counted
            for copied in copies.values():
                copied.forget()
            claims += report(title, take_turns(copies, next_ids, rounds), copies)
    write(options.json, "serve", where, claims)


if __name__ == "__main__":
    main()
