"""vLLM's OpenAI server in a process of its own, and requests to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

OPTIONS = (
    "--skip-tokenizer-init --dtype float32 --max-model-len 512 --block-size 32 "
    "--max-num-seqs 8 --max-num-batched-tokens 96 --num-gpu-blocks-override 30 "
    "--kv-cache-memory-bytes 67108864 --disable-uvicorn-access-log"
).split()
"""Prompts are cut into chunks, and the cache is too small for eight requests."""
START_SECONDS = 200


class Server:
    """One that answers. url: of the server. metrics_url: of the memory's counters."""

    def __init__(self, host: str, port: int, metrics_port: int, log: Path) -> None:
        self.url = f"http://{host}:{port}"
        self.metrics_url = f"http://{host}:{metrics_port}/metrics"
        self.log = log

    def post(self, path: str, body: Any = None, timeout: float = 120) -> Any:
        """The answer to a POST, parsed."""
        data = json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def complete(self, prompt: list[int], tokens: int) -> list[int]:
        """The tokens that follow a prompt."""
        body = completion(prompt, tokens)
        return self.post("/v1/completions", body)["choices"][0]["token_ids"]

    def give_up(self, prompt: list[int], tokens: int) -> None:
        """Begins to stream an answer, and hangs up at its first piece."""
        data = json.dumps(completion(prompt, tokens) | {"stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()

    def counter(self, name: str) -> float:
        """A counter of vLLM, summed over its labels."""
        text = get(f"{self.url}/metrics")
        lines = [line for line in text.splitlines() if line.startswith(name)]
        assert lines, name
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def healthy(self) -> bool:
        try:
            get(f"{self.url}/health")
        except (URLError, ConnectionError, HTTPError):
            return False
        return True


def completion(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read().decode()


@contextmanager
def serving(
    model: Path,
    log: Path,
    host: str = "127.0.0.1",
    python: Sequence[str] = (sys.executable,),
    store: str = "",
) -> Iterator[Server]:
    """A server of a model.

    Args:
        model: Folder of the model.
        log: Gets what it says.
        host: Where it listens.
        python: Words that run Python where `host` is an address of the machine.
        store: URL to read the rows from; "" = the table in the folder.
    """
    port, metrics_port = free_port(), free_port()
    command = [*python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [*OPTIONS, "--host", host, "--port", str(port)]
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOST_IP": host,
        "ENGRAPHY_METRICS": f"{host}:{metrics_port}",
        "ENGRAPHY_STORE": store,
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = Server(host, port, metrics_port, log)
    try:
        end = time.monotonic() + START_SECONDS
        while not server.healthy():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its engine
            process.wait()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
