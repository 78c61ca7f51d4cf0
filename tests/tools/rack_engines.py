"""Part of `make test-rack`: eight servers on one pool, of which two are vLLM.

    python -m tests.tools.rack_engines [--model DIR]

The pool holds the table of a model that was saved with its memory. Each server is a network
namespace (rack_pool.py): in six of them rack_server.py looks rows up and runs the model's memory
layers, in two vLLM's OpenAI server serves the model, and is asked over the network while the others
work. DIR.json, if it is there, has prompts and what transformers answers (engine_models.py);
otherwise prompts are drawn, and the two have to answer alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from engraphy.store import read_header
from tests.tools import rack_pool
from tests.tools.paths import ROOT
from tests.tools.rack_pool import PUBLISH, Place, Server, expected_rows, namespaces
from tests.tools.rack_server import mapped
from tests.tools.vllm_server import Server as Engine
from tests.tools.vllm_server import get, serving

ENGINES, OTHERS = 2, 6
BUILT = ROOT / "build" / "engines"
MODEL = BUILT / "models" / "llama"
PYTHON = BUILT / "vllm" / "bin" / "python"
NEW_TOKENS = 100
SECONDS = 5.0  # that the six work
_ROWS = re.compile(r"^engraphy_store_rows_total\{.*store=\"pool\".*\} (\S+)$", re.MULTILINE)


def missing() -> list[str]:
    """What this part needs and does not find."""
    needed = {PYTHON: "vLLM", MODEL.with_suffix(".json"): "a model for it"}
    gaps = [
        f"{what} ({path.relative_to(ROOT)}: make test-vllm makes it)"
        for path, what in needed.items()
        if not path.exists()
    ]
    return rack_pool.missing() + gaps


def run(model: Path = MODEL) -> dict[str, Any]:
    """Runs the checks.

    Returns:
        What was counted.

    Raises:
        AssertionError: A server read other rows, vLLM answered otherwise, or there is more than one
            copy.
    """
    table = model / "engraphy" / "table"
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        pool = memory / "pool"
        publish = [sys.executable, "-c", PUBLISH, str(table), str(pool)]
        subprocess.run(publish, check=True)  # and it is gone
        places = stack.enter_context(namespaces(ENGINES + OTHERS))
        servers: list[Server] = []
        for place in places[ENGINES:]:  # forked, so before the threads below
            servers.append(Server(place, model / "engraphy", {"pool": f"pool:{pool}"}))
            stack.callback(servers[-1].close)
        for server in servers:
            server.connect()
        engines = _start(stack, places[:ENGINES], model, logs, f"pool:{pool}")

        prompts, expected = _asked(model)
        header = read_header(pool)
        wanted = expected_rows(f"file:{table}", 5, tuple(header.layers))
        for found in rack_pool.ask_all(servers, rows="pool", seed=5):
            assert found == wanted, f"expected the rows of the table, found {found}"
        for server in servers:
            server.ask(run="pool", seconds=SECONDS, seed=6, fuse=True)
        answers = [_complete(engine, prompts) for engine in engines]
        runs = [server.answer() for server in servers]
        for found in answers:
            assert found == (expected or answers[0]), "expected the same tokens, found others"
        assert all(one["tokens"] for one in runs)
        size = sum(place.rows for place in header.layers.values()) * header.row_format.row_bytes
        shares = mappings(pool)
        copies = sum(shares) / size
        assert len(shares) == ENGINES + OTHERS, f"expected 8 processes, found {len(shares)}"
        assert 0.98 < copies < 1.05, f"expected one copy of the rows, found {copies:.3f}"
        return {
            "servers with memory layers, with vLLM": (OTHERS, ENGINES),
            "rows, MB": round(size / 1e6, 1),
            "processes that map the pool": len(shares),
            "copies in memory": round(copies, 3),
            "tokens answered by each vLLM": sum(map(len, answers[0])),
            "as transformers answers": "yes" if expected else "not compared",
            "rows that each vLLM read from the pool": [_rows_read(engine) for engine in engines],
            "tokens of the others meanwhile": sum(one["tokens"] for one in runs),
        }


def _start(
    stack: ExitStack, places: Sequence[Place], model: Path, logs: Path, store: str
) -> list[Engine]:
    """vLLM in each namespace, started at once."""
    managers = [
        serving(
            model,
            logs / place.name,
            place.address,
            place.command(str(PYTHON)),
            store,
        )
        for place in places
    ]
    with ThreadPoolExecutor(len(managers)) as threads:
        return list(threads.map(stack.enter_context, managers))


def _asked(model: Path) -> tuple[list[list[int]], list[list[int]] | None]:
    """Prompts, and the tokens that transformers answers; None if they are not known."""
    known = model.with_suffix(".json")
    if known.exists():
        body = json.loads(known.read_text())
        tokens = {kind: [one["tokens"] for one in body[kind]] for kind in ("with_memory", "bare")}
        assert tokens["with_memory"] != tokens["bare"]
        return body["prompts"], tokens["with_memory"]
    vocab_size = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    return np.random.default_rng(0).integers(1, vocab_size, (8, 48)).tolist(), None


def _complete(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens that follow all prompts, asked at once."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(threads.map(lambda prompt: engine.complete(prompt, NEW_TOKENS), prompts))


def _rows_read(engine: Engine) -> int:
    rows = sum(float(count) for count in _ROWS.findall(get(engine.metrics_url)))
    assert rows, "expected rows read from the pool, found none"
    return int(rows)


def mappings(path: Path) -> list[int]:
    """Proportional set size of a file, of each process of this machine that maps it."""
    sizes: list[int] = []
    for process in os.listdir("/proc"):
        if process.isdigit():
            try:
                share = mapped(str(path), process)["Pss"]
            except OSError:  # it has ended
                continue
            if share:
                sizes.append(share)
    return sizes


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="saved with its memory")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made is removed
    gaps = missing()
    if gaps:
        print("rack_engines: expected " + "; ".join(gaps) + "; found none", file=sys.stderr)
        return 2
    for what, value in run(options.model).items():
        print(f"{what}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
