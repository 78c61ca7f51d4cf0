"""Counts instead of clocks: the instructions of the native kernels, and what a training step and a
decoded token allocate, move and call, beside the counts in guard.json. `make guard`.

    python -m tests.tools.guard [--update]

callgrind counts the instructions that lie in the compiled module, with ENGRAPHY_NATIVE=avx2 and one
thread (guard_kernels.py). The counters of the steps are in guard_counts.py. A count may exceed the
committed one by the band that guard.json states; what exceeds it is printed, and the exit status is
1. Fewer is no failure; --update writes the counts of now. Two runs give the same counts, so a band
is there for other compilers and versions, not for noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engraphy import _native
from tests.tools.guard_kernels import KERNELS

COUNTS = Path(__file__).with_name("guard.json")
INSTRUCTIONS = "instructions"
ENVIRONMENT = {
    "ENGRAPHY_NATIVE": "avx2",
    "ENGRAPHY_THREADS": "1",
    "ENGRAPHY_DTYPE": "float32",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "PYTHONHASHSEED": "0",
}

Counts = dict[str, dict[str, int]]


def instructions() -> dict[str, int]:
    """Instructions in the compiled module, by kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        command += ["--zero-before=getppid", "--dump-after=getpgrp", "--compress-strings=no"]
        command += [sys.executable, "-m", "tests.tools.guard_kernels"]
        _run(command)
        found = [Path(folder, f"out.{number + 1}") for number in range(len(KERNELS))]
        return {
            name: in_module(path.read_text()) for name, path in zip(KERNELS, found, strict=True)
        }


def in_module(dump: str) -> int:
    """Sum of the instructions of the compiled module itself, in a file of callgrind's format.

    Lines are grouped by the object (`ob=`) that they belong to. A cost line is a position and a
    count; the one after `calls=` is the cost of the callee, which has lines of its own.
    """
    total = 0
    ours = after_call = False
    for line in dump.splitlines():
        if line.startswith("ob="):
            ours = "/_native/_core." in line
        elif line.startswith("calls="):
            after_call = True
        elif re.fullmatch(r"[+\-*\d]\d* \d+", line):
            if ours and not after_call:
                total += int(line.split()[1])
            after_call = False
    return total


def counters() -> Counts:
    """What guard_counts.py counts, by step."""
    return json.loads(_run([sys.executable, "-m", "tests.tools.guard_counts"]).splitlines()[-1])


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"make guard: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def exceeded(found: Counts, committed: Counts, bands: Mapping[str, float]) -> list[str]:
    """The counts beyond their band, in words; counts that only one side has, too."""
    lines = []
    for part in sorted({*found, *committed}):
        now, before = found.get(part, {}), committed.get(part, {})
        for name in sorted({*now, *before}):
            title = f"{part}, {name}"
            if name not in now or name not in before:
                lines.append(f"{title}: expected {before.get(name)}, found {now.get(name)}")
            elif now[name] > before[name] * (1 + bands[band_of(part, name)]):
                lines.append(f"{title}: expected at most {before[name]}, found {now[name]}")
    return lines


def band_of(part: str, name: str) -> str:
    """Which band of guard.json a count has."""
    if part == INSTRUCTIONS:
        return INSTRUCTIONS
    return name.split(",")[0]


def made_with() -> dict[str, str]:
    """What counts depend on, beside the code."""
    core: Any = _native.core
    compiler = re.search(
        rb"(GCC: \([^)]*\)|clang version) [\d.]+", Path(core.__file__).read_bytes()
    )
    return {
        "compiler": "not known" if compiler is None else compiler.group().decode(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "torch", "transformers")},
    }


def missing() -> str | None:
    """What this machine lacks, or None."""
    if shutil.which("valgrind") is None:
        return "the program valgrind, found none; on Debian: apt-get install valgrind"
    if _native.core is None or "avx2" not in _native.core.levels():
        return f"native code for AVX2, found none: {_native.reason}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="write the counts of now")
    options = parser.parse_args()
    lack = missing()
    if lack is not None:
        print(f"make guard: expected {lack}", file=sys.stderr)
        return 2
    found: Counts = {INSTRUCTIONS: instructions(), **counters()}
    committed = json.loads(COUNTS.read_text())
    before: Counts = committed["counts"]
    for part, counts in found.items():
        print(part)
        for name, count in counts.items():
            old = before.get(part, {}).get(name)
            change = f"{count / old - 1:+.1%}" if old else ""
            print(f"  {name:58}{count:>12,}{change:>9}")
    here = made_with()
    for name, value in here.items():
        if value != committed["made_with"].get(name):
            print(f"{name}: counted with {committed['made_with'].get(name)}, here {value}")
    if options.update:
        content = {"bands": committed["bands"], "made_with": here, "counts": found}
        COUNTS.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    beyond = exceeded(found, before, committed["bands"])
    print(*beyond, f"guard: {len(beyond)} counts beyond their band", sep="\n")
    return int(bool(beyond))


if __name__ == "__main__":
    sys.exit(main())
