"""What a number was measured with: the processor and the commit of this code."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def commit() -> str | None:
    """Short hash of the commit that this package was at when first asked, with "-dirty" after it
    where the package's files differ from that commit; None outside a repository that holds the
    package, or without git."""
    if (
        _git("ls-files", "--error-unmatch", "__init__.py") is None
    ):  # an installed copy below somebody's repository
        return None
    head = _git("rev-parse", "--short", "HEAD")
    return head and head + ("-dirty" if _git("diff", "--quiet", "HEAD", "--", "..") is None else "")


def _git(*arguments: str) -> str | None:
    """Output of a git command that changes nothing, run beside this file; None where it fails."""
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
