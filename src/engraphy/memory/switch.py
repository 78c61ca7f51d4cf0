"""A memory that takes no part for a moment: `with memory.disabled():`.

This is a context variable, not a flag of the memory: other threads and tasks go on with the memory.
A thread that is started inside the `with` begins with the memory on, as it begins with the default
of every context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DISABLED: ContextVar[tuple[object, ...]] = ContextVar("engraphy_disabled", default=())


def is_disabled(memory: object) -> bool:
    """Whether this thread or task runs without `memory`."""
    return any(disabled_memory is memory for disabled_memory in _DISABLED.get())


@contextmanager
def disabled(memory: object) -> Iterator[None]:
    """Runs without `memory` until the end of the `with`; may be nested."""
    token = _DISABLED.set((*_DISABLED.get(), memory))
    try:
        yield
    finally:
        _DISABLED.reset(token)
