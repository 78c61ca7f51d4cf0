"""What one training step and one decoded token allocate, move and call; for `make guard`.

    python -m tests.tools.guard_counts     # JSON: step -> counter -> count

The same model takes the same step with its memory and without. Of allocations the difference is
counted, so that those of the model and of its text do not hide a change. Steps before it, which are
not counted, make what is made once.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import engraphy
from engraphy import EngramConfig, EngramMemory, HashSpec, LayerSpec, VocabMap, _native
from engraphy.data.packing import Batches
from engraphy.hf.versions import cache_argument
from engraphy.lm import LM, LMConfig
from engraphy.lm.loop import Run, TrainConfig
from engraphy.memory.buffers import BufferPool
from tests.tools.numpy_allocations import numpy_allocations

Counts = dict[str, int]
Step = Callable[[], object]
VOCAB = 512
WARM = 3  # steps that are not counted


class CountingCore:
    """The native core, with its calls counted by name. Methods count as "Class.method"."""

    def __init__(self, core: Any) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        for name in dir(core):
            value = getattr(core, name)
            if isinstance(value, type):
                value = self._counted_class(value)
            elif callable(value):
                value = self._counted(name, value)
            setattr(self, name, value)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return call

    def _counted_class(self, base: type) -> type:
        """A subclass, since native functions take objects of the class."""
        methods = {
            name: self._counted(f"{base.__name__}.{name}", getattr(base, name))
            for name in vars(base)
            if not name.startswith("_") and callable(getattr(base, name))  # else a property
        }

        def call_of(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda self, *args, **kwargs: function(self, *args, **kwargs)

        return type(base.__name__, (base,), {name: call_of(f) for name, f in methods.items()})


@contextlib.contextmanager
def counted_buffers() -> Iterator[Counts]:
    """Counts buffers that a pool gives, and those of them that are new."""
    counts = {"pool buffers, taken": 0, "pool buffers, new": 0}
    take, new = BufferPool.take, BufferPool._new

    def counted_take(pool: BufferPool, *args: Any) -> np.ndarray:
        counts["pool buffers, taken"] += 1
        return take(pool, *args)

    def counted_new(pool: BufferPool, *args: Any) -> np.ndarray:
        counts["pool buffers, new"] += 1
        return new(pool, *args)

    BufferPool.take, BufferPool._new = counted_take, counted_new
    try:
        yield counts
    finally:
        BufferPool.take, BufferPool._new = take, new


def torch_allocations(run: Step) -> Counts:
    """Allocations of torch's CPU allocator during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results: Any = profiler.profiler
    sizes = [e.nbytes() for e in results.kineto_results.events() if e.name() == "[memory]"]
    new = [size for size in sizes if size > 0]
    return {"torch allocations, number": len(new), "torch allocations, bytes": sum(new)}


def counts_of(
    core: CountingCore,
    memory: EngramMemory,
    step: Step,
    plain: Step,
) -> Counts:
    """Counters of a step; plain: the same without the memory."""
    for _ in range(WARM):
        step()
        plain()
    stores = memory.stores.values()
    before = [store.stats for store in stores]
    core.calls.clear()
    with counted_buffers() as buffers:
        step()
    calls = dict(sorted(core.calls.items()))
    after = [store.stats for store in stores]
    moved = {
        "store, bytes read": sum(b.bytes - a.bytes for a, b in zip(before, after, strict=True)),
        "store, calls": sum(b.gathers - a.gathers for a, b in zip(before, after, strict=True)),
    }
    with numpy_allocations() as arrays:
        step()
    with numpy_allocations() as bare:
        plain()
    with_memory, without = torch_allocations(step), torch_allocations(plain)
    return {
        **{f"native calls, {name}": count for name, count in calls.items()},
        **buffers,
        **moved,
        **{name: count - without[name] for name, count in with_memory.items()},
        **{f"numpy allocations, {name}": count - bare[name] for name, count in arrays.items()},
    }


def training_step(core: CountingCore) -> Counts:
    """The reference model of two dense blocks, 4 x 64 tokens, RowAdam."""
    spec = HashSpec.demo((1,), (2, 3), 4, 2_003, VOCAB, pad_id=0)
    config = EngramConfig(spec, LayerSpec(64, spec.columns * 16, order=spec.order), 16)
    memory = EngramMemory(config, VocabMap.identity(VOCAB))
    memory.init_rows(0.02, 0)
    sizes = LMConfig(VOCAB, hidden_size=64, layers=2, heads=2, ffn=128)
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, VOCAB, 100) for _ in range(60)]
    runs = []
    for part in (memory, None):
        torch.manual_seed(0)
        batches = Batches(texts, end_id=0, batch=4, tokens=64, seed=0)
        runs.append(Run(LM(sizes, part), batches, TrainConfig(tokens=10**6)))
    return counts_of(core, memory, runs[0].step, runs[1].step)


def decoded_token(core: CountingCore) -> Counts:
    """One token of an attached Llama of three blocks, memories at two of them, rows in RAM."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
        models.append(LlamaForCausalLM(config).eval())
    sizes = EngramConfig.for_model(models[0].config, layers=(1, 2), rows_per_head=2_003, dim=16)
    memory = engraphy.attach(models[0], sizes)
    steps = [_decoding(model) for model in models]
    return counts_of(core, memory, *steps)


def _decoding(model: Any) -> Step:
    """One more token of a text of 16, at each call."""
    name = str(cache_argument(inspect.signature(model.forward).parameters))
    ids = torch.randint(1, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = getattr(model(ids[:, :16]), name)
    place = iter(range(16, 64))

    def step() -> None:
        now = next(place)
        with torch.no_grad():
            model(ids[:, now : now + 1], **{name: cache})

    return step


def main() -> None:
    core = CountingCore(_native.compiled())
    _native.core = core  # pyright: ignore[reportAttributeAccessIssue]
    counts = {"training step": training_step(core), "decoded token": decoded_token(core)}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
