"""Memory that this process can still get: the machine's, within the limits of control groups.

A container's limit is set in a group of /proc/self/cgroup or in any group above it, so all of them
are read. Version 2 and the memory controller of version 1 may be mounted side by side. `root` is
"/" except in tests, which make up such a tree.
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
    """Names of one version of control groups.

    Attributes:
        limit: The file with the limit.
        usage: The file with the usage.
        reclaimable: Lines of memory.stat that count as usage, but can be reclaimed.
        usual: Where this version is usually mounted.
    """

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
    """Bytes of memory that this process can still get.

    This is the minimum of MemAvailable in /proc/meminfo and of what each control group, from this
    process' own up to the top, leaves: its limit minus its usage. Page cache that can be reclaimed
    counts as free. The environment variable ENGRAPHY_FREE_MEMORY, in bytes, overrides all this.

    Args:
        root: Folder that holds proc and sys.

    Returns:
        Bytes, or None if the system does not say.

    Raises:
        ConfigError: ENGRAPHY_FREE_MEMORY is not a number of bytes.
    """
    override = FREE_MEMORY.given()
    if override:
        if not (override.isascii() and override.isdigit()):
            raise ConfigError(f"{VARIABLE}: expected a number of bytes, found {override!r}")
        return int(override)
    left = [_left(folder, kind) for folder, kind in _groups(Path(root))]
    sizes = [_meminfo(Path(root), "MemAvailable"), *left]
    return min((size for size in sizes if size is not None), default=None)


def total_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes of memory that this process could have if it were alone.

    The minimum of MemTotal and the limits of its control groups.

    Args:
        root: Folder that holds proc and sys.

    Returns:
        Bytes, or None if the system does not say.
    """
    limits = [_number(folder / kind.limit) for folder, kind in _groups(Path(root))]
    sizes = [_meminfo(Path(root), "MemTotal"), *limits]
    return min((size for size in sizes if size is not None), default=None)


def _groups(root: Path) -> Iterator[tuple[Path, _Kind]]:
    """Folders of this process' memory groups, from its own group up to the mount point."""
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
            if ".." in inside.parts:
                # This mount does not show the group: only its own top can be seen.
                inside = PurePosixPath()
            for place in (inside, *inside.parents):
                yield mount / place, kind


def _mounts(root: Path, kind: _Kind) -> list[tuple[Path, str]]:
    """Where a version is mounted, and which group is at the top of the mount.

    Returns the usual place if mountinfo does not list the version.
    """
    mounts: list[tuple[Path, str]] = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        file_system = after.split(" ")  # type, source, options
        if len(fields) < 5 or len(file_system) < 3:
            continue
        if kind is _V2:
            is_mount = file_system[0] == "cgroup2"
        else:
            is_mount = file_system[0] == "cgroup" and "memory" in file_system[2].split(",")
        if is_mount:
            top = _plain(fields[3])
            place = _plain(fields[4])
            mounts.append((root / place.lstrip("/"), top))
    return mounts or [(root / kind.usual, "/")]


def _left(folder: Path, kind: _Kind) -> int | None:
    """Bytes that one group may still use; None if it has no limit."""
    limit = _number(folder / kind.limit)
    if limit is None:
        return None
    counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    reclaimable = sum(
        int(counts[name]) for name in kind.reclaimable if counts.get(name, "").isdigit()
    )
    used = _number(folder / kind.usage) or 0
    return max(0, limit - max(0, used - reclaimable))


def _meminfo(root: Path, name: str) -> int | None:
    """A line of /proc/meminfo in bytes."""
    for line in _lines(root / "proc/meminfo"):
        words = line.split()
        if words and words[0] == f"{name}:" and words[1].isdigit():
            return int(words[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or if there is no file."""
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().split("\n") if line.strip()]
    except (OSError, ValueError):
        return []


def _plain(field: str) -> str:
    """A path as mountinfo writes it, without its octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
