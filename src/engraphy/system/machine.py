"""Memory that this process can still get: what the machine has, and what its control groups leave
of it.

A container's limit stands in a group of /proc/self/cgroup or in any group above it, so all of them
are asked. Version 2 and the memory controller of version 1 may stand side by side. `root` is "/"
but in tests, which make up such a tree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import ConfigError
from .environment import FREE_MEMORY

VARIABLE = FREE_MEMORY.name
"""Environment variable: bytes that count as free, whatever the machine says."""


class _Kind(NamedTuple):
    """Names of one version of control groups. kept: lines of memory.stat that no reclaim gives
    back."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]
    usual: str


_V2 = _Kind(
    "memory.max",
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
    "sys/fs/cgroup",
)
_V1 = _Kind(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "sys/fs/cgroup/memory",
)


def free_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes of memory that this process can still get; None where the system does not say.

    The least of MemAvailable of /proc/meminfo (the page cache counts as available) and of what each
    control group on the way up leaves: its limit less its usage, without page cache that can be
    given back. ENGRAPHY_FREE_MEMORY in the environment, in bytes, is the answer whatever the system
    says. Raises ConfigError for a value of it that is no number of bytes.
    """
    given = FREE_MEMORY.given()
    if given:
        if not (given.isascii() and given.isdigit()):
            raise ConfigError(f"{VARIABLE}: expected a number of bytes, found {given!r}")
        return int(given)
    found = [
        _meminfo(Path(root), "MemAvailable"),
        *(_left(folder, kind) for folder, kind in _groups(Path(root))),
    ]
    return min((size for size in found if size is not None), default=None)


def total_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes of memory that this process could have were it alone: MemTotal or the least limit of
    its control groups.

    None where the system does not say.
    """
    limits = [_number(folder / kind.limit) for folder, kind in _groups(Path(root))]
    found = [_meminfo(Path(root), "MemTotal"), *limits]
    return min((size for size in found if size is not None), default=None)


def _groups(root: Path) -> Iterator[tuple[Path, _Kind]]:
    """Folders of this process' memory groups, from its own one up to the mount point."""
    for line in _lines(root / "proc/self/cgroup") or ("0::/", "1:memory:/"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            kind = _V2
        elif "memory" in controllers.split(","):
            kind = _V1
        else:
            continue
        for mount, top in _mounts(root, kind):
            inside = PurePosixPath(os.path.relpath(path, top))
            if (
                ".." in inside.parts
            ):  # a group that this mount does not show: its own top is all that can be seen
                inside = PurePosixPath()
            yield from ((mount / place, kind) for place in (inside, *inside.parents))


def _mounts(root: Path, kind: _Kind) -> list[tuple[Path, str]]:
    """Where a version is mounted, and which group is the top of the mount; the usual place if that
    is not said."""
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, about = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(about) < 3:
            continue
        if kind is _V2:
            suits = about[0] == "cgroup2"
        else:
            suits = about[0] == "cgroup" and "memory" in about[2].split(",")
        if suits:
            top, place = (_plain(field) for field in fields[3:5])
            found.append((root / place.lstrip("/"), top))
    return found or [(root / kind.usual, "/")]


def _left(folder: Path, kind: _Kind) -> int | None:
    """What the limit of one group leaves; None without a limit."""
    limit = _number(folder / kind.limit)
    if limit is None:
        return None
    counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    given_back = sum(
        int(counts[name]) for name in kind.reclaimable if counts.get(name, "").isdigit()
    )
    used = max(0, (_number(folder / kind.usage) or 0) - given_back)
    return max(0, limit - used)


def _meminfo(root: Path, name: str) -> int | None:
    """A line of /proc/meminfo in bytes."""
    for line in _lines(root / "proc/meminfo"):
        words = line.split()
        if words and words[0] == f"{name}:" and words[1].isdigit():
            return int(words[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or where there is none."""
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().split("\n") if line.strip()]
    except (OSError, ValueError):
        return []


def _plain(field: str) -> str:
    """A path as mountinfo writes it, without its octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
