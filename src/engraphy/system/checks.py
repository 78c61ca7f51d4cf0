"""Checks of what a user passes in; each error names the field, what was expected and what was
found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. Raises ConfigError naming the field for what is none (bools too) or below
    `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ConfigError(f"{name}: expected an integer, found {value!r}")
    if least is not None and value < least:
        raise ConfigError(f"{name}: expected at least {least}, found {value}")
    return int(value)


def as_ints(name: str, values: Any) -> tuple[int, ...]:
    """`values` as a tuple of ints. Raises ConfigError naming the field for what is no list of them."""
    # Sets are refused with the rest: they have no order, and order decides the primes.
    if not isinstance(values, Sequence) and not (
        isinstance(values, np.ndarray) and values.ndim == 1
    ):
        raise ConfigError(f"{name}: expected a list of integers, found {values!r}")
    return tuple(as_int(name, value) for value in values)


def fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def known_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(data, Mapping) or set(data) != known:
        found = sorted(data) if isinstance(data, Mapping) else data
        raise ConfigError(f"{cls.__name__}: expected the fields {sorted(known)}, found {found!r}")
    return dict(data)


def check_out(out: np.ndarray, shape: tuple[int, ...], dtypes: tuple[type, ...]) -> None:
    """Raise InputError unless `out` can be written in place: shape, dtype, C-contiguous, writeable."""
    check_array("out", out, shape, dtypes)
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise InputError(
            f"out: expected a writeable, C-contiguous array, found strides {out.strides}, "
            f"writeable {out.flags.writeable}"
        )


def check_array(
    name: str, array: Any, shape: tuple[int | None, ...], dtypes: tuple[type, ...]
) -> None:
    """Raise InputError naming the array unless its shape (None = any size) and dtype are as
    expected."""
    fits = (
        isinstance(array, np.ndarray)
        and array.dtype in dtypes
        and (
            array.shape == shape
            or array.ndim == len(shape)
            and all(
                want is None or want == found
                for want, found in zip(shape, array.shape, strict=True)
            )
        )
    )
    if not fits:
        wanted = ", ".join("N" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name}: expected {' or '.join(t.__name__ for t in dtypes)} [{wanted}], "
            f"found {describe(array)}"
        )


def describe(value: Any) -> str:
    return (
        f"{value.dtype} {list(value.shape)}"
        if isinstance(value, np.ndarray)
        else type(value).__name__
    )
