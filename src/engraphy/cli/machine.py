"""The command `engraphy machine`: what this installation and this machine have to offer.

plan.py and simulate.py have the verbs about where a table may lie.
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .. import __version__, _native
from ..errors import EngraphyError
from ..system import cpu
from ..system.machine import free_memory, total_memory
from .arguments import JSON
from .plan import plan, probe
from .simulate import simulate

app = typer.Typer(
    no_args_is_help=True, help="What this machine has to offer, and whether a table's reads hide."
)

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers")


app.command()(probe)
app.command()(plan)
app.command()(simulate)


@app.command()
def doctor(as_json: bool = JSON) -> None:
    """Show what is installed and what the CPU has. Exits with 1 if ENGRAPHY_NATIVE is not met."""
    facts = report()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        Console().print(render(facts))
    if not facts["native"]["usable"]:
        raise typer.Exit(1)


def report() -> dict[str, Any]:
    """What `engraphy machine doctor` shows, as plain JSON values.

    Sizes are bytes; None means absent, or unknown on this system. `native.usable` is False only if
    ENGRAPHY_NATIVE demands a core that this installation or CPU lacks.
    """
    return {
        "engraphy": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "native": _native_facts(),
        "cpu": cpu.facts(),
        "threads": _thread_facts(),
        "memory": _memory_facts(),
    }


def render(facts: dict[str, Any]) -> Table:
    """The report as a table for people to read."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    native, cpu, threads, memory = (facts[key] for key in ("native", "cpu", "threads", "memory"))
    table.add_row("engraphy", facts["engraphy"])
    table.add_row("python", facts["python"])
    for name, found in facts["packages"].items():
        table.add_row(name, found or "not installed")
    table.add_row(
        "native core", f"{'active' if native['active'] else 'not active'}: {native['reason']}"
    )
    table.add_row("instruction set", native["level"])
    table.add_row("cpu", cpu["model"] or "unknown")
    table.add_row(
        "cpu has",
        ", ".join(f"{name} {_yes(cpu[name])}" for name in ("avx2", "avx512", "amx", "bf16")),
    )
    speeds = {True: "fast", False: "slow on this CPU: compute in float32", None: "unknown"}
    table.add_row("bf16 matmul", speeds[cpu["bf16"]])
    table.add_row(
        "threads",
        f"{threads['usable']} of {threads['cpus']} CPUs usable, torch uses {threads['torch']}",
    )
    table.add_row("memory", f"{_gib(memory['available'])} free of {_gib(memory['total'])}")
    table.add_row("huge pages", memory["huge_pages"] or "unknown")
    return table


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _native_facts() -> dict[str, Any]:
    try:
        level, usable = _native.level(), True
    except EngraphyError:
        level, usable = "none", False
    return {
        "active": usable and level != "off",
        "usable": usable,
        "level": level,
        "reason": _native.reason,
    }


def _thread_facts() -> dict[str, int]:
    import torch  # imported here, so that `engraphy --version` does not wait for it

    cpus = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    return {"cpus": cpus, "usable": usable, "torch": torch.get_num_threads()}


def _memory_facts() -> dict[str, Any]:
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        huge_pages = modes[modes.index("[") + 1 : modes.index("]")]
    except (OSError, ValueError):
        huge_pages = None
    return {"total": total_memory(), "available": free_memory(), "huge_pages": huge_pages}


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _yes(has: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[has]
