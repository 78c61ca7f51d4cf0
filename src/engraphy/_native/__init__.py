"""The compiled core: whether it is there, which instruction set it uses, and why.

`core` is the compiled module, or None where the plain Python versions have to do. Read it as
`_native.core` at each use: `forced` rebinds it. ENGRAPHY_NATIVE chooses: auto (the default: the
best that this machine runs, else none), off, or scalar, avx2, avx512. Where a level is demanded
that cannot be had, importing works and the first use of `core` raises NativeUnavailable
(ConfigError for a value that is none of these).

ENGRAPHY_THREADS says how many threads share a large gather or a large read of rows as numbers
(`set_threads` does the same later): by default as many as the process may use CPUs, at most 8.
Calls on less than 4096 rows take one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ..errors import ConfigError, EngraphyError, NativeUnavailable
from ..system.environment import NATIVE, THREADS

CHOICES = NATIVE.values
_MOST_THREADS, _USUAL_THREADS = 1024, 8  # a few threads already take what the memory gives

core: Any  # the compiled module (its functions: `_core.pyi`), or None
reason: str  # one sentence: why `core` is what it is


class _Refused:
    """Stands for a core that was demanded and cannot be had: any use of it raises."""

    def __init__(self, error: EngraphyError):
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise type(self._error)(str(self._error))


def level() -> str:
    """The instruction set in use: scalar, avx2 or avx512; "off" without native code. Raises as
    `core` does."""
    return "off" if core is None else core.level()


def threads() -> int:
    """How many threads share a large call; 1 without native code."""
    return 1 if core is None else core.threads()


def set_threads(count: int) -> None:
    """Let `count` threads share a large call. Raises ConfigError for what is not an integer from 1
    to 1024."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_THREADS:
        raise ConfigError(
            f"threads: expected an integer from 1 to {_MOST_THREADS}, found {count!r}"
        )
    if _compiled is not None:
        _compiled.set_threads(count)


@contextmanager
def forced(demand: str) -> Iterator[None]:
    """Use `demand` (one of CHOICES) within a `with` block; for tests and benchmarks. Not
    thread-safe.

    Raises NativeUnavailable at once when it cannot be had, ConfigError when it is none of CHOICES.
    """
    global core, reason
    before = core, reason, _compiled and _compiled.level()
    try:
        core, reason = _choose(demand, f"forced to {demand!r}")
        level()
        yield
    finally:
        core, reason, compiled_level = before
        if _compiled is not None:
            _compiled.set_level(compiled_level)


def _choose(demand: str, source: str) -> tuple[Any, str]:
    if demand not in CHOICES:
        return _refuse(ConfigError(f"{source}: expected one of {', '.join(CHOICES)}"))
    if demand == "off":
        return None, f"switched off: {source}"
    if _compiled is None:
        return (
            (None, _missing)
            if demand == "auto"
            else _refuse(NativeUnavailable(f"{source}: {_missing}"))
        )
    levels = _compiled.levels()
    if demand == "auto":
        _compiled.set_level(levels[-1])
        return (
            _compiled,
            f"compiled; {levels[-1]} is the best of what this CPU runs ({', '.join(levels)})",
        )
    if not _compiled.set_level(demand):
        return _refuse(NativeUnavailable(f"{source}: this CPU and build run {', '.join(levels)}"))
    return _compiled, f"compiled; {source}"


def _refuse(error: EngraphyError) -> tuple[Any, str]:
    return _Refused(error), str(error)


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("._core", __name__), ""
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}._core":
            raise
        return None, (
            "no compiled extension in this installation (the native build failed or was switched off when it was "
            "installed; reinstall with ENGRAPHY_REQUIRE_NATIVE=true to see why)"
        )
    except ImportError as error:
        return None, f"the compiled extension does not load: {error}"


_compiled, _missing = _load()
_demand = NATIVE.given() or NATIVE.default
core, reason = _choose(_demand, f"{NATIVE.name}={_demand!r}")
_wanted = THREADS.given() or str(min(_USUAL_THREADS, len(os.sched_getaffinity(0))))
try:
    set_threads(int(_wanted) if _wanted.isascii() and _wanted.isdigit() else -1)
except ConfigError:
    core, reason = _refuse(
        ConfigError(f"{THREADS.name}={_wanted!r}: expected an integer from 1 to {_MOST_THREADS}")
    )
