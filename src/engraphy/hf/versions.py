"""What differs between versions of transformers. No other module asks for the version."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import __version__

from ..errors import ConfigError, InputError
from ..system.environment import TRANSFORMERS

LOWEST, HIGHEST = (5, 20), (5, 24)
"""The minor versions, lowest and highest, that the tests have run against."""
ANY_VERSION = TRANSFORMERS.name
"""The environment variable that, set to "untested", allows other versions."""
PAGES = "a memory's state has no place in pages: use generate(), not generate_batch()"
_CACHE_ARGUMENTS = ("cache", "past_key_values")  # the first from 5.24 on, the second before


def check_version() -> None:
    """Raises ConfigError if this version of transformers was not tested.

    The environment variable ENGRAPHY_TRANSFORMERS=untested allows any version.
    """
    found = tuple(int(part) for part in __version__.split(".")[:2])
    if LOWEST <= found <= HIGHEST or TRANSFORMERS.given() == "untested":
        return
    lowest, highest = (".".join(map(str, minor)) for minor in (LOWEST, HIGHEST))
    raise ConfigError(
        f"transformers: expected a version from {lowest} to {highest}, for which decoding with a "
        f"memory was tested, found {__version__}; "
        f'pip install "transformers>={lowest},<={highest}.99", or set {ANY_VERSION}=untested to go '
        "on at your own risk"
    )


def cache_argument(arguments: Iterable[str]) -> str | None:
    """Name of the argument in which a decoder takes its cache; None if it takes none."""
    known = set(arguments)
    return next((name for name in _CACHE_ARGUMENTS if name in known), None)


def rename_cache(arguments: dict[str, Any], name: str) -> None:
    """Put a call's cache under the name that its decoder uses, as the decoder's own forward would.

    A pre-hook sees the name that the caller used. From 5.24 on this may be the old one. If the call
    has both, the new one counts.

    Args:
        arguments: Arguments of the call; changed in place.
        name: `cache_argument` of the decoder.

    Raises:
        InputError: Before 5.24, the call has a `cache`: continuous batching hands its pages in so.
    """
    if name == "cache" and "past_key_values" in arguments:
        old = arguments.pop("past_key_values")
        arguments.setdefault("cache", old)
    elif name != "cache" and arguments.get("cache") is not None:
        raise InputError(
            f"cache: this version of transformers takes a cache as {name}, found "
            f"{type(arguments['cache']).__name__} as cache; {PAGES}"
        )
