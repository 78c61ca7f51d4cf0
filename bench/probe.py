"""The limits of the machine, probed by probe.c, and a description of the machine; for the other
benchmarks.

The probe is compiled when it is needed, for this machine, and shares no code with the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

AHEAD = (4, 8, 16, 32)  # rows that are prefetched
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
PAGE = 4096
_LATE = 4e-4  # seconds that a sleep may take too long


class Probe:
    """Copies rows and reads pages as fast as a small C program can. Each call returns seconds."""

    def __init__(self) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise SystemExit(
                "the limits are probed by a C program: expected a compiler (cc, gcc or clang), "
                "found none"
            )
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "probe.so")
            command = [
                compiler,
                "-O3",
                "-march=native",
                "-pthread",
                "-shared",
                "-fPIC",
                "-o",
                str(library),
                str(Path(__file__).with_name("probe.c")),
            ]
            built = subprocess.run(command, capture_output=True, text=True)
            if built.returncode:
                raise SystemExit(
                    f"{' '.join(command)}: the probe does not compile:\n{built.stderr}"
                )
            self._library = ctypes.CDLL(str(library))
        address = ctypes.c_void_p
        long = ctypes.c_int64
        flags = [ctypes.c_int] * 3
        self._library.probe_gather.argtypes = [address, address, long, long, long, address, *flags]
        widen_flags = [ctypes.c_int] * 4
        sizes = [long] * 3
        self._library.probe_widen.argtypes = [address, address, *sizes, address, *widen_flags]
        self._library.probe_widen.restype = ctypes.c_double
        self._library.probe_pread.argtypes = [address, address, long, long, ctypes.c_int]
        self._library.probe_few.argtypes = [address, address, ctypes.c_int, long, long, address]
        self._library.probe_stream.argtypes = [address, long, long]
        self._library.probe_few.restype = self._library.probe_stream.restype = ctypes.c_double
        self._library.probe_resident.argtypes = [ctypes.c_int, long]
        self._library.probe_map.argtypes = [address, long, long, long]
        self._library.probe_map.restype = address
        self._library.probe_unmap.argtypes = [address, long]
        chase = [address, long, address, long, address, long, ctypes.c_int, ctypes.c_int, address]
        self._library.probe_chase.argtypes = chase
        self._library.probe_chase.restype = ctypes.c_double
        self._library.probe_spin.argtypes = [ctypes.c_double]
        self._library.probe_spin.restype = None
        number = ctypes.c_float
        self._library.probe_update.argtypes = [address, long, address, long, address, long, number]
        self._library.probe_update.restype = ctypes.c_double
        self._library.probe_sort.argtypes = [address, long, ctypes.c_int, address, address]
        self._library.probe_finite.argtypes = [address, long]
        self._library.probe_sort.restype = self._library.probe_finite.restype = ctypes.c_double
        self._library.probe_gather.restype = self._library.probe_pread.restype = ctypes.c_double
        self._library.probe_resident.restype = long

    def chase(
        self,
        small: np.ndarray,
        large: np.ndarray,
        starts: np.ndarray,
        loads: float,
        out: np.ndarray,
    ) -> float:
        """Chains of dependent random loads, uint32 each: on average `loads` from `small`, then one
        from `large`."""
        levels = int(loads)
        more = round(256 * (loads - levels))
        return self._library.probe_chase(
            small.ctypes.data,
            small.size,
            large.ctypes.data,
            large.size,
            starts.ctypes.data,
            starts.size,
            levels,
            more,
            out.ctypes.data,
        )

    def gather(
        self,
        table: np.ndarray,
        ids_N: np.ndarray,
        row_bytes: int,
        out: np.ndarray,
        threads: int,
        ahead: int,
        stream: bool,
        call_rows: int | None = None,
    ) -> float:
        """Copies rows of a table (uint8, contiguous) to `out`. With `call_rows`, each thread writes
        that many rows at a time to the same place."""
        if (
            ids_N.dtype != np.int64
            or int(ids_N.max()) >= table.nbytes // row_bytes
            or out.nbytes < row_bytes * (len(ids_N) if call_rows is None else threads * call_rows)
        ):
            raise ValueError("probe: ids, table and out do not fit each other")
        return _seconds(
            self._library.probe_gather(
                table.ctypes.data,
                ids_N.ctypes.data,
                len(ids_N),
                row_bytes,
                call_rows or len(ids_N),
                out.ctypes.data,
                threads,
                ahead,
                stream,
            )
        )

    def update(self, rows: np.ndarray, moments: np.ndarray, ids_U: np.ndarray) -> float:
        """Adds 0 to rows and moments (uint8 [n, row_bytes], whole f32) of distinct ascending
        ids."""
        if ids_U.dtype != np.int64 or int(ids_U[-1]) >= min(len(rows), len(moments)):
            raise ValueError("probe: ids and tables do not fit each other")
        return _seconds(
            self._library.probe_update(
                rows.ctypes.data,
                rows.shape[1] // 4,
                moments.ctypes.data,
                moments.shape[1] // 4,
                ids_U.ctypes.data,
                len(ids_U),
                0.0,
            )
        )

    def sort(self, ids_N: np.ndarray, keys_2N: np.ndarray) -> float:
        """Sorts row ids with their positions; keys_2N: uint64, room for the keys."""
        digit = (int(ids_N.max()).bit_length() + 1) // 2
        if ids_N.dtype != np.int64 or keys_2N.shape != (2, len(ids_N)):
            raise ValueError("probe: ids and keys do not fit each other")
        return _seconds(
            self._library.probe_sort(
                ids_N.ctypes.data,
                len(ids_N),
                digit,
                keys_2N[0].ctypes.data,
                keys_2N[1].ctypes.data,
            )
        )

    def finite(self, values: np.ndarray) -> float:
        """Reads float32 values once and looks whether all are finite. Raises OSError if not."""
        return _seconds(self._library.probe_finite(values.ctypes.data, values.nbytes // 64))

    def widen(
        self,
        table: np.ndarray,
        ids_N: np.ndarray,
        row_bytes: int,
        out_NR: np.ndarray,
        threads: int,
        ahead: int,
        second: bool,
        stream: bool,
    ) -> float:
        """Reads rows of a table (uint8, contiguous) and writes as many bytes as `out` has: the
        rows' own, or whole lines that repeat them. `second`: prefetches to the second level of the
        caches."""
        out_bytes = out_NR.nbytes // len(ids_N)
        if (
            ids_N.dtype != np.int64
            or int(ids_N.max()) >= table.nbytes // row_bytes
            or out_NR.nbytes != out_bytes * len(ids_N)
        ):
            raise ValueError("probe: ids, table and out do not fit each other")
        return _seconds(
            self._library.probe_widen(
                table.ctypes.data,
                ids_N.ctypes.data,
                len(ids_N),
                row_bytes,
                out_bytes,
                out_NR.ctypes.data,
                threads,
                ahead,
                second,
                stream,
            )
        )

    def few(self, tables: np.ndarray, ids: np.ndarray, row_bytes: int, out: np.ndarray) -> float:
        """Copies rows `ids` (int64 [tables, N]) of several tables to `out`, all on their way at
        once. tables: uint64, the addresses of their first rows."""
        return self._library.probe_few(
            tables.ctypes.data, ids.ctypes.data, *ids.shape, row_bytes, out.ctypes.data
        )

    def stream(self, address: int, size: int, ahead: int) -> float:
        """Reads memory once, and fetches so many bytes ahead."""
        return self._library.probe_stream(address, size, ahead)

    def pause(self, seconds: float) -> None:
        """Waits for so long, to some microseconds, without Python's lock.

        The thread sleeps, and is busy for the last part, since a sleep ends late.
        """
        end = time.perf_counter() + seconds
        if seconds > _LATE:
            time.sleep(seconds - _LATE)
        self._library.probe_spin(end - time.perf_counter())

    def pread(self, files_N: np.ndarray, offsets_N: np.ndarray, depth: int) -> float:
        """Reads one page at each offset, from the file with the same index, `depth` reads under
        way."""
        files_N = np.ascontiguousarray(files_N, np.int32)
        offsets_N = np.ascontiguousarray(offsets_N, np.int64)
        return _seconds(
            self._library.probe_pread(
                files_N.ctypes.data, offsets_N.ctypes.data, len(offsets_N), PAGE, depth
            )
        )

    def resident(self, paths: Sequence[Path]) -> float:
        """Share of the files that is in the page cache."""
        cached = total = 0
        for path in paths:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                pages = self._library.probe_resident(file.fileno(), size)
            if pages < 0:
                raise OSError(-pages, os.strerror(-pages), str(path))
            cached += pages
            total += -(-size // PAGE)
        return cached / total

    @contextlib.contextmanager
    def mapped(self, paths: Sequence[Path], offset: int, size: int) -> Iterator[np.ndarray]:
        """The same part of several files as one array, uint8 [all], with each page in the page
        table. `offset` and `size` are whole pages."""
        with contextlib.ExitStack() as stack:
            files = np.array(
                [stack.enter_context(open(path, "rb")).fileno() for path in paths], np.int32
            )
            memory = self._library.probe_map(files.ctypes.data, len(files), offset, size)
        if not memory:
            raise OSError("the system refuses to map the files of the table")
        try:
            array_type = ctypes.c_uint8 * (len(files) * size)
            array = np.ctypeslib.as_array(array_type.from_address(memory))
            array[::PAGE].max()
            yield array
        finally:
            self._library.probe_unmap(memory, len(files) * size)


def _seconds(answer: float) -> float:
    if answer < 0:
        raise OSError(int(-answer), os.strerror(int(-answer)))
    return answer


def huge(size: int) -> np.ndarray:
    """uint8 [size], zero, on huge pages if the system has any."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def machine(folder: Path) -> dict[str, Any]:
    """What figures depend on; `folder` chooses the disk."""
    text = _first("/proc/cpuinfo", "model name") or platform.processor()
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [words for words in mounts if folder.resolve().is_relative_to(words[1])]
    mount = max(above, key=lambda words: len(words[1]))
    return {
        "cpu": text,
        "cores": len(os.sched_getaffinity(0)),
        "l3": _read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "disk": {"device": mount[0], "file_system": mount[2], **_disk(folder)},
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _disk(folder: Path) -> dict[str, str]:
    number = os.stat(folder).st_dev
    link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not link.exists():
        return {}
    device = link.resolve()
    if (device / "partition").exists():
        device = device.parent
    return {
        "name": device.name,
        "model": _read(str(device / "device/model")),
        "rotational": _read(str(device / "queue/rotational")),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "not known"


def _first(path: str, key: str) -> str:
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
