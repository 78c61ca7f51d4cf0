"""Settings of glibc's malloc for processes that train on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# By default malloc gives large buffers back to the system after each use. On a CPU the page faults
# of a small model's step then cost as much as its arithmetic. These settings keep the buffers, on
# huge pages if there are any.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@contextmanager
def tuned_malloc() -> Iterator[None]:
    """Processes that are started within use MALLOC, unless the environment says otherwise."""
    missing = {name: value for name, value in MALLOC.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
