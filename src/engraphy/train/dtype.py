"""The dtype that a command computes in: as it is given, else as this machine is fast at it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..system.cpu import bf16_instructions
from ..system.environment import DTYPE, switch

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16")


@dataclass(frozen=True)
class DtypeChoice:
    """name: "float32" or "bfloat16". reason: why it was chosen, in a few words."""

    name: str
    reason: str

    @property
    def torch(self) -> torch.dtype:
        return getattr(torch, self.name)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def check_dtype(demand: str) -> str:
    """Returns `demand`. Raises ConfigError unless it is one of DTYPES."""
    if demand not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, found {demand!r}")
    return demand


def choose_dtype(demand: str = AUTO, device: str = "cpu") -> DtypeChoice:
    """The dtype to compute in on `device`.

    Args:
        demand: one of DTYPES. "auto" leaves the choice to ENGRAPHY_DTYPE. If that is not set, or
            "auto" too, the machine decides: bfloat16 on a GPU and on a CPU with instructions for
            bfloat16 matmuls, else float32.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: the demand, or what ENGRAPHY_DTYPE says, is none of DTYPES.
    """
    if check_dtype(demand) != AUTO:
        return DtypeChoice(demand, "given")
    variable = switch(DTYPE)
    if variable != AUTO:
        return DtypeChoice(variable, f"{DTYPE[0]} is set")
    if device == "cuda":
        return DtypeChoice("bfloat16", "on a GPU")
    instructions = bf16_instructions()
    if instructions is None:
        return DtypeChoice("float32", "this CPU has no instructions for bfloat16 matmuls")
    return DtypeChoice("bfloat16", f"this CPU has {instructions}")


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 on the CPU if `dtype` is "bfloat16", else nothing."""
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()
