"""Helpers of the suite: random rows, threads, forked children, checks of rows."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from ...rows.format import RowFormat
from ..base import RowStore, Shards

_CHILD_SECONDS = 60  # a busy machine is slow


def random_rows(fmt: RowFormat, rows: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, row_bytes] of normally distributed numbers."""
    values_Nd = np.random.default_rng(seed).standard_normal((rows, fmt.d))
    return fmt.encode(values_Nd.astype(np.float32))


def random_ids(rows: int, count: int = 500, seed: int = 0) -> np.ndarray:
    """int64 [count]: ids below `rows`."""
    return np.random.default_rng(seed).integers(0, rows, count)


def write_rows(
    store: RowStore, shards: Shards | None, ids_N: np.ndarray, rows_NR: np.ndarray
) -> None:
    """Writes rows to the memory from `updating`, or with `scatter` if that gave None."""
    if shards is None:
        store.scatter(ids_N, rows_NR)
        return
    for id_, row in zip(ids_N.tolist(), rows_NR, strict=True):
        number, local = divmod(id_, len(shards[0]))
        shards[number][local] = row


def check_changed(store: RowStore, before: np.ndarray, ids: np.ndarray, new: np.ndarray) -> None:
    """Asserts that rows `ids` are `new`, and that all others are unchanged."""
    wanted = before.copy()
    wanted[ids] = new
    np.testing.assert_array_equal(store.gather(np.arange(len(wanted))), wanted)


def check_parts(shards: Shards, expected: np.ndarray) -> None:
    """Asserts that the shards are these rows, in equal parts except for the last."""
    np.testing.assert_array_equal(np.concatenate(shards), expected)
    sizes = [len(shard) for shard in shards]
    assert set(sizes[:-1]) <= {sizes[0]}
    assert 0 < sizes[-1] <= sizes[0]


def in_threads(count: int, act: Callable[[int], None]) -> None:
    """Runs act(0) ... act(count - 1) in threads, and raises their first error."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            act(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def in_children(checks: Sequence[Callable[[], object]]) -> None:
    """Asserts that each check passes, each in a new forked child. A child that hangs is killed.

    A check fails if it raises or returns False.
    """
    children: list[int] = []
    for check in checks:
        child = fork()
        if not child:
            _run_and_exit(check)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(ends), f"children ended with {ends}: 1 is a check that fails, -14 one that hangs"


def _run_and_exit(check: Callable[[], object]) -> NoReturn:
    """Ends the process: 0 if the check passes, 1 if it does not, a signal if it hangs."""
    signal.alarm(_CHILD_SECONDS)
    code = 1
    try:
        if check() is not False:
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fork() -> int:
    """os.fork beside other threads, without Python's warning and without coverage in the child.

    Another thread may hold coverage's lock at the fork, and the child would wait for it forever.
    """
    trace = sys.gettrace()
    sys.settrace(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        sys.settrace(trace)
    return child
