"""SIGTERM is taken as Ctrl-C is: what a long run has done is saved first.

`terminable` makes SIGTERM an exception, a KeyboardInterrupt of its own kind, so that whatever
cleans up or saves on Ctrl-C does so then. `stopping` is for loops: the first signal lets the step
end, a second one ends it at once. In a worker process no second one counts, since Ctrl-C, a service
manager and the parent may all tell it the same: the parent kills it if need be.
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
    """Whether a signal has come. Handed out by `stopping`."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def error(self, message: str) -> KeyboardInterrupt:
        """The exception to raise once all is saved: Terminated for SIGTERM."""
        return _exception(self.number or signal.SIGINT)(message)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated within, as SIGINT raises KeyboardInterrupt. Only in the main
    thread."""

    def end(number: int, frame: Any) -> None:
        raise Terminated

    with _handlers(end, signal.SIGTERM):
        yield


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGINT and SIGTERM set the Stop that is handed out, so that no step is cut in half; a second
    one raises KeyboardInterrupt or Terminated at once, but in a worker process. Only in the main
    thread."""
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        if stop and multiprocessing.parent_process() is None:
            raise _exception(number)("stopped at once")
        stop.number = stop.number or number

    with _handlers(note, signal.SIGINT, signal.SIGTERM):
        yield stop


def end_workers(workers: Iterable[Any]) -> None:
    """Ask processes (of `multiprocessing`) to end, and wait until they have saved; interrupted
    meanwhile, kill them."""
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
    """What a shell expects of a process that ended so: 128 and the signal's number."""
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
