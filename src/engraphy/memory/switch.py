"""Switches a memory off for a while: `with memory.disabled():`.

The switch is a context variable, not a flag of the memory: other threads and tasks keep using the
memory. So does a thread that is started inside the `with`, since a new thread starts with the
defaults of all context variables.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DISABLED: ContextVar[tuple[object, ...]] = ContextVar("engraphy_disabled", default=())


def is_disabled(memory: object) -> bool:
    """Whether this thread or task runs without `memory`."""
    disabled_memories = _DISABLED.get()
    return bool(disabled_memories) and any(other is memory for other in disabled_memories)


@contextmanager
def disabled(memory: object) -> Iterator[None]:
    """Runs without `memory` until the end of the `with`; may be nested."""
    token = _DISABLED.set((*_DISABLED.get(), memory))
    try:
        yield
    finally:
        _DISABLED.reset(token)
