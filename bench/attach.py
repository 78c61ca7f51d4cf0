"""The cost of an attached memory: prefill and cached decoding of one model, with its memory and
without it.

    python bench/attach.py [--rounds 9] [--tokens 64] [--threads 1] [--dtype bfloat16] [--table DIR]

A Llama of 135 M parameters (random weights, the shape of SmolLM2-135M), a table of 77 M parameters
in float32 over two of its layers. The same memory is attached and detached in turns, for each
prompt and for each decoded token, so that noise meets both alike. Which of the two comes first
alternates too. The rows are in RAM. With --table they are written to DIR and mapped from there, as
`engraphy.load` does; the page cache holds them. Medians; the difference is the median of the pairs'
differences, with its standard error (bootstrap). The last line is the time that a decoded token
spends inside the memory's hooks. It has no noise of the rest of the model, and leaves out how the
memory slows that down.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import median_and_error
from llama import llama_135m
from transformers import DynamicCache, LlamaForCausalLM

import engraphy
from engraphy import EngramConfig, EngramMemory
from engraphy.hf.versions import cache_argument

PROMPT = 512
# The name of the cache's argument depends on the version of transformers.
CACHE = str(cache_argument(inspect.signature(LlamaForCausalLM.forward).parameters))
WITH = "with memory"
WITHOUT = "without"


def model_and_memory(dtype: torch.dtype, folder: Path | None) -> tuple[Any, EngramMemory]:
    model, config = llama_135m()
    model = model.to(dtype).eval()
    memory = engraphy.attach(model, EngramConfig.for_model(config, rows_per_head=150_000))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    engraphy.detach(model)
    if folder is None:
        return model, memory
    memory.save(folder)
    return model, EngramMemory.load(folder)


def taking_turns(
    model: Any, memory: EngramMemory, run: Callable[[str], object], count: int
) -> dict[str, list[float]]:
    """Seconds of `run` with the memory attached and without it, `count` times each. The first run
    of each is not counted."""
    seconds: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    for turn in range(count + 1):
        for name in (WITH, WITHOUT) if turn % 2 else (WITHOUT, WITH):
            if name is WITH:
                engraphy.attach(model, memory)
            begun = time.perf_counter()
            run(name)
            seconds[name].append(time.perf_counter() - begun)
            if name is WITH:
                engraphy.detach(model)
    return {name: values[1:] for name, values in seconds.items()}


def prefill(model: Any, memory: EngramMemory, rounds: int) -> dict[str, list[float]]:
    ids = torch.randint(3, 49_152, (1, PROMPT))
    return taking_turns(
        model, memory, lambda _: model(ids, use_cache=True, logits_to_keep=1), rounds
    )


def decode(model: Any, memory: EngramMemory, tokens: int) -> dict[str, list[float]]:
    """Seconds of greedy steps after a prompt of PROMPT tokens. Each of the two has its own
    cache."""
    caches = {name: DynamicCache(config=model.config) for name in (WITH, WITHOUT)}
    last = {name: torch.randint(3, 49_152, (1, PROMPT)) for name in caches}

    def step(name: str) -> None:
        logits = model(last[name], **{CACHE: caches[name]}, logits_to_keep=1).logits
        last[name] = logits[:, -1:].argmax(-1)

    return taking_turns(model, memory, step, tokens)  # the first turn, not counted, is the prompt


def in_hooks(model: Any, memory: EngramMemory, tokens: int) -> dict[str, float]:
    """Median milliseconds that a decoded token spends in the memory's hooks: before the decoder,
    before its layers together, and after the decoder."""
    seconds: dict[str, list[float]] = {}
    begun = 0.0

    def start(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def stop(name: str) -> Callable[..., None]:
        return lambda *_: seconds.setdefault(name, []).append(time.perf_counter() - begun)

    engraphy.attach(model, memory)
    decoder = model.model
    cache = DynamicCache(config=model.config)
    last = torch.randint(3, 49_152, (1, PROMPT))
    handles = [
        decoder.register_forward_hook(start, prepend=True),
        decoder.register_forward_hook(stop("after")),
    ]
    layers = [("layers", decoder.layers[layer]) for layer in memory.layers]
    for name, module in [("look-up", decoder), *layers]:
        handles += [
            module.register_forward_pre_hook(start, prepend=True),
            module.register_forward_pre_hook(stop(name)),
        ]
    for _ in range(tokens + 1):
        last = model(last, **{CACHE: cache}, logits_to_keep=1).logits[:, -1:].argmax(-1)
    for handle in handles:
        handle.remove()
    engraphy.detach(model)
    return {
        name: statistics.median(np.reshape(values, (tokens + 1, -1)).sum(1)[1:]) * 1e3
        for name, values in seconds.items()
    }


def report(name: str, seconds: dict[str, list[float]], tokens: int, layers: int) -> None:
    """Prints a line. `tokens` is how many one of the timed calls computes."""
    both, bare = (statistics.median(seconds[key]) * 1e3 / tokens for key in (WITH, WITHOUT))
    differences = np.subtract(seconds[WITH], seconds[WITHOUT]) * 1e3 / tokens
    more, error = median_and_error(differences)
    print(
        f"{name:8}{both:10.3f}{bare:10.3f}{1e3 / both:10.1f}{1e3 / bare:10.1f}"
        f"{more / layers:12.3f} +- {error / layers:5.3f}{1 + more / bare:9.3f}"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tokens", type=int, default=64, help="decoded tokens with the memory, and as many without"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of model and memory"
    )
    parser.add_argument(
        "--table", type=Path, help="a new folder, for rows that are mapped from disk"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, memory = model_and_memory(getattr(torch, options.dtype), options.table)
    layers = len(memory.layers)

    size = sum(parameter.numel() for parameter in model.parameters())
    place = "mapped" if options.table else "in RAM"
    print(
        f"{size / 1e6:.0f} M parameters, {options.dtype}, {options.threads} threads; memory at "
        f"layers {list(memory.layers)}, rows {place}: "
        f"{engraphy.hf.cost(memory.config, dtype=model.dtype)}"
    )
    print(f"{'':8}{'ms a token':>20}{'tokens/s':>20}{'ms more a':>21}{'ratio':>9}")
    print(f"{'':8}{'with':>10}{'without':>10}{'with':>10}{'without':>10}{'memory layer':>21}")
    report("prefill", prefill(model, memory, options.rounds), PROMPT, layers)
    report("decode", decode(model, memory, options.tokens), 1, layers)
    inside = in_hooks(model, memory, options.tokens)
    print(
        f"a decoded token, in the memory's hooks: look-up {inside['look-up']:.3f} ms, its {layers} "
        f"layers {inside['layers']:.3f} ms, after {inside['after']:.3f} ms: "
        f"{sum(inside.values()) / layers:.3f} ms a memory layer"
    )


if __name__ == "__main__":
    main()
