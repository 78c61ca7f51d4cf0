"""What runs in the process of `sandbox`: takes protections, then runs one Python program.

Only the standard library is imported, because the file is run by its path in a fresh interpreter.
Linux on x86_64 has every protection; elsewhere the filter of system calls is missing, and the
report says so. The protections stand against code that is wrong, careless or hostile to the
machine. They do not stand against a program that looks for this file's own pipe in order to claim
that it passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import pwd
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

NETWORK, FILES, PROCESSES, USER = "network", "files", "processes", "user"
_LONGEST = 300  # characters of a reason

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # of unshare(2)
_NO_NEW_PRIVILEGES, _SECCOMP, _PARENT_DEATH = 38, 22, 1  # of prctl(2)
_FILTER = 2

# Numbers of system calls on x86_64 (arch/x86/entry/syscalls/syscall_64.tbl).
_OPEN, _OPENAT = 2, 257
_UNNAMED = 0o20000000  # __O_TMPFILE; os.O_TMPFILE has O_DIRECTORY too
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | _UNNAMED
_DENIED = {
    # socket, connect, accept, bind, listen, socketpair, accept4, io_uring_*
    NETWORK: (41, 42, 43, 49, 50, 53, 288, 425, 426, 427),
    # creat, truncate, ftruncate, rename, mkdir, rmdir, link, unlink, symlink, chmod, fchmod,
    # chown, fchown, lchown, utime, mknod, mount, umount2, *setxattr, *removexattr, utimes, mkdirat,
    # mknodat, fchownat, futimesat, unlinkat, renameat, linkat, symlinkat, fchmodat, utimensat,
    # fallocate, open_by_handle_at, renameat2, memfd_create, openat2, fchmodat2, setxattrat,
    # removexattrat; shared memory and queues: shmget, msgget, mq_open
    FILES: (
        *(85, 76, 77, 82, 83, 84, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 165, 166),
        *(188, 189, 190, 197, 198, 199, 235, 258, 259, 260, 261, 263, 264, 265, 266, 268, 280),
        *(285, 304, 316, 319, 437, 452, 463, 466, 29, 68, 240),
    ),
    # clone, fork, vfork, execve, execveat, clone3; kill, tkill, tgkill, rt_sigqueueinfo,
    # rt_tgsigqueueinfo, pidfd_send_signal, pidfd_open, pidfd_getfd; ptrace, process_vm_*, unshare,
    # setns, bpf, userfaultfd, perf_event_open, add_key, request_key, keyctl, prlimit64
    PROCESSES: (
        *(56, 57, 58, 59, 322, 435, 62, 200, 234, 129, 297, 424, 434, 438, 101, 310, 311, 272),
        *(308, 321, 323, 298, 248, 249, 250, 302),
    ),
}
# Opcodes of classic BPF, and what a filter returns (linux/seccomp.h).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000 | 1, 0x7FFF0000  # 1: EPERM
_X86_64, _X32 = 0xC000003E, 0x40000000


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def own_network() -> str | None:
    """A network namespace without an interface. Returns how it was had; None = not at all."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK) == 0:
        return "a network namespace of its own"
    if os.geteuid() and libc.unshare(_NEW_USER | _NEW_NETWORK) == 0:
        return "a network namespace of its own, in a user namespace"
    return None


def own_user() -> str | None:
    """Root becomes the user nobody for good. Returns None for another user, and if nobody cannot
    read the standard library, in which case root stays root."""
    if os.geteuid():
        return None
    nobody = pwd.getpwnam("nobody")
    library = reachable_library()
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(nobody.pw_gid)
    os.seteuid(nobody.pw_uid)
    readable = any(os.path.exists(f"{folder}/os.py") for folder in library)
    os.seteuid(0)
    os.setegid(0)
    if not readable:
        os.setgroups(groups)
        return None
    os.setresgid(nobody.pw_gid, nobody.pw_gid, nobody.pw_gid)
    os.setresuid(nobody.pw_uid, nobody.pw_uid, nobody.pw_uid)
    return "the user nobody"


def reachable_library() -> list[str]:
    """Names the folders that modules come from through open files, because the folders above them
    may be closed to another user (a Python below /root). Returns the new sys.path."""
    renamed = {
        folder: f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}"
        for folder in sys.path
        if os.path.isdir(folder)
    }
    sys.path[:] = renamed.values()
    for module in list(sys.modules.values()):
        for index, place in enumerate(getattr(module, "__path__", ())):
            above = next((name for name in renamed if place.startswith(f"{name}/")), None)
            if above is not None:
                module.__path__[index] = renamed[above] + place.removeprefix(above)
    return list(renamed.values())


def limit(seconds: float, memory_bytes: int) -> None:
    """Limits of time, address space, processes, and of bytes written to a file (none)."""
    cpu = int(seconds) + 2
    limits = {
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def filtered() -> str | None:
    """A seccomp filter: system calls that open sockets, change files, or make or touch other
    processes fail with EPERM. Returns None where there is no filter."""
    if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    code = _filter()
    array = (_Instruction * len(code))(*code)
    program = _Program(len(code), array)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return None
    if libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        return None
    return "a filter of system calls"


def _filter() -> list[_Instruction]:
    denied = [number for numbers in _DENIED.values() for number in numbers]
    # Places of what is jumped to: behind four instructions, two of open, one for each denied call.
    allow = 6 + len(denied)
    openat, old_open, refuse, kill = allow + 1, allow + 4, allow + 7, allow + 8
    lines = [
        (_LOAD, 4, None, None),  # seccomp_data.arch
        (_EQUAL, _X86_64, None, kill),
        (_LOAD, 0, None, None),  # seccomp_data.nr
        (_AT_LEAST, _X32, kill, None),
        (_EQUAL, _OPENAT, openat, None),
        (_EQUAL, _OPEN, old_open, None),
        *((_EQUAL, number, refuse, None) for number in denied),
        (_RETURN, _ALLOW, None, None),
        *_opening(16 + 2 * 8, refuse),  # the flags of openat are its third argument
        *_opening(16 + 8, refuse),
        (_RETURN, _REFUSE, None, None),
        (_RETURN, _KILL, None, None),
    ]
    code = []
    for at, (op, value, true, false) in enumerate(lines):
        # A jump counts from the instruction behind it; None = go on there.
        jt, jf = (0 if place is None else place - at - 1 for place in (true, false))
        code.append(_Instruction(op, jt, jf, value))
    return code


def _opening(flags: int, refuse: int) -> list[tuple[int, int, int | None, int | None]]:
    """Refuses to open a file for anything but reading. flags: their place in seccomp_data."""
    return [
        (_LOAD, flags, None, None),
        (_ANY_BIT, _WRITING, refuse, None),
        (_RETURN, _ALLOW, None, None),
    ]


def protect(seconds: float, memory_bytes: int) -> dict[str, str | None]:
    """Takes every protection that can be had. Returns how each was had; None = not at all."""
    network = own_network()
    user = own_user()
    ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)
    limit(seconds, memory_bytes)
    calls = filtered()
    return {NETWORK: network or calls, FILES: calls, PROCESSES: calls, USER: user}


def run(program: str) -> str:
    """Runs a program as the main module: "passed", or why it failed."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        return f"failed: {type(error).__name__}: {_text(error)}"[:_LONGEST]
    return "passed"


def _text(error: BaseException) -> str:
    with contextlib.suppress(BaseException):
        return str(error)
    return "its message cannot be had"


def main(arguments: Sequence[str]) -> None:
    """Reads {"program", "nonce", "demanded", "seconds", "memory_bytes"} from stdin, and reports to
    the file descriptor in the arguments: one line of protections, one line of the result."""
    report = int(arguments[0])
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    nonce = order["nonce"]
    protections = protect(order["seconds"], order["memory_bytes"])
    _tell(report, nonce, protections=protections)
    if any(protections[name] is None for name in order["demanded"]):
        return
    _tell(report, nonce, result=run(order["program"]))


def _tell(report: int, nonce: str, **values: Any) -> None:
    os.write(report, json.dumps({"nonce": nonce, **values}).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
