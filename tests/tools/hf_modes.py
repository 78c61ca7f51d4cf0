"""The ways to decode that the matrix tries.

A mode runs a model and returns how far its logits are from those of the clean forward: one call
over each whole sequence, without padding, packing or cache.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache, cache_utils

from tests.tools.hf_models import CACHE, PAD, VOCAB, Run, cache_of, cached

# A compiler's trace, of which pytest would keep every line.
logging.getLogger("torch.__trace").propagate = False

PROMPT, NEW = 11, 6  # longer than the sliding windows, and across them
WRONG_TEXT = 1e6  # the distance of two texts that differ

Mode = Callable[[Run], float]
# Modes that call the model themselves: all logits are compared.
FORWARD: dict[str, Mode] = {}
# Modes of generate(): the text, and the logits of every position that it kept.
TEXT: dict[str, Mode] = {}


def _mode(modes: dict[str, Mode], name: str) -> Callable[[Mode], Mode]:
    def register(function: Mode) -> Mode:
        modes[name] = function
        return function

    return register


def prompts(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids_BT: Tensor, **kwargs: Any) -> Tensor:
    return model(ids_BT, **kwargs).logits


def clean(model: Any, ids_BT: Tensor) -> Tensor:
    return logits(model, ids_BT, use_cache=False)


def blocks_of(model: Any) -> Any:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


def _padded(side: str) -> tuple[Tensor, Tensor, list[slice]]:
    """Two prompts, the second of which is 3 tokens shorter; their mask, and where the real tokens
    stand."""
    ids, mask = prompts(), torch.ones(2, PROMPT, dtype=torch.long)
    real = slice(3, None) if side == "left" else slice(None, -3)
    pads = slice(None, 3) if side == "left" else slice(-3, None)
    ids[1, pads], mask[1, pads] = PAD, 0
    return ids, mask, [slice(None), real]


def _with_holes() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Two prompts with holes between their tokens, one of them after the first token; their mask,
    also by sequence."""
    ids, mask = prompts(), torch.ones(2, PROMPT, dtype=torch.long)
    for b, holes in enumerate(([4, 5, 8], [0, 2])):
        ids[b, holes], mask[b, holes] = PAD, 0
    return ids, mask, list(mask.bool())


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


def _rows_far(model: Any, found: Tensor, ids: Tensor, real: Sequence[slice | Tensor]) -> float:
    return max(
        far(found[b, part], clean(model, ids[b : b + 1, part])[0]) for b, part in enumerate(real)
    )


def in_chunks(
    model: Any,
    ids: Tensor,
    ends: Sequence[int],
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Logits [B, T, vocab] of calls on one cache, a new one by default.

    ends: where the chunks end. Each call sees the mask up to its end.
    """
    if cache is None:
        cache = DynamicCache(config=model.config)
    found = []
    for first, last in zip([0, *ends], ends, strict=False):
        part: dict[str, Any] = {}
        if mask is not None:
            part["attention_mask"] = mask[:, :last]
        if positions is not None:
            part["position_ids"] = positions[:, first:last]
        found.append(logits(model, ids[:, first:last], **cached(cache), use_cache=True, **part))
    return torch.cat(found, 1)


# Forwards


@_mode(FORWARD, "chunks")
def _chunks(run: Run) -> float:
    ids, cache, found = prompts(), None, []
    for first, last in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 11)):
        out = run.model(ids[:, first:last], **cached(cache), use_cache=True)
        cache, found = cache_of(out), [*found, out.logits]
    return far(torch.cat(found, 1), clean(run.model, ids))


@_mode(FORWARD, "cache without config")
def _plain_cache(run: Run) -> float:
    ids = prompts()
    found = in_chunks(run.model, ids, (6, 7, PROMPT), cache=DynamicCache())
    return far(found, clean(run.model, ids))


@_mode(FORWARD, "static chunks")
def _static_chunks(run: Run) -> float:
    ids, cache = prompts(), StaticCache(config=run.model.config, max_cache_len=PROMPT)
    found = in_chunks(run.model, ids, (6, 7, PROMPT), cache=cache)
    return far(found, clean(run.model, ids))


@_mode(FORWARD, "left padding, no positions")
def _left(run: Run) -> float:
    ids, mask, real = _padded("left")
    return _rows_far(run.model, logits(run.model, ids, attention_mask=mask), ids, real)


@_mode(FORWARD, "left padding, positions")
def _left_positions(run: Run) -> float:
    ids, mask, real = _padded("left")
    return _rows_far(
        run.model,
        logits(run.model, ids, attention_mask=mask, position_ids=_positions(mask)),
        ids,
        real,
    )


@_mode(FORWARD, "right padding")
def _right(run: Run) -> float:
    ids, mask, real = _padded("right")
    return _rows_far(run.model, logits(run.model, ids, attention_mask=mask), ids, real)


def _left_then_cached(run: Run, positions: bool) -> float:
    """The first chunk is padding alone in the second row."""
    ids, mask, real = _padded("left")
    places = _positions(mask) if positions else None
    return _rows_far(
        run.model, in_chunks(run.model, ids, (2, 7, 8, PROMPT), mask, places), ids, real
    )


@_mode(FORWARD, "left padding, no positions, cached")
def _left_cached(run: Run) -> float:
    return _left_then_cached(run, positions=False)


@_mode(FORWARD, "left padding, positions, cached")
def _left_positions_cached(run: Run) -> float:
    return _left_then_cached(run, positions=True)


@_mode(FORWARD, "holes")
def _holes(run: Run) -> float:
    ids, mask, real = _with_holes()
    return _rows_far(
        run.model,
        logits(run.model, ids, attention_mask=mask, position_ids=_positions(mask)),
        ids,
        real,
    )


@_mode(FORWARD, "holes, cached")
def _holes_cached(run: Run) -> float:
    ids, mask, real = _with_holes()
    found = in_chunks(run.model, ids, (3, 5, 6, 9, 10, PROMPT), mask, _positions(mask))
    return _rows_far(run.model, found, ids, real)


@_mode(FORWARD, "right padding, then more tokens")
def _right_continued(run: Run) -> float:
    (ids, mask, _), more = _padded("right"), prompts(seed=2)[:, :3]
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    ends = (PROMPT, PROMPT + 1, PROMPT + 3)
    found = in_chunks(run.model, ids, ends, mask, _positions(mask))
    return _rows_far(run.model, found, ids, list(mask.bool()))


@_mode(FORWARD, "packed documents")
def _packed(run: Run) -> float:
    ids, lengths = prompts(), ((4, PROMPT - 4), (6, PROMPT - 6))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    found, distance = logits(run.model, ids, position_ids=positions, use_cache=False), 0.0
    for b, (first, _) in enumerate(lengths):
        for part in (slice(None, first), slice(first, None)):
            distance = max(distance, far(found[b, part], clean(run.model, ids[b : b + 1, part])[0]))
    return distance


@_mode(FORWARD, "one prefix continued twice")
def _branches(run: Run) -> float:
    ids, other, distance = prompts(), prompts(seed=2), 0.0
    prefix = cache_of(run.model(ids[:, :7], use_cache=True))
    for rest in (ids[:, 7:], other[:, 7:]):
        cache = copy.deepcopy(prefix)
        found = [
            logits(run.model, part, **cached(cache), use_cache=True)
            for part in rest.split([1, 3], 1)
        ]
        whole = torch.cat([ids[:, :7], rest], 1)
        distance = max(distance, far(torch.cat(found, 1), clean(run.model, whole)[:, 7:]))
    return distance


@_mode(FORWARD, "two requests in turns")
def _interleaved(run: Run) -> float:
    requests = [prompts(2, seed=1), prompts(3, seed=2)]
    caches: list[Any] = [DynamicCache(config=run.model.config) for _ in requests]
    found: list[list[Tensor]] = [[], []]
    for first, last in ((0, 8), (8, 9), (9, PROMPT)):
        for i, ids in enumerate(requests):
            found[i].append(
                logits(run.model, ids[:, first:last], **cached(caches[i]), use_cache=True)
            )
    return max(
        far(torch.cat(parts, 1), clean(run.model, ids))
        for parts, ids in zip(found, requests, strict=True)
    )


@_mode(FORWARD, "tokens taken back")
def _crop(run: Run) -> float:
    ids, other = prompts(), prompts(seed=2)
    cache = DynamicCache(config=run.model.config)
    cache.activate_past_recording()
    run.model(ids[:, :9], **cached(cache), use_cache=True)
    cache.crop(-3)
    found = [
        logits(run.model, part, **cached(cache), use_cache=True)
        for part in other[:, 6:].split([1, 4], 1)
    ]
    return far(
        torch.cat(found, 1), clean(run.model, torch.cat([ids[:, :6], other[:, 6:]], 1))[:, 6:]
    )


@_mode(FORWARD, "compiled layers")
def _compiled_layers(run: Run) -> float:
    """Traced alone: what a backend makes of the graph is the same for every family."""
    ids = prompts()
    expected = clean(run.model, ids)
    with compiled_layers(run.model, backend="eager"):
        return far(clean(run.model, ids), expected)


@contextmanager
def compiled_layers(model: Any, backend: str) -> Iterator[None]:
    blocks, stats = blocks_of(model), torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()
    before = stats["unique_graphs"]
    try:
        for block in blocks:
            block.compile(backend=backend)
        yield
        assert stats["unique_graphs"] > before, "nothing was compiled"
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch.compiler.reset()


# generate()


@contextmanager
def _recorded(model: Any) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """What each call of the model within the block was given and gave: (tokens in the cache before,
    ids, logits)."""
    calls, past = [], []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        cache = kwargs.get(CACHE)
        past.append(0 if cache is None else int(cache.get_seq_length()))

    def after(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        calls.append((past.pop(), kwargs["input_ids"].clone(), out.logits.clone()))

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _text_far(
    model: Any,
    text_BT: Tensor,
    calls: list[tuple[int, Tensor, Tensor]],
    real: Sequence[slice | Tensor],
    greedy: bool = True,
) -> float:
    """The greatest distance of a call's logits from the clean forward over the text, at every
    position whose tokens up to there the text kept; WRONG_TEXT where a token is not the clean
    forward's, or was never computed. real: where the prompts have tokens."""
    distance = 0.0
    for b, part in enumerate(real):
        there = torch.zeros(text_BT.shape[1], dtype=torch.bool)
        there[:PROMPT][part] = there[PROMPT:] = True
        place = there.cumsum(0) - 1  # of a position in the clean text
        expected = clean(model, text_BT[b : b + 1, there])[0]
        if greedy and not torch.equal(
            expected[place[PROMPT - 1] : -1].argmax(-1), text_BT[b, PROMPT:]
        ):
            return WRONG_TEXT
        compared = set()
        for past, ids, found in calls:
            kept = ids.shape[1] - found.shape[1]  # generate() asks for the last logits alone
            text = text_BT[b, past : past + ids.shape[1]]
            same = text == ids[b, : text_BT.shape[1] - past]
            for i in range(kept, int(same.cumprod(0).sum())):
                if there[past + i]:
                    compared.add(past + i)
                    distance = max(distance, far(found[b, i - kept], expected[place[past + i]]))
        if not compared >= set(range(PROMPT - 1, PROMPT + NEW - 1)):
            return WRONG_TEXT
    return distance


def _generate(
    model: Any, ids: Tensor, real: Sequence[slice | Tensor] | None = None, **kwargs: Any
) -> float:
    # Without a mask generate() guesses which ids are pads.
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    with _recorded(model) as calls:
        text = model.generate(ids, **(options | kwargs))
    times = len(text) // len(ids)
    return _text_far(
        model,
        text,
        calls,
        [*(real or [slice(None)] * len(ids))] * times,
        not kwargs.get("do_sample"),
    )


def _plain(name: str, **kwargs: Any) -> None:
    _mode(TEXT, name)(lambda run: _generate(run.model, prompts(), **kwargs))


_plain("greedy")
_plain("greedy, no cache", use_cache=False)
_plain("prefill in chunks", prefill_chunk_size=4)
_plain("static cache", cache_implementation="static")
_plain("static cache, prefill in chunks", cache_implementation="static", prefill_chunk_size=4)
_plain("offloaded cache", cache_implementation="offloaded")


# transformers 5.20 does not have it.
@_mode(TEXT if hasattr(cache_utils, "Fp8QuantizedLayer") else {}, "quantised cache")
def _quantised(run: Run) -> float:
    """In codes of 32 bits: 8 would change the text of any model."""
    with mock.patch.multiple(cache_utils.Fp8QuantizedLayer, fp8_dtype=torch.float32):
        return _generate(
            run.model, prompts(), cache_implementation="quantized", cache_config={"backend": "fp8"}
        )


@_mode(TEXT, "batch with left padding")
def _generate_left(run: Run) -> float:
    ids, mask, real = _padded("left")
    return _generate(run.model, ids, real, attention_mask=mask)


@_mode(TEXT, "static cache, left padding")
def _generate_left_static(run: Run) -> float:
    ids, mask, real = _padded("left")
    return _generate(run.model, ids, real, attention_mask=mask, cache_implementation="static")


@_mode(TEXT, "holes in the prompt")
def _generate_holes(run: Run) -> float:
    ids, mask, real = _with_holes()
    return _generate(run.model, ids, real, attention_mask=mask)


@_mode(TEXT, "holes in the prompt that generate() finds")
def _generate_pads(run: Run) -> float:
    """Without a mask it takes each pad id for a hole."""
    ids, _, real = _with_holes()
    return _generate(run.model, ids, real, attention_mask=None)


@_mode(TEXT, "static cache, holes in the prompt")
def _generate_holes_static(run: Run) -> float:
    ids, mask, real = _with_holes()
    return _generate(run.model, ids, real, attention_mask=mask, cache_implementation="static")


@_mode(TEXT, "holes in the prompt, prefill in chunks")
def _generate_holes_chunked(run: Run) -> float:
    ids, mask, real = _with_holes()
    return _generate(run.model, ids, real, attention_mask=mask, prefill_chunk_size=4)


@_mode(TEXT, "beams over holes")
def _beams_over_holes(run: Run) -> float:
    """Beams with a cache against beams without one."""
    ids, mask, _ = _with_holes()
    options = dict(
        attention_mask=mask,
        num_beams=3,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    cached, plain = (run.model.generate(ids, use_cache=use, **options) for use in (True, False))
    if not torch.equal(cached.sequences, plain.sequences):
        return WRONG_TEXT
    return far(cached.sequences_scores, plain.sequences_scores)


@_mode(TEXT, "prompt lookup")
def _prompt_lookup(run: Run) -> float:
    ids = prompts(1)[:, :4].repeat(1, 3)[:, :PROMPT]
    return _generate(run.model, ids, prompt_lookup_num_tokens=3)


@_mode(TEXT, "assisted")
def _assisted(run: Run) -> float:
    return _generate(run.model, prompts(1), assistant_model=run.draft)


@_mode(TEXT, "assisted by a model with a memory")
def _assisted_by_twin(run: Run) -> float:
    return _generate(run.model, prompts(1), assistant_model=run.twin)


@_mode(TEXT, "beams")
def _beams(run: Run) -> float:
    """Cached beams against beams without a cache; the scores of both against the clean forward over
    their texts."""
    options = dict(
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=NEW,
        do_sample=False,
        length_penalty=1.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    cached, plain = (
        run.model.generate(prompts(), use_cache=use, **options) for use in (True, False)
    )
    if not torch.equal(cached.sequences, plain.sequences):
        return WRONG_TEXT
    chances = clean(run.model, cached.sequences)[:, PROMPT - 1 : -1].log_softmax(-1)
    score = chances.gather(-1, cached.sequences[:, PROMPT:, None]).sum((1, 2)) / NEW
    if far(cached.sequences_scores, score) > 1e-5:  # generate() scores in float32
        return WRONG_TEXT
    return far(cached.sequences_scores, plain.sequences_scores)


@_mode(TEXT, "samples")
def _samples(run: Run) -> float:
    torch.manual_seed(3)
    return _generate(run.model, prompts(1), do_sample=True, num_return_sequences=3, top_k=20)


@_mode(TEXT, "two turns on one cache")
def _turns(run: Run) -> float:
    """A second turn on the first one's cache, then another second turn on a copy of the prefix."""
    options: dict[str, Any] = dict(do_sample=False, return_dict_in_generate=True)
    first = run.model.generate(prompts()[:, :5], max_new_tokens=3, **options)
    caches, distance = [cache_of(first), copy.deepcopy(cache_of(first))], 0.0
    for seed, cache in enumerate(caches):
        ids = torch.cat([first.sequences, prompts(seed=seed)[:, : PROMPT - 8]], 1)
        distance = max(distance, _generate(run.model, ids, **cached(cache)))
    return distance


@_mode(TEXT, "static cache, reset and used again")
def _static_again(run: Run) -> float:
    cache, distance = StaticCache(config=run.model.config, max_cache_len=PROMPT + NEW), 0.0
    for seed in (1, 2):
        distance = max(distance, _generate(run.model, prompts(seed=seed), **cached(cache)))
        cache.reset()
    return distance
