"""The processor: its name, and the instructions that a choice depends on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_BF16 = {  # CPU flag: name
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 BF16",
    "bf16": "Arm's bfloat16 instructions",
}


def bf16_instructions() -> str | None:
    """Name of this CPU's instructions for bfloat16 matmuls.

    Returns None if it has none, or if that is not known.
    """
    flags = _flags(_cpuinfo())
    return next((name for flag, name in _BF16.items() if flag in flags), None)


def facts(cpuinfo: dict[str, str] | None = None) -> dict[str, Any]:
    """Name of the processor, and whether it has each instruction set.

    Args:
        cpuinfo: One entry of /proc/cpuinfo; by default this machine's.

    Returns:
        "model", "avx2", "avx512", "amx" and "bf16"; None = not known.
    """
    if cpuinfo is None:
        cpuinfo = _cpuinfo()
    flags = _flags(cpuinfo)
    if not flags:
        unknown = dict.fromkeys(("avx2", "avx512", "amx", "bf16"))
        return {"model": platform.processor() or None, **unknown}
    return {
        "model": cpuinfo.get("model name") or platform.machine(),
        "avx2": "avx2" in flags,
        "avx512": _AVX512 <= flags,
        "amx": {"amx_tile", "amx_bf16"} <= flags,
        "bf16": bool(_BF16.keys() & flags),
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty if there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _flags(cpuinfo: dict[str, str]) -> set[str]:
    return set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())


def name() -> str:
    """Name of the processor, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
