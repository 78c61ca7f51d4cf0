"""The environment variables that Engraphy reads. VARIABLES lists all of them.

Every module that reads one uses its record here, so the reference page can be generated from the
list. ENGRAPHY_NATIVE and ENGRAPHY_THREADS are read once, when the native part is loaded; the others
are read at each use.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import ConfigError


class Variable(NamedTuple):
    """One environment variable.

    Attributes:
        name: Its name, which begins with ENGRAPHY_.
        values: The values that it can have, or a description in words if they cannot be listed.
        default: What counts if it is not set, or is empty: one of `values` if these are listed.
        meaning: What it does, in one sentence.
        build_time: True if it is read when Engraphy is installed, not when it runs.
    """

    name: str
    values: tuple[str, ...] | str
    default: str
    meaning: str
    build_time: bool = False

    def given(self) -> str | None:
        """The value that is set, or None if the variable is not set or is empty."""
        return os.environ.get(self.name) or None


NATIVE = Variable(
    "ENGRAPHY_NATIVE",
    ("auto", "off", "scalar", "avx2", "avx512"),
    "auto",
    "Chooses the instruction set of the C++ core: auto takes the best that this machine runs, off "
    "uses the plain Python versions, and a level that is not available is an error.",
)
THREADS = Variable(
    "ENGRAPHY_THREADS",
    "an integer from 1 to 1024",
    "the number of CPUs that the process may use, at most 8",
    "Sets how many threads share a gather or read of 4096 rows or more, and at most the fusion of "
    "a chunk.",
)
HUGE_PAGES = Variable(
    "ENGRAPHY_HUGE_PAGES",
    ("on", "off"),
    "on",
    "Says whether rows in RAM lie on huge pages if the kernel has any.",
)
RESIDENCY = Variable(
    "ENGRAPHY_RESIDENCY",
    ("auto", "off"),
    "auto",
    "Says whether the system is asked which rows of a mapped table are in memory.",
)
DTYPE = Variable(
    "ENGRAPHY_DTYPE",
    ("auto", "float32", "bfloat16"),
    "auto",
    "Sets the dtype that a command computes in if its options give none: auto takes bfloat16 on a "
    "GPU and on a CPU with instructions for bfloat16 matmuls, else float32.",
)
FREE_MEMORY = Variable(
    "ENGRAPHY_FREE_MEMORY",
    "a number of bytes",
    "what the machine and its control groups leave",
    "Sets how much memory counts as free, whatever the system says.",
)
CACHE = Variable(
    "ENGRAPHY_CACHE",
    "a folder",
    "~/.cache/engraphy",
    "Sets the folder in which fetched data is kept.",
)
TRANSFORMERS = Variable(
    "ENGRAPHY_TRANSFORMERS",
    "untested, or nothing",
    "nothing",
    "The value untested allows versions of transformers that Engraphy was not tested with.",
)
STORE = Variable(
    "ENGRAPHY_STORE",
    "the URL of a store",
    "what the model's folder says, else its table",
    "Sets where a serving engine reads the rows of a memory from.",
)
METRICS = Variable(
    "ENGRAPHY_METRICS",
    "HOST:PORT",
    "nothing is served",
    "Sets where a serving engine answers GET /metrics with the counters of a memory's stores.",
)
REQUIRE_NATIVE = Variable(
    "ENGRAPHY_REQUIRE_NATIVE",
    ("true", "false"),
    "false",
    "Makes the installation fail if the C++ core cannot be built; otherwise Engraphy is installed "
    "without it.",
    build_time=True,
)
VARIABLES = (
    NATIVE,
    THREADS,
    HUGE_PAGES,
    RESIDENCY,
    DTYPE,
    FREE_MEMORY,
    CACHE,
    TRANSFORMERS,
    STORE,
    METRICS,
    REQUIRE_NATIVE,
)
"""All environment variables of Engraphy."""


def switch(variable: Variable) -> str:
    """The value of a variable whose values are listed.

    Args:
        variable: One of VARIABLES.

    Returns:
        The value that is set, or the default if none is.

    Raises:
        ConfigError: It is set to something that is not one of its values.
    """
    value = variable.given() or variable.default
    if value not in variable.values:
        raise ConfigError(
            f"{variable.name}: expected one of {', '.join(variable.values)}, found {value!r}"
        )
    return value
