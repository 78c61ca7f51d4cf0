"""os.fork for tests."""

from __future__ import annotations

import os
import sys
import warnings


def fork() -> int:
    """os.fork, beside other threads and with coverage measured.

    Python warns of forking beside threads; here it is meant. The child is not measured: another
    thread may hold coverage's lock just then, which nobody would ever release in the child.
    """
    trace = sys.gettrace()
    sys.settrace(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        sys.settrace(trace)
    return child
