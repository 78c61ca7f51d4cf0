"""The benchmarks with goals, one after the other, and one table of what they claim.

    python bench/all.py [--only update,lookup] [--json FILE]

Each benchmark runs in a process of its own, and nothing beside it; its own output is printed if it
fails, or with --verbose. A figure is a ratio of medians within its benchmark (of least times in
remote). "limit" is what a C program reaches in the same run (in remote: pyarrow's Flight alone);
where the goal is beyond it, it is the goal. The exit status is 1 if a benchmark fails. A goal that
is not reached is marked in the table, and is no failure: speed is not a test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from claims import Claim, read

BENCHES = {
    "update": "Row updates",
    "rows": "Rows as numbers",
    "address": "Addresses",
    "hot": "Hot index",
    "lookup": "Look-up of a batch",
    "decoded_token": "One decoded token",
    "fusion": "Fusion in training and prefill",
    "serve": "A served Qwen4-Exp table, read ahead",
    "plan": "A plan beside what was waited for",
    "remote": "Rows of another process",
    "end_to_end": "End to end",
}


# The table has one thread's reading of numbers; two threads' are on its page.
OPTIONS = {"rows": ["--threads", "1"]}


def run(name: str, folder: Path, verbose: bool) -> tuple[dict[str, Any], list[Claim]] | None:
    """Runs a benchmark. Returns its machine and claims, or None if it failed."""
    target = folder / f"{name}.json"
    script = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, str(script), "--json", str(target), *OPTIONS.get(name, [])],
        capture_output=True,
        text=True,
    )
    if verbose or done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    if done.returncode:
        print(f"{script.name}: exit status {done.returncode}", file=sys.stderr)
        return None
    return read(target)


def line(claim: Claim) -> str:
    """One line of the table."""
    found = f"{claim.found:.3g}"
    if claim.error is not None:
        found += f" +- {claim.error:.1g}"
    goal = "" if claim.goal is None else f"{claim.sense} {claim.goal:g}"
    limit = "" if claim.limit is None else f"{claim.limit:.3g}"
    mark = {True: "yes", False: "NO", None: ""}[claim.met]
    return f"  {claim.what:66}{found:>16} {claim.unit:<3}{goal:>14}{limit:>8}{mark:>5}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(BENCHES), help="names, separated by commas")
    parser.add_argument("--json", type=Path, help="writes all claims to this file")
    parser.add_argument("--verbose", action="store_true", help="print what each benchmark prints")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(BENCHES)}, found {', '.join(unknown)}")

    begun = time.perf_counter()
    collected: dict[str, Any] = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            began = time.perf_counter()
            result = run(name, Path(folder), options.verbose)
            if result is None:
                failed.append(name)
                continue
            machine, claims = result
            if not collected:
                print(" | ".join(f"{key} {value}" for key, value in machine.items()))
                print(f"\n  {'':66}{'found':>16}    {'goal':>14}{'limit':>8}{'met':>5}")
            collected[name] = json.loads(Path(folder, f"{name}.json").read_text())
            print(f"{BENCHES[name]} (bench/{name}.py, {time.perf_counter() - began:.0f} s)")
            print("\n".join(map(line, claims)), flush=True)
    print(f"\n{time.perf_counter() - begun:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(collected, indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
