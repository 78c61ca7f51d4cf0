"""What a number was measured with: the processor and the commit of this code."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def commit() -> str | None:
    """The commit of this package at the first call.

    Returns:
        Its short hash, with "-dirty" after it if the package's files differ from that commit. None
        outside a repository that holds the package, or without git.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # an installed copy, perhaps below another repository
    head = _git("rev-parse", "--short", "HEAD")
    if head and _git("diff", "--quiet", "HEAD", "--", "..") is None:
        return f"{head}-dirty"
    return head


def _git(*arguments: str) -> str | None:
    """Output of a git command that changes nothing, run beside this file; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
