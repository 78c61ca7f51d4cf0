"""What differs between the versions of transformers that a memory joins; nothing else asks for a
version."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from transformers import __version__

from ..errors import ConfigError, InputError

LOWEST, HIGHEST = (5, 20), (5, 24)
"""Minor versions that the tests of this package have run against."""
ANY_VERSION = "ENGRAPHY_TRANSFORMERS"
PAGES = "a memory's state has no place in pages: use generate(), not generate_batch()"
_CACHE_ARGUMENTS = ("cache", "past_key_values")  # from 5.24 on; before


def check_version() -> None:
    """Raises ConfigError for a version of transformers that was not tested, unless the environment
    variable ENGRAPHY_TRANSFORMERS is "untested"."""
    found = tuple(int(part) for part in __version__.split(".")[:2])
    if LOWEST <= found <= HIGHEST or os.environ.get(ANY_VERSION) == "untested":
        return
    lowest, highest = (".".join(map(str, minor)) for minor in (LOWEST, HIGHEST))
    raise ConfigError(
        f"transformers: expected a version from {lowest} to {highest}, for which decoding with a memory "
        f'was tested, found {__version__}; pip install "transformers>={lowest},<={highest}.99", or set '
        f"{ANY_VERSION}=untested to go on at your own risk"
    )


def cache_argument(arguments: Iterable[str]) -> str | None:
    """The name of the argument in which a decoder takes its cache; None if it takes none."""
    known = set(arguments)
    return next((name for name in _CACHE_ARGUMENTS if name in known), None)


def rename_cache(given: dict[str, Any], argument: str) -> None:
    """Put a call's cache under the name that its decoder has for it, as the decoder's own forward
    would.

    A pre-hook sees the name that the caller used. From 5.24 on it may be the old one; where both
    are given the new one counts. Raises InputError before 5.24 for `cache`, in which continuous
    batching hands its pages in.
    """
    if argument == "cache" and "past_key_values" in given:
        old = given.pop("past_key_values")
        given.setdefault("cache", old)
    elif argument != "cache" and given.get("cache") is not None:
        raise InputError(
            f"cache: this version of transformers takes a cache as {argument}, found "
            f"{type(given['cache']).__name__} as cache; {PAGES}"
        )
