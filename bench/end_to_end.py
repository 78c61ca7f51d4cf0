"""What a memory costs whole: training and serving, with it and without.

    python bench/end_to_end.py [--rounds 9] [--tokens 48] [--threads 1] [--json FILE] [--profile]

1. Training the reference model of the demo: a mixture of experts, and the same with a memory in
   place of a quarter of its experts, at equal total and activated parameters. Steps alternate.
2. Training a Llama of 135 M parameters (random weights, the shape of SmolLM2-135M), all of them,
   with an attached memory and without.
3. Serving that model, greedy, one token at a time after a prompt: without a memory, and with its
   table in RAM, in a mapped file (in the page cache), and in a file read through a row cache.

Ratios are medians of the pairs' ratios with a standard error (bootstrap). --profile prints where
the time of a training step with the memory goes.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from claims import Claim, median_and_error, write
from llama import llama_135m
from probe import machine
from reference import VOCAB, documents
from transformers import DynamicCache, LlamaForCausalLM

import engraphy
from engraphy import EngramConfig, EngramMemory, VocabMap
from engraphy.data.packing import Batches
from engraphy.hf.versions import cache_argument
from engraphy.lm import LM, Arm, demo_config, three_arms
from engraphy.lm.loop import Run, TrainConfig
from engraphy.train import OptimizerPair, RowAdam, warmup_cosine

LLAMA_BATCH = (1, 256)  # rows and tokens of a training step
PROMPT = 64
CACHE = str(cache_argument(inspect.signature(LlamaForCausalLM.forward).parameters))


def reference_run(arm: Arm, vocab: VocabMap) -> Run:
    """A run of the reference model on made-up text, never ending."""
    torch.manual_seed(0)
    memory = None
    if arm.memory is not None:
        memory = EngramMemory(arm.memory, vocab)
        memory.init_rows(0.02, 0)
    batches = Batches(documents(2000), end_id=0, seed=0)
    return Run(LM(arm.model, memory), batches, TrainConfig(tokens=10**9))


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each, `rounds` times, in turns of alternating order; one turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        names = list(runs) if turn % 2 else list(reversed(runs))
        for name in names:
            begun = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begun)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def train_reference(rounds: int) -> list[Claim]:
    """Steps of the reference model at equal parameters."""
    vocab = VocabMap.identity(VOCAB)
    arms = three_arms(demo_config(VOCAB), len(vocab), pad_id=0)
    runs = {"moe": reference_run(arms.moe, vocab), "memory": reference_run(arms.memory, vocab)}
    seconds = alternate({name: run.step for name, run in runs.items()}, 3 * rounds)
    for name, run in runs.items():
        step = statistics.median(seconds[name])
        speed = run.batches.tokens_per_step / step
        print(f"  {name:8}{step * 1e3:8.1f} ms a step{speed:10,.0f} tokens/s")
    found, error = median_and_error(seconds["moe"] / seconds["memory"])
    what = "training, reference model: tokens/s beside equal experts alone"
    return [Claim(what, found, error=error)]


def train_llama(rounds: int) -> list[Claim]:
    """Steps of a 135M Llama, all parameters trained, with the memory attached and without."""
    model, config = llama_135m()
    model.train()
    memory = engraphy.attach(model, EngramConfig.for_model(config, rows_per_head=100_000))
    engraphy.detach(model)
    rows = RowAdam(memory, lr=1e-4)
    dense = torch.optim.AdamW([*model.parameters(), *memory.parameters()], lr=1e-5, fused=True)
    ids = torch.randint(3, config.vocab_size, LLAMA_BATCH)
    pairs = {
        "with": OptimizerPair(dense, rows, warmup_cosine(), 1.0),
        "without": OptimizerPair(dense, None, warmup_cosine(), 1.0),
    }

    def step(name: str) -> None:
        if name == "with":
            engraphy.attach(model, memory)
        model(ids, labels=ids, use_cache=False).loss.backward()
        pairs[name].step(0.5)
        if name == "with":
            engraphy.detach(model)

    seconds = alternate({"with": lambda: step("with"), "without": lambda: step("without")}, rounds)
    memory.close()
    found, error = median_and_error(seconds["without"] / seconds["with"])
    return [Claim("training, Llama of 135 M: tokens/s beside no memory", found, error=error)]


@torch.no_grad()
def serve(tokens: int, folder: Path) -> list[Claim]:
    """Greedy tokens of a 135M Llama: no memory, and the table in RAM, in a file, behind a cache."""
    model, config = llama_135m()
    model.eval()
    memory = engraphy.attach(model, EngramConfig.for_model(config, rows_per_head=150_000))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    engraphy.detach(model)
    memory.save(folder / "memory")
    table = folder / "memory" / "table"
    memories = {
        "RAM": memory,
        "mapped file": EngramMemory.load(folder / "memory"),
        "file, row cache": EngramMemory.load(folder / "memory", f"file:{table}?cache=64MiB"),
    }
    names = ["none", *memories]
    caches = {name: DynamicCache(config=model.config) for name in names}
    last = {name: torch.randint(3, config.vocab_size, (1, PROMPT)) for name in names}

    def step(name: str) -> float:
        if name != "none":
            engraphy.attach(model, memories[name])
        begun = time.perf_counter()
        logits = model(last[name], **{CACHE: caches[name]}, logits_to_keep=1).logits
        last[name] = logits[:, -1:].argmax(-1)
        taken = time.perf_counter() - begun
        if name != "none":
            engraphy.detach(model)
        return taken

    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(tokens + 1):  # the first turn is the prompt
        for name in rng.permutation(names).tolist():
            seconds[name].append(step(name))
    taken = {name: np.array(values[1:]) for name, values in seconds.items()}
    claims = []
    for name, opened in memories.items():
        found, error = median_and_error(taken["none"] / taken[name])
        claims.append(Claim(f"serving, table in {name}: tokens/s of no memory", found, error=error))
        opened.close()
    print(f"  without a memory {1 / np.median(taken['none']):.1f} tokens/s")
    return claims


def profile(steps: int = 20) -> None:
    """Prints the operators that a training step of the reference model with memory spends its time
    in."""
    vocab = VocabMap.identity(VOCAB)
    run = reference_run(three_arms(demo_config(VOCAB), len(vocab), pad_id=0).memory, vocab)
    run.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            run.step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tokens", type=int, default=48, help="decoded tokens of each way to serve"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="print a profile, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engraphy.set_threads(options.threads)
    if options.profile:
        return profile()
    with tempfile.TemporaryDirectory() as folder:
        facts = machine(Path(folder))
        print(f"{facts['cpu']}, {options.threads} threads")
        claims = train_reference(options.rounds)
        claims += train_llama(max(options.rounds // 2, 2))
        claims += serve(options.tokens, Path(folder))
    for claim in claims:
        print(f"  {claim.what:72}{claim.found:8.3f} +- {claim.error:.3f}")
    write(options.json, "end_to_end", facts, claims)


if __name__ == "__main__":
    main()
