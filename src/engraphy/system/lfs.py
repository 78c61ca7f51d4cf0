"""Pointer files of Git LFS: a few lines of text that a clone has in place of a large file."""

from __future__ import annotations

import os

from ..errors import EngraphyError

_BEGINS = b"version https://git-lfs"


def is_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as pointers do; False for what cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_BEGINS)) == _BEGINS
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False


def refuse_pointer(path: str | os.PathLike[str], error: type[EngraphyError]) -> None:
    """Raise `error` if a file is a pointer. For whoever found that a file is not what it should be."""
    if is_pointer(path):
        raise error(
            f"{os.fspath(path)}: expected the file itself, found a Git LFS pointer to it: run `git lfs pull` "
            "in its folder"
        )
