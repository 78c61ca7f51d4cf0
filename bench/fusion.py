"""The share of the fusion layer in training and in prefill, and where its time goes.

    python bench/fusion.py [--rounds 6] [--threads 1] [--json FILE]

Training: steps of the reference model with a memory, at the demo's own sizes and with every width
four times as large (D = 512, rows as wide as `EngramConfig.for_model` chooses them). The parts are
clocked inside the step. The layer is the fusion forward and backward, by the native pass and by the
formula in plain torch, in turns. The limit is the layer's matrix products alone, on tensors of the
same shapes: those of the projections, forward and backward.

Prefill: a Llama of 135 M parameters (random weights, the shape of SmolLM2-135M) reads a prompt of
512 tokens with an attached memory of `EngramConfig.for_model`'s defaults and without it, in turns.
Parts are clocked in the hooks. The limit is the projections alone.

All figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claim, median_and_error, write
from llama import llama_135m
from probe import machine
from reference import VOCAB, documents

import engraphy
from engraphy import EngramConfig, EngramMemory, LayerSpec, VocabMap
from engraphy.data.packing import Batches
from engraphy.fusion import chunk
from engraphy.lm import LM, LMConfig, demo_config, three_arms
from engraphy.lm.loop import Run, TrainConfig

WIDER = 4  # times the demo's widths
BATCH = (16, 128)  # rows and tokens of a training step: the demo's
PROMPT = 512
KINDS = ("native", "plain")  # of the layer


class Clocks:
    """Seconds of named parts, added up until they are taken."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, clocked."""

        def clocked(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(name, time.perf_counter() - begun)

        return clocked

    def taken(self) -> dict[str, float]:
        seconds = self.seconds
        self.seconds = {}
        return seconds


def demo_sizes() -> tuple[LMConfig, EngramConfig]:
    """The demo's model and memory."""
    arm = three_arms(demo_config(VOCAB), VOCAB, 0).memory
    assert arm.memory is not None
    return arm.model, arm.memory


def wide_sizes() -> tuple[LMConfig, EngramConfig]:
    """The demo's model with wider layers, and a memory as wide as `for_model` makes it."""
    model, memory = demo_sizes()
    names = ("hidden_size", "ffn", "expert_ffn", "shared_ffn", "heads")
    model = dataclasses.replace(model, **{name: WIDER * getattr(model, name) for name in names})
    dim = model.hidden_size // 2 // memory.hash.columns
    layer = LayerSpec(model.hidden_size, memory.hash.columns * dim, order=memory.hash.order)
    return model, EngramConfig(memory.hash, layer, dim)


def make_run(sizes: tuple[LMConfig, EngramConfig], dtype: str) -> Run:
    torch.manual_seed(0)
    memory = EngramMemory(sizes[1], VocabMap.identity(VOCAB))
    memory.init_rows(0.02, 0)
    batches = Batches(documents(1000), end_id=0, seed=0)
    return Run(LM(sizes[0], memory), batches, TrainConfig(tokens=10**9, dtype=dtype))


def clock_parts(run: Run, clocks: Clocks) -> None:
    """Clocks the memory's parts of each step from now on. Rows are taken before the layer runs."""
    memory = run.model.memory
    assert memory is not None and run.pair.rows is not None
    fuse = memory.fuse

    def clocked_fuse(layer: int, x_BTSD: torch.Tensor, lookup: Any) -> torch.Tensor:
        begun = time.perf_counter()
        lookup.rows[layer]
        taken = time.perf_counter()
        out_BTSD = fuse(layer, x_BTSD, lookup)
        clocks.add("look-up", taken - begun)
        clocks.add("fusion forward", time.perf_counter() - taken)
        if not out_BTSD.requires_grad:
            return out_BTSD
        # Gradients arrive at the output first, and leave at x, with nothing else between.
        start = [0.0]
        out_BTSD.register_hook(lambda _: start.__setitem__(0, time.perf_counter()))
        x_BTSD.register_hook(
            lambda _: clocks.add("fusion backward", time.perf_counter() - start[0])
        )
        return out_BTSD

    replaced: Any = memory
    replaced.lookup = clocks.around("look-up", memory.lookup)
    replaced.fuse = clocked_fuse
    replaced.add_row_grad = clocks.around("row gradients", memory.add_row_grad)
    rows: Any = run.pair.rows
    rows.step = clocks.around("row optimiser", rows.step)


@contextlib.contextmanager
def plain_layer(plain: bool) -> Iterator[None]:
    """Inside, the layer is the formula in plain torch, if `plain`."""
    runs = chunk.runs
    replaced: Any = chunk
    if plain:
        replaced.runs = lambda *_: False
    try:
        yield
    finally:
        replaced.runs = runs


def train_parts(
    sizes: tuple[LMConfig, EngramConfig], dtype: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of the parts of a training step, "step" the whole, with the native layer and
    with the plain one, in turns."""
    runs = {name: make_run(sizes, dtype) for name in KINDS}
    clocks = Clocks()
    for run in runs.values():
        clock_parts(run, clocks)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    for turn in range(rounds + 2):
        for name in KINDS if turn % 2 else reversed(KINDS):
            with plain_layer(name == "plain"):
                begun = time.perf_counter()
                runs[name].step()
                step = time.perf_counter() - begun
            parts = clocks.taken()
            parts["fusion backward"] -= parts["row gradients"]  # which is handed over in between
            steps[name].append({"step": step, **parts})
    for run in runs.values():
        assert run.model.memory is not None
        run.model.memory.close()
    return {name: medians(rounds[2:]) for name, rounds in steps.items()}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(values[name] for values in rounds) for name in rounds[0]}


def products(spec: LayerSpec, tokens: int, dtype: torch.dtype, backward: bool) -> float:
    """Median seconds of a layer's matrix products alone: of the projections, and of their
    gradients."""
    outputs = (spec.streams + 1) * spec.hidden_size
    weight = torch.randn(outputs, spec.width).to(dtype)
    rows_NE = torch.randn(tokens, spec.width).to(dtype)
    grad = torch.randn(tokens, outputs).to(dtype)

    def run() -> None:
        rows_NE @ weight.T
        if backward:
            grad @ weight
            grad.T @ rows_NE

    seconds = []
    for _ in range(9):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def report_training(name: str, goal: float, dtype: str, rounds: int) -> list[Claim]:
    """Prints where the time of a step goes, and returns what is claimed. goal: in percent."""
    sizes = demo_sizes() if name == "demo" else wide_sizes()
    model, memory = sizes
    found = train_parts(sizes, dtype, rounds)
    limit = products(memory.layer, BATCH[0] * BATCH[1], getattr(torch, dtype), backward=True)
    title = f"training, {name}: D {model.hidden_size}, E {memory.layer.width}, 16 x 128, {dtype}"
    print(f"{title:52}{'native':>18}{'plain':>20}")
    for parts in found.values():
        memory_parts = [value for part, value in parts.items() if part != "step"]
        parts["the layer"] = parts["fusion forward"] + parts["fusion backward"]
        parts["the memory"] = sum(memory_parts)
        parts["matrix products alone"] = limit
    for part in found["native"]:
        cells = [
            f"{parts[part] * 1e3:9.2f} ms{parts[part] / parts['step'] * 100:6.2f} %"
            for parts in found.values()
        ]
        print(f"  {part:50}{'  '.join(cells)}")
    native = found["native"]
    share = native["the layer"] / native["step"] * 100
    return [
        Claim(
            f"the layer's share of a training step, {name} ({dtype})",
            share,
            unit="%",
            goal=goal,
            sense="at most",
            limit=limit / native["step"] * 100,
        ),
        Claim(
            f"the layer in training beside the plain one, {name} ({dtype})",
            found["plain"]["the layer"] / native["the layer"],
        ),
    ]


def attached(dtype: torch.dtype) -> tuple[Any, EngramMemory]:
    """The Llama, and its memory, which is not attached."""
    model, config = llama_135m()
    model = model.to(dtype).eval()
    memory = engraphy.attach(model, EngramConfig.for_model(config))
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    engraphy.detach(model)
    return model, memory


def clock_hooks(model: Any, memory: EngramMemory, clocks: Clocks) -> list[Any]:
    """Clocks the attached memory's hooks."""
    begun = [0.0]

    def start(*_: Any) -> None:
        begun[0] = time.perf_counter()

    def stop(name: str) -> Callable[..., None]:
        return lambda *_: clocks.add(name, time.perf_counter() - begun[0])

    decoder = model.model
    handles = []
    modules = [("look-up", decoder)]
    modules += [("fusion and rows", decoder.layers[layer]) for layer in memory.layers]
    for name, module in modules:
        handles.append(module.register_forward_pre_hook(start, prepend=True))
        handles.append(module.register_forward_pre_hook(stop(name)))
    return handles


@torch.no_grad()
def report_prefill(dtype_name: str, rounds: int, goal: float) -> list[Claim]:
    """Prints where the time of a prompt goes, and returns what is claimed. goal: in percent."""
    dtype = getattr(torch, dtype_name)
    model, memory = attached(dtype)
    ids = torch.randint(3, 49_152, (1, PROMPT))
    clocks = Clocks()
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    parts: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        for name in ("with", "without") if turn % 2 else ("without", "with"):
            handles = []
            if name == "with":
                engraphy.attach(model, memory)
                handles = clock_hooks(model, memory, clocks)
            begun = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            seconds[name].append(time.perf_counter() - begun)
            if name == "with":
                for handle in handles:
                    handle.remove()
                engraphy.detach(model)
                parts.append(clocks.taken())
    pairs = np.subtract(seconds["with"], seconds["without"])[1:] / np.array(seconds["with"][1:])
    share, error = median_and_error(pairs * 100)
    whole = statistics.median(seconds["with"][1:])
    layers = len(memory.layers)
    limit = layers * products(memory.config.layer, PROMPT, dtype, backward=False)
    print(f"prefill of 1 x {PROMPT}, {dtype_name}, {layers} memory layers: {whole * 1e3:.1f} ms")
    for part, value in medians(parts[1:]).items():
        print(f"  {part:24}{value * 1e3:9.2f} ms{value / whole * 100:8.2f} %")
    print(f"  {'projections alone':24}{limit * 1e3:9.2f} ms{limit / whole * 100:8.2f} %")
    print(f"  {'with less without':24}{share / 100 * whole * 1e3:9.2f} ms{share:8.2f} %")
    inside = sum(medians(parts[1:]).values()) / whole * 100
    return [
        Claim(
            f"prefill of 135M, (with - without) / with ({dtype_name})",
            share,
            unit="%",
            goal=goal,
            sense="at most",
            limit=limit / whole * 100,
            error=error,
        ),
        Claim(
            f"prefill of 135M, in the memory's hooks ({dtype_name})",
            inside,
            unit="%",
            goal=goal,
            sense="at most",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="writes the claims to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    claims = []
    for name, goal, dtype in (
        ("demo", 8.0, "float32"),
        ("demo", 8.0, "bfloat16"),
        ("wide", 5.0, "float32"),
    ):
        # A wide step takes seconds, and varies less.
        rounds = options.rounds if name == "demo" else options.rounds // 2 + 1
        claims += report_training(name, goal, dtype, rounds)
    for dtype in ("float32", "bfloat16"):
        claims += report_prefill(dtype, options.rounds, 5.0)
    write(options.json, "fusion", machine(Path.cwd()), claims)


if __name__ == "__main__":
    main()
