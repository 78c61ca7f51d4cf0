"""What an attached memory costs: prefill and cached decoding of one model, with its memory and without it.

    python bench/attach.py [--rounds 9] [--tokens 64] [--threads 1]

A Llama of 135 M parameters (random weights in float32, the shape of SmolLM2-135M), a table of 77 M parameters over two
of its layers. The same memory is attached and detached in turns: for each prompt, and while decoding for each token, so
that noise meets both alike; which of the two comes first alternates too. Medians; the difference is the median of the
pairs' differences. At the end, the parts of a decoded token's difference, each by itself and in warm caches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import engraphy
from engraphy import EngramConfig, EngramMemory

PROMPT = 512
WITH, WITHOUT = "with memory", "without"
CALLS = 200  # of a part in a row, per turn


def model_and_memory() -> tuple[Any, EngramMemory]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    memory = engraphy.attach(model, EngramConfig.for_model(config, rows_per_head=150_000))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model, engraphy.detach(model)


def taking_turns(model: Any, memory: EngramMemory, run: Callable[[str], object], count: int) -> dict[str, list[float]]:
    """Seconds of `run` with the memory attached and without it, `count` times each; a first time is not counted."""
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
    return taking_turns(model, memory, lambda _: model(ids, use_cache=True, logits_to_keep=1), rounds)


def decode(model: Any, memory: EngramMemory, tokens: int) -> dict[str, list[float]]:
    """Greedy steps after a prompt of PROMPT tokens, with a cache for each of the two."""
    caches = {name: DynamicCache(config=model.config) for name in (WITH, WITHOUT)}
    last = {name: torch.randint(3, 49_152, (1, PROMPT)) for name in caches}

    def step(name: str) -> None:
        logits = model(last[name], past_key_values=caches[name], logits_to_keep=1).logits
        last[name] = logits[:, -1:].argmax(-1)

    return taking_turns(model, memory, step, tokens)  # the first turn, not counted, is the prompt


def parts(memory: EngramMemory, rounds: int) -> dict[str, float]:
    """Median milliseconds of a decoded token's look-up (of all layers) and of one layer's application."""
    layer, state = memory.layers[0], memory.state(1)
    ids, x = torch.randint(3, 49_152, (1, 1)), torch.randn(1, 1, 1, memory.config.layer.hidden_size)
    seconds: dict[str, list[float]] = {"look-up": [], "layer": []}
    for _ in range(rounds * CALLS):
        begun = time.perf_counter()
        lookup = memory.lookup(ids, state)
        looked_up = time.perf_counter()
        memory.apply(layer, x, lookup)
        seconds["layer"].append(time.perf_counter() - looked_up)
        seconds["look-up"].append(looked_up - begun)
        for other in memory.layers[1:]:
            memory.apply(other, x, lookup)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def report(name: str, seconds: dict[str, list[float]], tokens: int, layers: int) -> None:
    """tokens: that one of the timed calls computes."""
    both, bare = (statistics.median(seconds[key]) * 1e3 / tokens for key in (WITH, WITHOUT))
    pairs = [a - b for a, b in zip(seconds[WITH], seconds[WITHOUT], strict=True)]
    more = statistics.median(pairs) * 1e3 / tokens
    print(f"{name:8}{both:12.4f}{bare:12.4f}{1e3 / both:12.1f}{1e3 / bare:12.1f}{more / layers:14.4f}"
          f"{1 + more / bare:9.3f}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens with the memory, and as many without")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, memory = model_and_memory()
    layers = len(memory.layers)

    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {options.threads} threads; "
          f"memory at layers {list(memory.layers)}: {engraphy.hf.cost(memory.config)}")
    print(f"{'':8}{'ms a token':>24}{'tokens/s':>24}{'ms more a':>14}{'ratio':>9}")
    print(f"{'':8}{'with':>12}{'without':>12}{'with':>12}{'without':>12}{'memory layer':>14}")
    report("prefill", prefill(model, memory, options.rounds), PROMPT, layers)
    report("decode", decode(model, memory, options.tokens), 1, layers)
    apart = parts(memory, options.rounds)
    print(f"a decoded token, by itself: look-up {apart['look-up']:.4f} ms for all memory layers, "
          f"a layer {apart['layer']:.4f} ms")


if __name__ == "__main__":
    main()
