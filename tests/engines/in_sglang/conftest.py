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
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "tests.engines.in_sglang.watched",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # or OpenMP's threads spin
}
MODELS = Path(os.environ.get("ENGRAPHY_ENGINE_MODELS", "build/engines/models")).absolute()
BACKBONES = ("llama", "qwen3")


@functools.cache
def asked(backbone: str) -> dict[str, Any]:
    """Prompts, and what transformers answered."""
    return json.loads((MODELS / f"{backbone}.json").read_text())


@pytest.fixture(scope="session")
def models() -> Path:
    return MODELS


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """run(model, schedule): the answers of an engine to all prompts, 100 tokens each."""
    from tests.tools.sglang_runs import run

    @functools.cache
    def once(model: str, schedule: str, forgets: bool = False) -> Any:
        prompts = asked(model.removesuffix("-bare"))["prompts"]
        done = run(MODELS / model, schedule, prompts, 100, forgets)
        print(f"\n{model}, {schedule}: {dict(done.counts)}")
        return done

    return once
