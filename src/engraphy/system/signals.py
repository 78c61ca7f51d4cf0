"""SIGTERM works as Ctrl-C does: a long run saves what it has done first.

`terminable` turns SIGTERM into an exception, a kind of KeyboardInterrupt, so that code that cleans
up or saves on Ctrl-C runs then too. `stopping` is for loops: after the first signal the step ends
normally, a second one ends it at once. In a worker process only the first one counts, since it may
get the same signal from the terminal, a service manager and its parent; the parent kills it if it
has to.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


class Stop:
    """Whether a signal has come: true once it has. `stopping` gives it to its block.

    Attributes:
        number: The signal's number, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def error(self, message: str) -> KeyboardInterrupt:
        """The exception to raise after saving: Terminated for SIGTERM, else KeyboardInterrupt."""
        return _exception(self.number or signal.SIGINT)(message)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, as SIGINT raises KeyboardInterrupt.

    Does nothing outside the main thread.
    """

    def end(number: int, frame: Any) -> None:
        raise Terminated

    with _handlers(end, signal.SIGTERM):
        yield


@contextmanager
def stopping() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM set the Stop, so that no step is cut in half.

    A second signal raises KeyboardInterrupt or Terminated at once, except in a worker process. Does
    nothing outside the main thread.
    """
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        if stop and multiprocessing.parent_process() is None:
            raise _exception(number)("stopped at once")
        stop.number = stop.number or number

    with _handlers(note, signal.SIGINT, signal.SIGTERM):
        yield stop


def end_workers(workers: Iterable[Any]) -> None:
    """Asks processes (of `multiprocessing`) to end, and waits until they have saved.

    If this process is interrupted meanwhile, it kills them.
    """
    workers = list(workers)
    try:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
    except BaseException:
        for worker in workers:
            worker.kill()
        raise


def exit_code(error: KeyboardInterrupt) -> int:
    """The exit code that a shell expects: 128 plus the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def _exception(number: int) -> type[KeyboardInterrupt]:
    return Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def _handlers(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
