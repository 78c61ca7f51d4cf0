"""vLLM's OpenAI server, for bench/engine_load.py: rows may be slow on purpose, or not read ahead.

    python bench/engine_server.py ARGUMENTS OF vllm.entrypoints.openai.api_server

BENCH_DELAY_MS = milliseconds that each read of rows takes longer. BENCH_IN_BLOCK = 1: rows
are read when their block needs them. vLLM starts its engine in another process, which imports this
file as well: so what changes the library stands at the top level.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from delays import Delayed

from engraphy.memory.prefetch import Prefetcher
from engraphy.store import group

SECONDS = float(os.environ.get("BENCH_DELAY_MS") or 0) / 1000
IN_BLOCK = bool(os.environ.get("BENCH_IN_BLOCK"))


class Later:
    """A ticket whose rows are requested when they are waited for."""

    state = "waiting"

    def __init__(self, request: Callable[[], Any]) -> None:
        self._request = request
        self._ticket: Any = None

    def wait(self) -> Any:
        if self._ticket is None:
            self._ticket = self._request()
        return self._ticket.wait()

    def cancel(self) -> None:
        """Nothing is under way."""


def change_library() -> None:
    open_store, read = group.open_store, Prefetcher.read
    if SECONDS:
        group.open_store = lambda *args, **options: Delayed(open_store(*args, **options), SECONDS)
    if IN_BLOCK:
        Prefetcher.read = lambda *args, **options: Later(partial(read, *args, **options))


change_library()

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=False)
