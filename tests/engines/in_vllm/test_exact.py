"""vLLM answers with a memory as transformers does, and as it does itself to one request at a time,
whatever its schedule."""

from __future__ import annotations

import pytest

from tests.engines.in_vllm.conftest import BACKBONES, asked
from tests.tools.vllm_runs import SCHEDULES, difference

TOGETHER = [name for name in SCHEDULES if name != "alone"]
HAPPENED = {
    "chunks": ("mixed", "chunks", "cached tokens"),
    "at once": ("cached tokens", "hits in one forward"),
    "preempted": ("mixed", "chunks", "preemptions"),
    "preempted, cached": ("mixed", "chunks", "cached tokens", "preemptions"),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_request_at_a_time_gives_the_tokens_of_transformers(run, backbone):
    expected = asked(backbone)["with_memory"]
    answers = run(backbone, "alone").answers
    assert [answer.tokens for answer in answers] == [other["tokens"] for other in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert answer.logprobs == pytest.approx(other["logprobs"], abs=1e-4)


@pytest.mark.parametrize("schedule", TOGETHER)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_tokens_do_not_depend_on_the_schedule(run, backbone, schedule):
    together, alone = run(backbone, schedule), run(backbone, "alone")
    for what in HAPPENED[schedule]:
        assert together.counts[what] > 0, (what, together.counts)
    assert [a.tokens for a in together.answers] == [a.tokens for a in alone.answers]


@pytest.mark.parametrize("schedule", TOGETHER)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_row_ids_do_not_depend_on_the_schedule(run, backbone, schedule):
    pairs = zip(run(backbone, schedule).answers, run(backbone, "alone").answers, strict=True)
    for together, alone in pairs:
        assert together.rows == {at: alone.rows[at] for at in together.rows}
        assert max(together.rows) == max(alone.rows)


@pytest.mark.parametrize("schedule", TOGETHER)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_memory_adds_no_difference_of_its_own(run, backbone, schedule):
    with_memory = difference(run(backbone, schedule), run(backbone, "alone"))
    bare = difference(run(f"{backbone}-bare", schedule), run(f"{backbone}-bare", "alone"))
    print(f"{backbone}, {schedule}: {with_memory:.2g} with the memory, {bare:.2g} without")
    assert with_memory <= bare


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_memory_matters(run, backbone):
    expected = asked(backbone)
    for mine, bare in zip(expected["with_memory"], expected["bare"], strict=True):
        assert mine["tokens"] != bare["tokens"]
