"""A memory that takes no part for a moment: `with memory.disabled():`.

A context variable, not a flag of the memory: other threads and tasks go on with it. A thread that
is started inside the `with` begins with the memory on, as it begins with every context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DISABLED: ContextVar[tuple[object, ...]] = ContextVar("engraphy_disabled", default=())


def is_disabled(memory: object) -> bool:
    """Whether this thread or task runs without `memory`."""
    return any(one is memory for one in _DISABLED.get())


@contextmanager
def disabled(memory: object) -> Iterator[None]:
    """Without `memory` until the end; may be nested."""
    token = _DISABLED.set((*_DISABLED.get(), memory))
    try:
        yield
    finally:
        _DISABLED.reset(token)
