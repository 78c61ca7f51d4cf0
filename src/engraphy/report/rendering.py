"""How every page is made: templates that escape, styles and scripts from files, checked numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..errors import ConfigError
from .markup import printable

_HERE = Path(__file__).parent


def asset(name: str) -> Markup:
    """A style sheet or script of this folder, as it is."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


@functools.cache
def templates() -> Environment:
    """Templates that escape every value but the charts, which are markup already."""
    return Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _printable(value: object) -> object:
    """What a template shows of a value, before it is escaped."""
    return value if isinstance(value, Markup) else printable(value)


def check_finite(value: object, place: str) -> None:
    """Raises ConfigError naming the first number that is not finite."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = ((f".{key}", inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((f"[{index}]", inner) for index, inner in enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: expected a finite number, found {value}")
    for step, inner in items:
        check_finite(inner, f"{place}{step}")
