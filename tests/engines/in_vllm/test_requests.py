"""Requests inside vLLM do not see each other, and one that is given up leaves nothing."""

from __future__ import annotations

from unittest import mock

import pytest

from engraphy.engines.vllm import slots
from tests.engines.in_vllm.conftest import asked
from tests.tools.vllm_runs import SCHEDULES, ask, engine, greedy, recorded, runner_of, served_of


def test_a_wrong_past_gives_other_tokens(run, models):
    """The control: what the other tests compare would show a past that is wrong by one token."""
    right = slots.past_slots

    def shifted(blocks_RM, block_size, lengths, count):
        return right(blocks_RM, block_size, (lengths - 1).clip(0), count)

    prompts = asked("llama")["prompts"]
    with (
        mock.patch.object(slots, "past_slots", shifted),
        engine(models / "llama", **SCHEDULES["chunks"]) as llm,
        recorded(llm) as record,
    ):
        answers, _ = ask(llm, prompts, 100, record)
    for answer, alone in zip(answers, run("llama", "alone").answers, strict=True):
        assert answer.tokens != alone.tokens
        assert answer.rows != {at: alone.rows[at] for at in answer.rows}


@pytest.mark.parametrize("given_up", [(0, 3), (1, 2, 4)], ids=str)
def test_requests_that_are_given_up_leave_nothing(run, models, given_up):
    prompts = asked("llama")["prompts"]
    expected = [answer.tokens for answer in run("llama", "alone").answers]
    with engine(models / "llama", **SCHEDULES["chunks"]) as llm:
        tokens: dict[str, list[int]] = {}
        steps = llm.llm_engine
        for number, prompt in enumerate(prompts):
            steps.add_request(f"first-{number}", {"prompt_token_ids": prompt}, greedy(100))
        for step in range(1000):
            for output in steps.step():
                if output.finished:
                    tokens[output.request_id] = list(output.outputs[0].token_ids)
            if step == 12:  # some read their prompts, some decode, some have not begun
                steps.abort_request([f"first-{number}" for number in given_up])
            if not steps.has_unfinished_requests():
                break
        for number, wanted in enumerate(expected):
            if number not in given_up:
                assert tokens[f"first-{number}"] == wanted
        assert runner_of(llm).model._step is None
        pool = steps.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one stands for padding
        with recorded(llm) as record:
            answers, cached = ask(llm, prompts, 100, record)
        assert cached > 0
        assert [answer.tokens for answer in answers] == expected


def test_a_closed_store_fails_its_requests_until_another_one_is_served(run, models, caplog):
    prompts = asked("llama")["prompts"][:2]
    expected = [answer.tokens for answer in run("llama", "alone").answers[:2]]
    with engine(models / "llama", **SCHEDULES["chunks"]) as llm:
        served_of(llm).memory.close()
        failed = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy(100))
        assert [output.outputs[0].finish_reason for output in failed] == ["error", "error"]
        assert "failed: StoreError: the memory is closed" in caplog.text
        llm.collective_rpc("engraphy_reload", args=(str(models / "llama"),))
        with recorded(llm) as record:
            answers, _ = ask(llm, prompts, 100, record)
        assert [answer.tokens for answer in answers] == expected
