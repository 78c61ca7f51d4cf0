"""Runs the tests of native code, and of what is chosen from the machine, under each combination
that this CPU has; prints a table for CONTRIBUTING. `make test-levels`; arguments go to pytest.

A combination is an instruction set (ENGRAPHY_NATIVE) and a number of threads (ENGRAPHY_THREADS).
The dtype that commands choose by themselves (ENGRAPHY_DTYPE) alternates with the threads.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

from engraphy import _native
from engraphy.system import cpu

TESTS = Path(__file__).parents[1]
PARTS = (
    "native",
    "store",
    "addresses/test_addresser.py",
    "rows",
    "memory/test_token_reader.py",
    "fusion",
    "memory/test_state.py",
    "memory/test_prefetch.py",
    "memory/test_memory.py",
    "cli/test_machine.py",
    "train/test_dtype.py",
    "train/test_row_optimizers.py",
    "train/test_rounding.py",
    "memory/test_summed.py",
    "system/test_environment.py",
    "recipes/test_finetune.py",
    "recipes/test_generate.py",
    "hf/test_cache.py",
)
THREADS = {"1": "float32", "2": "bfloat16"}  # beside which dtype


def run(level: str, threads: str, arguments: list[str]) -> str:
    """What pytest says at its end, or the names of the tests that failed."""
    given = {"ENGRAPHY_NATIVE": level, "ENGRAPHY_THREADS": threads, "OMP_NUM_THREADS": threads}
    parts = [str(TESTS / part) for part in PARTS]
    command = [sys.executable, "-m", "pytest", "-q", *arguments, *parts]
    environment = {**os.environ, **given, "ENGRAPHY_DTYPE": THREADS[threads]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(*failed, sep="\n", end="\n" if failed else "", flush=True)
    return re.sub(r", \d+ warnings?", "", lines[-1]) if lines else done.stderr[-500:]


def main() -> int:
    compiled = _native._compiled
    levels = ["off", *(compiled.levels() if compiled is not None else ())]
    today = datetime.date.today().isoformat()
    print(f"{cpu.name()}, {today}\n\n| level | threads | |\n|---|---|---|", flush=True)
    results = []
    for level in levels:
        for threads in THREADS:
            results.append(run(level, threads, sys.argv[1:]))
            print(f"| {level} | {threads} | {results[-1]} |", flush=True)
    return int(
        any("passed" not in result or "failed" in result or "error" in result for result in results)
    )


if __name__ == "__main__":
    sys.exit(main())
