"""What of SGLang the plugin relies on is there, and what it refuses is refused by name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from sglang.srt.models.registry import import_model_classes
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry

from engraphy.engines.sglang import plugin
from tests.engines.in_sglang.conftest import asked

PORT, METRICS_PORT = 18231, 18232
ON_CPU = (
    "--skip-tokenizer-init --device cpu --dtype float32 --attention-backend torch_native "
    "--sampling-backend pytorch --disable-cuda-graph --max-total-tokens 4096"
).split()


def server(model: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *ON_CPU]
    return [*command, "--host", "127.0.0.1", "--port", str(PORT), *options]


def without_package() -> dict[str, str]:
    """The environment of a server that finds our classes by the plugin alone."""
    return {k: v for k, v in os.environ.items() if k != "SGLANG_EXTERNAL_MODEL_PACKAGE"}


def test_sglang_finds_the_plugin_and_the_classes():
    load_plugins()
    assert plugin.INIT_NEW in HookRegistry._patched
    names = [f"Engraphy{backbone}" for backbone in plugin.BACKBONES]
    assert list(import_model_classes("engraphy.engines.sglang")) == names


def test_the_stager_gathers_as_the_adapter_expects():
    from sglang.srt.layers.engram_staging import EngramRowStager

    assert list(inspect.signature(EngramRowStager._gather).parameters) == ["self", "table", "ids"]
    source = inspect.getsource(EngramRowStager.stage)
    for line in ("enumerate(self.tables)", "self._gather(weight, layer_ids)"):
        assert line in source


def test_overlap_scheduling_is_refused_by_name(models):
    run = subprocess.run(
        server(models / "llama", "--tp-size", "1"),
        env=without_package(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode
    assert "disable_overlap_schedule: expected True (--disable-overlap-schedule)" in (
        run.stdout + run.stderr
    )


def test_a_server_answers_as_transformers_does(models, tmp_path):
    """Found by the plugin alone: no SGLANG_EXTERNAL_MODEL_PACKAGE."""
    log = (tmp_path / "log").open("w")
    command = server(models / "qwen3", "--disable-overlap-schedule", "--chunked-prefill-size", "64")
    variables = without_package() | {"ENGRAPHY_METRICS": f"127.0.0.1:{METRICS_PORT}"}
    process = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    sampling = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
    body = {"input_ids": asked("qwen3")["prompts"], "sampling_params": sampling}
    try:
        wait_for(process, tmp_path / "log")
        answer = httpx.post(f"http://127.0.0.1:{PORT}/generate", json=body, timeout=120)
        counters = httpx.get(f"http://127.0.0.1:{METRICS_PORT}/metrics").text
    finally:
        process.terminate()
        process.wait(60)
    tokens = [each["output_ids"] for each in answer.json()]
    assert tokens == [each["tokens"] for each in asked("qwen3")["with_memory"]]
    rows = re.findall(r"^engraphy_store_rows_total.* (\d+)$", counters, re.M)
    assert rows and all(int(count) > 0 for count in rows), counters


def wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        if process.poll() is not None:
            pytest.fail(f"the server ended: {log.read_text()[-2000:]}")
        try:
            httpx.get(f"http://127.0.0.1:{PORT}/health", timeout=20).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(1)
    pytest.fail("the server is not ready after 240 s")
