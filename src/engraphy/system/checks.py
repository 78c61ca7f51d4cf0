"""Checks of what a user passes in.

Each error names the field, what was expected and what was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError


def is_int(value: object) -> bool:
    """Whether a value is an integer of Python or numpy. A bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float of Python or numpy. A bool is none."""
    return is_int(value) or isinstance(value, (float, np.floating))


def as_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A value as an int.

    Args:
        name: Name of the field, for the message.
        value: What the user passed in: an integer of Python or numpy. A bool is refused.
        least: The smallest value that is valid; None = any.
        most: The largest value that is valid; None = any. Needs `least`.

    Raises:
        ConfigError: `value` is no integer, or out of range.
    """
    if not is_int(value):
        raise ConfigError(f"{name}: expected an integer, found {value!r}")
    if most is not None and not (least or 0) <= value <= most:
        raise ConfigError(f"{name}: expected {least or 0} to {most}, found {value}")
    if least is not None and value < least:
        raise ConfigError(f"{name}: expected at least {least}, found {value}")
    return int(value)


def as_ints(name: str, values: Any) -> tuple[int, ...]:
    """A list of integers as a tuple of ints.

    Args:
        name: Name of the field, for the message.
        values: A list, tuple, range or numpy array [N] of integers. A set is refused: it has no
            order, and the order decides the primes.

    Raises:
        ConfigError: `values` is no such list, or one of them is no integer.
    """
    is_array = isinstance(values, np.ndarray) and values.ndim == 1
    if not (is_array or isinstance(values, Sequence)):
        raise ConfigError(f"{name}: expected a list of integers, found {values!r}")
    return tuple(as_int(name, value) for value in values)


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass instance, by name; not copied."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def known_fields(cls: type[Any], data: Any) -> dict[str, Any]:
    """The fields of a dataclass, as read from JSON.

    Args:
        cls: The dataclass.
        data: A mapping with exactly its fields.

    Raises:
        ConfigError: `data` is no mapping, or has other fields.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(data, Mapping) or set(data) != known:
        found = sorted(data) if isinstance(data, Mapping) else data
        raise ConfigError(f"{cls.__name__}: expected the fields {sorted(known)}, found {found!r}")
    return dict(data)


def check_array(
    name: str, array: Any, shape: tuple[int | None, ...], dtypes: tuple[type, ...]
) -> None:
    """Checks shape and dtype of an array.

    Args:
        name: Name of the argument, for the message.
        array: What the user passed in.
        shape: The expected shape; None = any size.
        dtypes: The dtypes that are valid.

    Raises:
        InputError: It is no numpy array, or shape or dtype differ.
    """
    if isinstance(array, np.ndarray) and _is_one_of(array.dtype, dtypes):
        if _fits(array.shape, shape):
            return
    wanted = ", ".join("N" if size is None else str(size) for size in shape)
    names = " or ".join(dtype.__name__ for dtype in dtypes)
    raise InputError(f"{name}: expected {names} [{wanted}], found {describe(array)}")


def _is_one_of(dtype: np.dtype[Any], types: tuple[type, ...]) -> bool:
    # A dtype is compared with a type in a microsecond, a type with a type in no time.
    return (dtype.type in types and dtype.isnative) or dtype in types


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if shape == wanted:  # the usual case, without a loop
        return True
    if len(shape) != len(wanted):
        return False
    for want, size in zip(wanted, shape, strict=True):
        if want is not None and want != size:
            return False
    return True


def check_out(out: np.ndarray, shape: tuple[int, ...], dtypes: tuple[type, ...]) -> None:
    """Checks that an array can be written in place.

    Args:
        out: What the user passed in.
        shape: The expected shape.
        dtypes: The dtypes that are valid.

    Raises:
        InputError: Shape or dtype differ, or it is not C-contiguous and writeable.
    """
    check_array("out", out, shape, dtypes)
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise InputError(
            f"out: expected a writeable, C-contiguous array, found strides {out.strides}, "
            f"writeable {out.flags.writeable}"
        )


def describe(value: Any) -> str:
    """dtype and shape of an array, else the name of the type: for messages."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
