"""The compiled core: whether it is there, which instruction set it uses, and why.

`core` is the compiled module, or None if the plain Python versions have to do. Read it as
`_native.core` at each use: `forced` rebinds it.

ENGRAPHY_NATIVE chooses: auto (the default: the best that this machine runs, else none), off, or
scalar, avx2, avx512. If the demanded level is not available, importing works and the first use of
`core` raises NativeUnavailable (ConfigError if the value is none of these).

ENGRAPHY_THREADS is the number of threads that share a large gather or a large read of rows as
numbers; `set_threads` changes it later. The default is the number of CPUs that the process may use,
at most 8. Calls on less than 4096 rows take one thread. The fusion of a chunk takes as many threads
as torch does, if that is fewer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, cast

from ..errors import ConfigError, EngraphyError, NativeUnavailable
from ..system.environment import NATIVE, THREADS

CHOICES = NATIVE.values
_MOST_THREADS = 1024
_USUAL_THREADS = 8  # a few threads already take the bandwidth of the memory


# Functions below that return the module have no return type: no annotation can name a module, and
# the inferred type is what a type checker compares each native call with (`_core.pyi`).


class _Refused:
    """Stands for a core that was demanded and is not available: any use of it raises."""

    def __init__(self, error: EngraphyError):
        self._error = error

    def __getattr__(self, name: str) -> NoReturn:
        raise type(self._error)(str(self._error))


def compiled():
    """The compiled module, for code that is reached only with it.

    Raises:
        NativeUnavailable: There is none.
    """
    if core is None:
        raise NativeUnavailable(reason)
    return core


def level() -> str:
    """The instruction set in use: scalar, avx2 or avx512; "off" without native code.

    Raises:
        NativeUnavailable: ENGRAPHY_NATIVE demands a level that is not available.
        ConfigError: ENGRAPHY_NATIVE or ENGRAPHY_THREADS has an invalid value.
    """
    return "off" if core is None else core.level()


def threads() -> int:
    """How many threads share a large call; 1 without native code. Raises as `level` does."""
    return 1 if core is None else core.threads()


def set_threads(count: int) -> None:
    """Let `count` threads share a large call.

    Args:
        count: From 1 to 1024.

    Raises:
        ConfigError: `count` is not an integer in this range.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_THREADS:
        raise ConfigError(
            f"threads: expected an integer from 1 to {_MOST_THREADS}, found {count!r}"
        )
    if _compiled is not None:
        _compiled.set_threads(count)


@contextmanager
def forced(demand: str) -> Iterator[None]:
    """Use another core within a `with` block; for tests and benchmarks. Not thread-safe.

    Args:
        demand: One of CHOICES.

    Raises:
        NativeUnavailable: The level is not available; raised at once.
        ConfigError: `demand` is none of CHOICES.
    """
    global core, reason
    core_before = core
    reason_before = reason
    level_before = None if _compiled is None else _compiled.level()
    try:
        core, reason = _choose(demand, f"forced to {demand!r}")
        level()
        yield
    finally:
        core = core_before
        reason = reason_before
        if _compiled is not None and level_before is not None:
            _compiled.set_level(level_before)


def _load():
    try:
        import engraphy._native._core as module

        return module, ""
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}._core":
            raise
        return None, (
            "no compiled extension in this installation (the native build failed or was switched "
            "off when it was installed; reinstall with ENGRAPHY_REQUIRE_NATIVE=true to see why)"
        )
    except ImportError as error:
        return None, f"the compiled extension does not load: {error}"


def _choose(demand: str, source: str):
    """The core and the reason for it."""
    if demand not in CHOICES:
        return _refuse(ConfigError(f"{source}: expected one of {', '.join(CHOICES)}"))
    if demand == "off":
        return None, f"switched off: {source}"
    if _compiled is None:
        if demand == "auto":
            return None, _missing
        return _refuse(NativeUnavailable(f"{source}: {_missing}"))
    levels = _compiled.levels()
    if demand == "auto":
        best = levels[-1]
        _compiled.set_level(best)
        return (
            _compiled,
            f"compiled; {best} is the best of what this CPU runs ({', '.join(levels)})",
        )
    if not _compiled.set_level(demand):
        return _refuse(NativeUnavailable(f"{source}: this CPU and build run {', '.join(levels)}"))
    return _compiled, f"compiled; {source}"


def _refuse(error: EngraphyError) -> tuple[None, str]:
    """A core that raises. Its type is that of no core, so that no caller has to expect it."""
    return cast(None, _Refused(error)), str(error)


def _wanted_threads() -> str:
    usual = min(_USUAL_THREADS, len(os.sched_getaffinity(0)))
    return THREADS.given() or str(usual)


_compiled, _missing = _load()
_demand = NATIVE.given() or NATIVE.default
core, reason = _choose(_demand, f"{NATIVE.name}={_demand!r}")  # reason: why `core` is what it is
_wanted = _wanted_threads()
try:
    set_threads(int(_wanted) if _wanted.isascii() and _wanted.isdigit() else -1)
except ConfigError:
    core, reason = _refuse(
        ConfigError(f"{THREADS.name}={_wanted!r}: expected an integer from 1 to {_MOST_THREADS}")
    )
