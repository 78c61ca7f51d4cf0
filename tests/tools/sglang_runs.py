"""Runs of SGLang, with a record of what each forward computed.

SGLang computes in a process of its own. The package `watched` is loaded there, and notes in a file
what is asked of the memory.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sglang

WATCHED = "tests.engines.in_sglang.watched"
ON_CPU: dict[str, Any] = dict(
    skip_tokenizer_init=True,
    device="cpu",
    dtype="float32",
    attention_backend="torch_native",
    sampling_backend="pytorch",
    disable_cuda_graph=True,
    disable_overlap_schedule=True,
    context_length=1024,
    log_level="error",
)
"""What runs SGLang on a CPU without its kernels."""


@dataclass(frozen=True)
class Round:
    """All prompts at once.

    Attributes:
        logprobs: whether log-probabilities are asked for; SGLang mixes no batches then.
        known: whether the radix cache knows what the round before computed.
    """

    logprobs: bool = True
    known: bool = False


@dataclass(frozen=True)
class Schedule:
    """Settings of the engine, and of its environment."""

    options: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)
    rounds: tuple[Round, ...] = (Round(),)


# SGLang keeps room for all tokens that a request may still make, unless it is told to expect few.
_EXPECT_FEW = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}
SCHEDULES = {
    "whole": Schedule(
        dict(
            chunked_prefill_size=-1,
            max_total_tokens=8192,
            mem_fraction_static=0.3,
            disable_radix_cache=True,
        )
    ),
    "chunks": Schedule(
        dict(chunked_prefill_size=64, max_total_tokens=8192, enable_mixed_chunk=True),
        rounds=(Round(logprobs=False), Round(), Round(known=True)),
    ),
    "retracted": Schedule(
        dict(chunked_prefill_size=96, max_total_tokens=720, schedule_conservativeness=0.01),
        _EXPECT_FEW,
    ),
}


@dataclass(frozen=True)
class Answer:
    """What an engine answered to one prompt. logprobs: empty if they were not asked for."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Run:
    """The answers to all prompts, once for each round, and how often what is to be tested
    happened."""

    rounds: list[list[Answer]]
    counts: Counter[str]


@contextmanager
def engine(model: Path, options: dict[str, Any], variables: dict[str, str]) -> Iterator[Any]:
    """An engine. variables: of its environment."""
    with mock.patch.dict(os.environ, variables):
        started = sglang.Engine(model_path=str(model), random_seed=0, **(ON_CPU | options))
        try:
            yield started
        finally:
            started.shutdown()


def run(
    model: Path, schedule: str, prompts: list[list[int]], tokens: int, forgets: bool = False
) -> Run:
    """All prompts at once, under a schedule.

    forgets: the memory forgets what came before each chunk. The counts of a bare model are those of
    the answers alone.
    """
    plan = SCHEDULES[schedule]
    notes = model.parent / f"{model.name}-{schedule}.notes"
    notes.unlink(missing_ok=True)
    variables = plan.variables | {"WATCHED_FILE": str(notes), "WATCHED_FORGETS": "1" * forgets}
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    counts: Counter[str] = Counter()
    rounds = []
    with engine(model, plan.options, variables) as started:
        for asked in plan.rounds:
            if not asked.known:
                started.flush_cache()
            found = started.generate(
                input_ids=prompts, sampling_params=sampling, return_logprob=asked.logprobs
            )
            rounds.append([_answer(each) for each in found])
            for each in found:
                counts["cached tokens"] += each["meta_info"]["cached_tokens"]
                counts["retractions"] += each["meta_info"]["num_retractions"]
    if notes.exists():
        _count(counts, notes)
    return Run(rounds, counts)


def _answer(result: dict[str, Any]) -> Answer:
    logprobs = [logprob for logprob, *_ in result["meta_info"].get("output_token_logprobs") or ()]
    return Answer(list(result["output_ids"]), logprobs)


def _count(counts: Counter[str], notes: Path) -> None:
    for line in notes.read_text().splitlines():
        lengths, known = (np.array(json.loads(line)[name]) for name in ("lengths", "known"))
        counts["forwards"] += 1
        counts["batches of requests"] += len(lengths) > 1
        counts["mixed"] += bool((lengths == 1).any() and (lengths > 1).any())
        counts["chunks with a past"] += int(((lengths > 1) & (known > 0)).sum())


def difference(answers: list[Answer], others: list[Answer]) -> float:
    """The largest difference of log-probabilities of the same tokens."""
    return max(
        float(np.abs(np.subtract(mine.logprobs, theirs.logprobs)).max())
        for mine, theirs in zip(answers, others, strict=True)
    )
