"""vLLM's OpenAI server with a memory: the same tokens over HTTP, counters, another table while it
serves, and a table that breaks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from tests.engines.in_vllm.conftest import BACKBONES, MODELS, asked
from tests.tools.vllm_server import Server, get, serving


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory) -> Path:
    """A copy, whose table a test may break."""
    return Path(shutil.copytree(MODELS / backbone, tmp_path_factory.mktemp("served") / backbone))


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    with serving(folder, folder.parent / "log") as server:
        yield server


def expected(backbone: str, kind: str = "with_memory") -> list[list[int]]:
    return [answer["tokens"] for answer in asked(backbone)[kind]]


def ask_all(server: Server, backbone: str, rounds: int = 1) -> list[list[list[int]]]:
    """The tokens that follow all prompts, asked at once, for each round."""
    prompts = asked(backbone)["prompts"]
    with ThreadPoolExecutor(len(prompts)) as pool:
        jobs = [pool.submit(server.complete, prompt, 100) for prompt in prompts * rounds]
        answers = [job.result() for job in jobs]
    return [answers[first : first + len(prompts)] for first in range(0, len(answers), len(prompts))]


def test_tokens_over_http_are_those_of_transformers(server, backbone):
    for answers in ask_all(server, backbone, rounds=2):
        assert answers == expected(backbone)
    assert server.counter("vllm:num_preemptions_total") > 0
    assert server.counter("vllm:prefix_cache_hits_total") > 0
    assert "beside the KV cache" in server.log.read_text()


def test_clients_that_hang_up_leave_nothing(server, backbone):
    prompts = asked(backbone)["prompts"]
    with ThreadPoolExecutor(16) as pool:
        given_up = [pool.submit(server.give_up, prompt, 100) for prompt in prompts]
        kept = [pool.submit(server.complete, prompt, 100) for prompt in prompts]
        for job in given_up:
            job.result()
        assert [job.result() for job in kept] == expected(backbone)
    assert ask_all(server, backbone) == [expected(backbone)]


def test_counters_of_the_stores_are_served_meanwhile(server, backbone):
    name = 'engraphy_store_rows_total{layer="2",store="file"}'

    def rows() -> int:
        (line,) = [line for line in get(server.metrics_url).splitlines() if line.startswith(name)]
        return int(line.rsplit(" ", 1)[1])

    for _ in range(20):  # requests may end before anything is read between
        counts = [rows()]
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(ask_all, server, backbone)
            while not answers.done():
                counts.append(rows())
        counts.append(rows())
        assert counts == sorted(counts) and counts[-1] > counts[0]
        if len(set(counts)) > 2:
            return
    pytest.fail("counters: expected one between those before and after the requests, found none")


def test_another_table_while_it_serves(server, backbone):
    """No request sees two tables, and none fails."""
    prompts = asked(backbone)["prompts"]
    old, new = expected(backbone), expected(backbone, "other")
    seen: dict[str, int] = {"old": 0, "new": 0}

    def asking(rounds: int) -> list[tuple[int, list[int]]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            numbers = list(range(len(prompts))) * rounds
            jobs = [pool.submit(server.complete, prompts[number], 100) for number in numbers]
            return [(number, job.result()) for number, job in zip(numbers, jobs, strict=True)]

    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(asking, 6)
        while server.counter("vllm:num_requests_running") < 4:
            assert not load.done()
        reload(server, MODELS / f"{backbone}-other")
        for number, tokens in load.result():
            assert tokens in (old[number], new[number])
            seen["new" if tokens == new[number] else "old"] += 1
    assert min(seen.values()) > 0, seen
    assert ask_all(server, backbone) == [new]
    reload(server, MODELS / backbone)
    assert ask_all(server, backbone) == [old]


def reload(server: Server, folder: Path) -> Any:
    server.post("/pause?mode=wait")
    try:
        body = {"method": "engraphy_reload", "args": [str(folder)]}
        return server.post("/collective_rpc", body)
    finally:
        server.post("/resume")


def test_a_table_that_is_cut_fails_its_requests_and_nothing_else(server, backbone, folder):
    reload(server, folder)
    shard = max((folder / "engraphy" / "table").glob("*.safetensors"), key=lambda p: p.name)
    whole = shard.read_bytes()
    with shard.open("r+b") as file:
        file.truncate(len(whole) // 2)
    with pytest.raises(HTTPError, match="500"):
        ask_all(server, backbone)
    assert server.healthy()
    assert "ShardTruncated" in server.log.read_text()
    with shard.open("r+b") as file:
        file.write(whole)
    # What the failed forwards would have filled is not in the prefix cache.
    assert ask_all(server, backbone) == [expected(backbone)]
