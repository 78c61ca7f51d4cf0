"""What needs several hosts' worth of processes, at full size: make test-rack

    python -m tests.tools.rack [--only NAME ...]

A part is a module tests/tools/rack_NAME.py with `missing()`, what it needs and does not find, and
`run()`, which returns what it counted and raises AssertionError if that is wrong. If something is
missing, nothing runs, what is missing is said, and the exit status is 2. With
`make test-rack PARTS="pool redis"` these parts run alone. To add a part, add its name to PARTS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time

PARTS = ("redis", "guide", "pool", "engines", "faults")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="run these parts")
    names = parser.parse_args().only
    modules = {name: importlib.import_module(f"tests.tools.rack_{name}") for name in names}
    gaps = [f"{name}: {gap}" for name, module in modules.items() for gap in module.missing()]
    if gaps:
        print("make test-rack: expected " + "; ".join(gaps) + "; found none", file=sys.stderr)
        return 2
    for name, module in modules.items():
        begun = time.monotonic()
        print(f"{name}:", flush=True)
        counted = module.run()
        for what, value in counted.items():
            print(f"  {what}: {value:,}" if isinstance(value, int) else f"  {what}: {value}")
        print(f"  seconds: {time.monotonic() - begun:.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
