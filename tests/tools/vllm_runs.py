"""Runs of vLLM in this process, with a record of what each forward computed."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from engraphy.engines.chunks import Chunks
from engraphy.memory.lookup import Trace

SCHEDULES: dict[str, dict[str, Any]] = {
    # One request at a time, whole.
    "alone": dict(max_num_seqs=1, max_num_batched_tokens=1024, enable_prefix_caching=False),
    "chunks": dict(max_num_seqs=8, max_num_batched_tokens=48, enable_prefix_caching=True),
    "at once": dict(max_num_seqs=8, max_num_batched_tokens=4096, enable_prefix_caching=True),
    "preempted": dict(
        max_num_seqs=8,
        max_num_batched_tokens=200,
        enable_prefix_caching=False,
        num_gpu_blocks_override=44,
    ),
    "preempted, cached": dict(
        max_num_seqs=8,
        max_num_batched_tokens=200,
        enable_prefix_caching=True,
        num_gpu_blocks_override=30,
    ),
}
"""Settings of the engine by the name of the schedule that they make."""


@dataclass
class Record:
    """What the forwards of an engine computed.

    Attributes:
        rows: request -> position -> row ids of all layers.
        counts: how often what is to be tested happened.
    """

    rows: dict[str, dict[int, tuple[int, ...]]] = field(default_factory=lambda: defaultdict(dict))
    counts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, int] = field(default_factory=dict)  # tokens of each request seen so far

    def add(self, requests: list[str], starts: list[int], chunks: Chunks, lookup: Any) -> None:
        """Notes one forward. starts: tokens of each request before its chunk."""
        lengths = np.diff(chunks.bounds)
        self.counts["forwards"] += 1
        self.counts["mixed"] += bool((lengths == 1).any() and (lengths > 1).any())
        self.counts["hits in one forward"] += bool(np.isin(chunks.past_RP, chunks.slots_N).any())
        for request, start, length in zip(requests, starts, lengths.tolist(), strict=True):
            known = self.lengths.get(request, 0)
            self.counts["preemptions"] += start < known
            self.counts["chunks"] += 0 < known == start and length > 1
            self.lengths[request] = start + length
        rows_NC = np.concatenate(list(lookup.trace.row_ids.values()), axis=2)[:, 0]
        parts = np.split(rows_NC, chunks.bounds[1:-1])
        for request, start, rows_TC in zip(requests, starts, parts, strict=True):
            self._add_rows(request, start, rows_TC)

    def _add_rows(self, request: str, start: int, rows_TC: np.ndarray) -> None:
        known = self.rows[request]
        for at, row in enumerate(rows_TC.tolist(), start):
            assert known.setdefault(at, tuple(row)) == tuple(row), (request, at)


@dataclass(frozen=True)
class Answer:
    """What an engine answered to one prompt."""

    tokens: list[int]
    logprobs: list[float]
    rows: dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Run:
    """The answers to all prompts, and how often what is to be tested happened."""

    answers: list[Answer]
    counts: Counter[str]


@contextmanager
def engine(model: Path, **settings: Any) -> Iterator[LLM]:
    """An engine in this process, float32, with small blocks."""
    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        **settings,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def runner_of(llm: LLM) -> Any:
    """vLLM's model runner."""
    core: Any = llm.llm_engine.engine_core
    return core.engine_core.model_executor.driver_worker.worker.model_runner


def served_of(llm: LLM) -> Any:
    """The ServedMemory of an engine's model."""
    return runner_of(llm).model._served


@contextmanager
def recorded(llm: LLM) -> Iterator[Record]:
    """Notes what each forward computes."""
    record = Record()
    runner, served = runner_of(llm), served_of(llm)
    begin, lookup = served.begin, served.memory.lookup

    def traced(*args: Any, **kwargs: Any) -> Any:
        return lookup(*args, **kwargs, trace=Trace())

    def noted(chunks: Chunks) -> Any:
        step = begin(chunks)
        batch = runner.input_batch
        count = len(chunks.bounds) - 1
        requests = [request.split("-")[0] for request in batch.req_ids[:count]]
        record.add(requests, batch.num_computed_tokens_cpu[:count].tolist(), chunks, step._lookup)
        return step

    with mock.patch.object(served, "begin", noted):
        served.memory.__dict__["lookup"] = traced
        try:
            yield record
        finally:
            del served.memory.__dict__["lookup"]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=tokens, temperature=0, detokenize=False, logprobs=0, ignore_eos=True
    )


def run(model: Path, schedule: str, prompts: list[list[int]], tokens: int) -> Run:
    """All prompts at once, under a schedule. A bare model has no record."""
    with engine(model, **SCHEDULES[schedule]) as llm:
        if hasattr(runner_of(llm).model, "_served"):
            with recorded(llm) as record:
                answers, cached = ask(llm, prompts, tokens, record)
        else:
            record = Record()
            answers, cached = ask(llm, prompts, tokens, record)
    record.counts["cached tokens"] = cached
    return Run(answers, record.counts)


def ask(
    llm: LLM, prompts: list[list[int]], tokens: int, record: Record
) -> tuple[list[Answer], int]:
    """The answers, and how many tokens came from the prefix cache."""
    asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(asked, greedy(tokens), use_tqdm=False)
    answers = []
    for output in outputs:
        (completion,) = output.outputs
        logprobs = [
            steps[token].logprob
            for token, steps in zip(completion.token_ids, completion.logprobs or [], strict=True)
        ]
        rows = record.rows[output.request_id.split("-")[0]]
        answers.append(Answer(list(completion.token_ids), logprobs, rows))
    return answers, sum(output.num_cached_tokens or 0 for output in outputs)


def difference(one: Run, other: Run) -> float:
    """The largest difference of log-probabilities of the same tokens."""
    pairs = zip(one.answers, other.answers, strict=True)
    return max(
        float(np.abs(np.subtract(mine.logprobs, theirs.logprobs)).max()) for mine, theirs in pairs
    )


alone = partial(run, schedule="alone")
