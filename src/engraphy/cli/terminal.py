"""What the commands share at a terminal: errors as one line, progress of long work on stderr, and
columns of figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table as Grid

from ..errors import EngraphyError
from ..system.signals import Terminated, exit_code, terminable

_LOG_SECONDS = 30.0


@contextmanager
def errors(interrupted: str) -> Iterator[None]:
    """What Engraphy raises on purpose is one line for the user, not a traceback. SIGTERM is taken
    as Ctrl-C.

    interrupted: advice on Ctrl-C and SIGTERM, which exit with 130 and 143.
    """
    try:
        with terminable():
            yield
    except EngraphyError as error:
        Console(stderr=True).print(
            f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True
        )
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "transformers":
            raise
        Console(stderr=True).print('transformers is not installed: pip install "engraphy\\[hf]"')
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        what = "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"
        detail = f" ({error})" if str(error) else ""
        Console(stderr=True).print(escape(f"{what}{detail}; {interrupted}"), soft_wrap=True)
        raise typer.Exit(exit_code(error)) from None


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function of (stage, bytes done, bytes in all; 0 = unknown): a bar with speed and time left
    for each stage, or a line now and then where stderr is no terminal."""
    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}
    logged = time.monotonic()

    def step(stage: str, done: int, total: int) -> None:
        nonlocal logged
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total or None, completed=done)
        bars.update(tasks[stage], completed=done)
        if not console.is_terminal and time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            console.print(f"{stage} {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    with bars:
        yield step


def grid(columns: Mapping[str, Sequence[Any]]) -> None:
    """Prints columns of equal lengths below their names."""
    made = Grid(box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        made.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    # A grid wider than the terminal breaks its lines; nothing is cut off.
    needed = Console(width=10_000).measure(made).maximum
    Console(width=max(Console().width, needed)).print(made)
