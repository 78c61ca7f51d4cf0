"""SGLang answers with a memory as transformers does, whatever its schedule."""

from __future__ import annotations

import pytest

from tests.engines.in_sglang.conftest import BACKBONES, asked
from tests.tools.sglang_runs import Answer, difference

HAPPENED = {
    "chunks": ("mixed", "batches of requests", "chunks with a past", "cached tokens"),
    "retracted": ("batches of requests", "chunks with a past", "cached tokens", "retractions"),
}


def expected(backbone: str) -> list[Answer]:
    """What transformers answers to one prompt at a time. vLLM's tests compare with the same."""
    return [Answer(each["tokens"], each["logprobs"]) for each in asked(backbone)["with_memory"]]


@pytest.mark.parametrize("schedule", HAPPENED)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_tokens_are_those_of_transformers_whatever_the_schedule(run, backbone, schedule):
    done = run(backbone, schedule)
    for what in HAPPENED[schedule]:
        assert done.counts[what] > 0, (what, done.counts)
    others = expected(backbone)
    for answers in done.rounds:
        assert [answer.tokens for answer in answers] == [other.tokens for other in others]
    found = difference(done.rounds[-1], others)
    print(f"{backbone}, {schedule}: log-probabilities differ by {found:.2g}")
    assert found < 1e-4


def test_the_memory_adds_no_difference_of_its_own(run):
    """To what the same schedule makes of log-probabilities without a memory."""
    found = {}
    for model in ("llama", "llama-bare"):
        whole, chunks = run(model, "whole"), run(model, "chunks")
        found[model] = difference(chunks.rounds[1], whole.rounds[0])
    print(found)
    assert found["llama"] <= 2 * found["llama-bare"]


def test_a_memory_that_forgets_the_past_answers_differently(run):
    forgetful = run("llama", "chunks", forgets=True)
    pairs = zip(forgetful.rounds[0], expected("llama"), strict=True)
    assert all(answer.tokens != other.tokens for answer, other in pairs)
