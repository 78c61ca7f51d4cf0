"""The models and what was asked of them, and the runs, each made once."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
MODELS = Path(os.environ.get("ENGRAPHY_ENGINE_MODELS", "build/engines/models")).absolute()
BACKBONES = ("llama", "qwen3")


@pytest.fixture(scope="session")
def models() -> Path:
    return MODELS


@functools.cache
def asked(backbone: str) -> dict[str, Any]:
    """Prompts, and what transformers answered."""
    return json.loads((MODELS / f"{backbone}.json").read_text())


@pytest.fixture(scope="session")
def run() -> Callable[[str, str], Any]:
    """run(model, schedule): the answers of an engine to all prompts, 100 tokens each."""
    from tests.tools.vllm_runs import run

    @functools.cache
    def once(model: str, schedule: str) -> Any:
        backbone = model.removesuffix("-bare")
        done = run(MODELS / model, schedule, asked(backbone)["prompts"], 100)
        print(f"\n{model}, {schedule}: {dict(done.counts)}")
        return done

    return once
