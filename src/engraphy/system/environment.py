"""Environment variables that give what is otherwise chosen from the machine.

ENGRAPHY_NATIVE and ENGRAPHY_THREADS are read when the native part is loaded (`_native`). Those here
are read at each use.
"""

from __future__ import annotations

import os

from ..errors import ConfigError

HUGE_PAGES = "ENGRAPHY_HUGE_PAGES", ("on", "off")
"""Whether rows in RAM lie on huge pages if the kernel has any."""
RESIDENCY = "ENGRAPHY_RESIDENCY", ("auto", "off")
"""Whether the system is asked which rows of a mapped table are in memory."""
DTYPE = "ENGRAPHY_DTYPE", ("auto", "float32", "bfloat16")
"""What commands compute in that are not given a dtype."""


def switch(variable: tuple[str, tuple[str, ...]]) -> str:
    """The value of one of this module's variables; the first of its values if it is not set.

    Raises ConfigError for any other value.
    """
    name, values = variable
    found = os.environ.get(name) or values[0]
    if found not in values:
        raise ConfigError(f"{name}: expected one of {', '.join(values)}, found {found!r}")
    return found
