"""Counts the allocations of numpy arrays, exactly, by numpy's own hook for them (NEP 49)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from numpy._core import _multiarray_umath

_SET_HANDLER = 304  # the place of PyDataMem_SetHandler in numpy's C API, from 1.22 on
_SIZE = ctypes.c_size_t
_PLACE = ctypes.c_void_p
_MALLOC = ctypes.CFUNCTYPE(_PLACE, _PLACE, _SIZE)
_CALLOC = ctypes.CFUNCTYPE(_PLACE, _PLACE, _SIZE, _SIZE)
_REALLOC = ctypes.CFUNCTYPE(_PLACE, _PLACE, _PLACE, _SIZE)
_FREE = ctypes.CFUNCTYPE(None, _PLACE, _PLACE, _SIZE)


class _Allocator(ctypes.Structure):
    _fields_ = (
        ("context", _PLACE),
        ("malloc", _MALLOC),
        ("calloc", _CALLOC),
        ("realloc", _REALLOC),
        ("free", _FREE),
    )


class _Handler(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("allocator", _Allocator),
    )


class _Counter:
    """The functions that numpy calls. Arrays refer to them for as long as they live."""

    def __init__(self) -> None:
        self.number = self.bytes = 0
        c = ctypes.CDLL(None)
        c.malloc.restype = c.calloc.restype = c.realloc.restype = _PLACE
        c.malloc.argtypes = (_SIZE,)
        c.calloc.argtypes = (_SIZE, _SIZE)
        c.realloc.argtypes = (_PLACE, _SIZE)
        c.free.argtypes = (_PLACE,)
        self._c = c
        functions = _MALLOC(self._malloc), _CALLOC(self._calloc), _REALLOC(self._realloc)
        allocator = _Allocator(None, *functions, _FREE(lambda _, place, size: c.free(place)))
        self.handler = _Handler(b"counter", 1, allocator)

    def _count(self, size: int) -> None:
        self.number += 1
        self.bytes += size

    def _malloc(self, _: Any, size: int) -> Any:
        self._count(size)
        return self._c.malloc(size)

    def _calloc(self, _: Any, count: int, size: int) -> Any:
        self._count(count * size)
        return self._c.calloc(count, size)

    def _realloc(self, _: Any, place: Any, size: int) -> Any:
        self._count(size)
        return self._c.realloc(place, size)


_KEPT: list[Any] = []  # an array that was made under a handler calls it when it is freed


@contextlib.contextmanager
def numpy_allocations() -> Iterator[dict[str, int]]:
    """Fills number and bytes of the allocations of this thread when the `with` ends."""
    counter = _Counter()
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (_PLACE, ctypes.c_char_p, _PLACE)
    capsule = new_capsule(ctypes.addressof(counter.handler), b"mem_handler", None)
    _KEPT.append((counter, capsule))
    counts: dict[str, int] = {}
    before = _set_handler(capsule)
    try:
        yield counts
    finally:
        _set_handler(before)
        counts["number"], counts["bytes"] = counter.number, counter.bytes


def _set_handler(capsule: Any) -> Any:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = _PLACE, (ctypes.py_object, ctypes.c_char_p)
    api = pointer(_multiarray_umath._ARRAY_API, None)
    table = ctypes.cast(api, ctypes.POINTER(_PLACE))
    function = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[_SET_HANDLER] or 0)
    return function(capsule)
