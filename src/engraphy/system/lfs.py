"""Pointer files of Git LFS: a few lines of text that a clone has in place of a large file."""

from __future__ import annotations

import os

from ..errors import EngraphyError

_BEGINS = b"version https://git-lfs"


def is_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as pointers do. False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False


def refuse_pointer(path: str | os.PathLike[str], error: type[EngraphyError]) -> None:
    """Refuses a file that is a pointer. For callers that found that a file is not as it should be.

    Args:
        path: The file.
        error: The class to raise.

    Raises:
        EngraphyError: The file is a pointer; of class `error`.
    """
    if is_pointer(path):
        raise error(
            f"{os.fspath(path)}: expected the file itself, found a Git LFS pointer to it: "
            "run `git lfs pull` in its folder"
        )
