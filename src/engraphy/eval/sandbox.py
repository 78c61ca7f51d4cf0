"""Runs programs that a model wrote, each in a process of its own with no network, no files to
write, no processes to start, another user, and limits of memory and time.

`jail` is what runs in that process. A protection that is demanded and cannot be had here is an
error: the program does not run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, SandboxUnavailable
from . import jail

PROTECTIONS = (jail.NETWORK, jail.FILES, jail.PROCESSES, jail.USER)
"""Names of what can be had or be missing; memory and time are always limited."""
_START = 10.0  # seconds that an interpreter may take to start, beside the program's own
_REPORT = 1 << 16  # bytes


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Wall-clock time.
        memory_bytes: Address space, the interpreter's included.
    """

    seconds: float = 3.0
    memory_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if not 0 < self.seconds < 86_400:
            raise ConfigError(f"seconds: expected 0 to 86400, found {self.seconds}")
        if self.memory_bytes < 1 << 26:
            raise ConfigError(f"memory_bytes: expected 2 ** 26 or more, found {self.memory_bytes}")


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: Whether it ran to its end.
        reason: "passed", "timed out", or "failed: " and why.
    """

    passed: bool
    reason: str


@dataclass(frozen=True)
class Sandbox:
    """Runs programs.

    Attributes:
        limits: Of each program.
        without: Names of PROTECTIONS that may be missing.
        protections: How each protection is had here; None = not at all.
    """

    limits: Limits
    without: frozenset[str]
    protections: dict[str, str | None]

    def run(self, program: str) -> Outcome:
        """Runs a Python program to its end.

        Args:
            program: Its text. It passes if no exception leaves it.

        Raises:
            SandboxUnavailable: A demanded protection is missing by now.
        """
        demanded = [name for name in PROTECTIONS if name not in self.without]
        lines, status = _jailed(program, demanded, self.limits)
        if not lines:
            raise SandboxUnavailable(
                f"sandbox: expected a report of its protections, found none (status {status})"
            )
        _refuse_missing(lines[0]["protections"], demanded)
        if len(lines) > 1:
            reason = lines[1]["result"]
            return Outcome(reason == "passed", reason)
        if status in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
            return Outcome(False, "timed out")
        if status < 0:
            return Outcome(False, f"failed: {signal.Signals(-status).name}")
        return Outcome(False, "failed: it ended before its last line")


def sandbox(limits: Limits | None = None, without: Collection[str] = ()) -> Sandbox:
    """Finds out what protections are to be had here.

    A process that is not root has no other user to become. So that is only said, not an error.

    Args:
        limits: Of each program; None = 3 seconds and 1 GiB.
        without: Names of protections to do without, where they are missing.

    Raises:
        SandboxUnavailable: A protection is missing that is not in `without`.
        ConfigError: There is no protection of such a name.
    """
    unknown = sorted(set(without) - set(PROTECTIONS))
    if unknown:
        raise ConfigError(f"without: expected names of {PROTECTIONS}, found {', '.join(unknown)}")
    limits = limits or Limits()
    optional = {*without, *([jail.USER] if os.geteuid() else [])}
    lines, status = _jailed("", [], limits)
    if len(lines) != 2 or lines[1]["result"] != "passed":
        raise SandboxUnavailable(
            f"sandbox: expected an empty program to run, found {lines} (status {status})"
        )
    protections = lines[0]["protections"]
    _refuse_missing(protections, [name for name in PROTECTIONS if name not in optional])
    return Sandbox(limits, frozenset(optional), protections)


def _refuse_missing(protections: dict[str, str | None], demanded: Collection[str]) -> None:
    missing = [name for name in demanded if protections[name] is None]
    if missing:
        raise SandboxUnavailable(
            f"sandbox: expected the protections {', '.join(demanded)}, "
            f"found none of {', '.join(missing)} on this machine"
        )


def _jailed(program: str, demanded: list[str], limits: Limits) -> tuple[list[Any], int]:
    """The lines of the report of a process that ran a program, and its exit status."""
    nonce = secrets.token_hex(16)
    order = {
        "program": program,
        "nonce": nonce,
        "demanded": demanded,
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
    }
    report, write_end = os.pipe()
    with open(report, "rb") as lines:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(Path(jail.__file__)), str(write_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(write_end,),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            process.communicate(json.dumps(order).encode(), timeout=limits.seconds + _START)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        return list(_reported(lines.read(_REPORT), nonce)), status


def _reported(text: bytes, nonce: str) -> list[Any]:
    """The lines that carry the nonce: what the program itself wrote to the pipe does not."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and values.get("nonce") == nonce:
                found.append(values)
    return found
