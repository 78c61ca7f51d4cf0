"""What goes wrong with writing, as one error: WriteFailed, whichever library found it."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..errors import EngraphyError, WriteFailed

_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers say it
_TORCH = re.compile("PytorchStreamWriter failed|unexpected pos")  # torch.save on a full disk


@contextmanager
def write_errors(path: Path, left: str = "nothing is left of it") -> Generator[None]:
    """Turns what the system refuses within the block into a WriteFailed that names `path`.

    Within another such block the outer path is named: the inner one may be a temporary.

    Args:
        path: What is written.
        left: What is on disk after the error, for the message.

    Raises:
        WriteFailed: The system, or a library that writes, reports an error.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        number = _number(reason)
        failed = WriteFailed(
            f"{path}: it cannot be written ({reason}); {left}{_space_left(path, number)}"
        )
        failed.errno = number
        raise failed from reason


def free_disk(path: Path) -> int:
    """Bytes that this user can still write to the file system of a path.

    If the path does not exist, its nearest parent that exists counts.
    """
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def _reason(error: BaseException) -> BaseException | None:
    """What could not be written, as the system or a library says it.

    Returns None if the error is about something else.
    """
    if isinstance(error, WriteFailed):
        return error.__cause__
    if isinstance(error, EngraphyError):
        return None  # it says by itself what was expected
    if isinstance(error, OSError) or _RUST.search(str(error)):
        return error
    if _TORCH.search(str(error)):
        return error.__context__ if isinstance(error.__context__, OSError) else error
    return None


def _number(reason: BaseException) -> int | None:
    """The system's number of an error."""
    match = _RUST.search(str(reason))
    if match is not None:
        return int(match[1])
    return reason.errno if isinstance(reason, OSError) else None


def _space_left(path: Path, number: int | None) -> str:
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return f", {free_disk(path)} bytes are free"
