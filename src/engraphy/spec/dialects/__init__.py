"""The published dialects, by name: one record each, one file each.

A new dialect is a file here with its record, an entry in `DIALECTS`, a preset of the same name in
engraphy/fusion/presets.py if it has released parameters, and golden vectors in the tests. All
other code asks the record. A package may add its own record to `DIALECTS` in the same way, before
it makes a HashSpec of that name.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ...errors import ConfigError
from .deepseek_v41 import DEEPSEEK_V41
from .demo import DEMO
from .primes import is_prime
from .qwen4 import QWEN4
from .record import Dialect, Fields, GgufNames, Release

if TYPE_CHECKING:
    from ..hash import HashSpec

__all__ = [
    "DIALECTS",
    "Dialect",
    "GgufNames",
    "Release",
    "all_primes",
    "described_by",
    "is_prime",
    "multipliers",
    "named",
]

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (DEMO, DEEPSEEK_V41, QWEN4)}


def named(name: str) -> Dialect:
    """The record of a dialect.

    Args:
        name: A key of DIALECTS.

    Returns:
        Its record.

    Raises:
        ConfigError: No dialect has this name.
    """
    if name not in tuple(DIALECTS):  # a key of a dict would have to be hashable
        raise ConfigError(f"dialect: expected one of {tuple(DIALECTS)}, found {name!r}")
    return DIALECTS[name]


def described_by(fields: Fields) -> Dialect:
    """The dialect whose release describes its memory by these fields of a config.

    Args:
        fields: The fields of a model's config, as `model_config.config_fields` gives them.

    Returns:
        Its record. The dialect that was registered last comes first if fields fit several.

    Raises:
        ConfigError: No released dialect knows the config.
    """
    known: list[str] = []
    for dialect in reversed(DIALECTS.values()):
        if dialect.release is None:
            continue
        if fields.get(dialect.release.marker):
            return dialect
        known.append(f"{dialect.release.marker} ({dialect.release.title})")
    raise ConfigError(
        f"expected a config with {' or '.join(known)}; found neither among {len(fields)} fields"
    )


def multipliers(spec: HashSpec, index: int) -> tuple[int, ...]:
    """N odd multipliers of the layer at position `index` of spec.layer_ids."""
    return named(spec.dialect).multipliers(spec, index)


@functools.lru_cache(maxsize=64)
def all_primes(spec: HashSpec) -> tuple[tuple[int, ...], ...]:
    """Moduli of all layers: L tuples of C primes."""
    return named(spec.dialect).primes(spec)
