"""The page of a demo run: one HTML file with nothing outside it, and the numbers as JSON beside it.

`render` turns the dict of a run (format "engraphy-report-1") into the page, `write` puts both files
into a folder. sections.py and learned.py make the values of the page, templates/ makes its markup.
A section is left out if its part of the dict is missing, except the headline and the comparison.
The page holds no script, and its content security policy forbids loading anything.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..errors import ConfigError
from ..system.files import publish_file
from . import charts, learned, sections
from .markup import printable

FORMAT = "engraphy-report-1"
_HERE = Path(__file__).parent

Report = Mapping[str, Any]


def render(report: Report) -> str:
    """Returns the report of a demo run as one self-contained HTML page.

    Args:
        report: Plain dicts, lists, strings and numbers in format "engraphy-report-1"; losses in
            nats per token.

    Returns:
        The page, HTML 5. The same report always gives the same page.

    Raises:
        ConfigError: If the format is another one, a number is not finite, or a field is missing
            or malformed.
    """
    if report.get("format") != FORMAT:
        raise ConfigError(f"report: expected format {FORMAT!r}, found {report.get('format')!r}")
    _check_finite(report, "report")
    _check_arms(report)
    try:
        values = {
            "headline": sections.headline(report),
            "comparison": sections.comparison(report),
            "curves": sections.curves(report),
            "frequency": learned.frequency(report),
            "gates": learned.gates(report),
            "continuations": sections.continuations(report),
            "run": sections.run(report),
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        message = f"report: expected the fields of {FORMAT}, found {type(error).__name__}: {error}"
        raise ConfigError(message) from error
    style = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    return _templates().get_template("page.html.jinja").render(style=style, **values)


def write(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Writes report.json and report.html.

    Both are complete before either is put in place, each by a rename. An error leaves the files of
    an earlier report as they were.

    Args:
        report: As `render` takes it.
        folder: Where the files go; created if it does not exist.

    Returns:
        The path of the page.

    Raises:
        ConfigError: As `render` raises it, and for values that JSON cannot hold.
        WriteFailed: If the system refuses to write.
    """
    page = render(report)
    try:
        numbers = json.dumps(report, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"report: expected values that JSON can hold, found {error}") from error
    folder = Path(folder)
    with (
        publish_file(folder / "report.json") as json_file,
        publish_file(folder / "report.html") as html_file,
    ):
        for file, text in ((json_file, numbers), (html_file, page)):
            file.write(text.encode())
            file.flush()
    return folder / "report.html"


@functools.cache
def _templates() -> Environment:
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


def _check_finite(value: object, place: str) -> None:
    """Raises ConfigError naming the first number that is not finite."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = ((f".{key}", inner) for key, inner in value.items())
    elif isinstance(value, (list, tuple)):
        items = ((f"[{index}]", inner) for index, inner in enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place}: expected a finite number, found {value}")
    for step, inner in items:
        _check_finite(inner, f"{place}{step}")


def _check_arms(report: Report) -> None:
    """Raises ConfigError unless each arm has a known name of its own, moe and memory included."""
    names = [arm.get("name") for arm in report.get("arms") or []]
    known = {"moe", "memory"} <= set(names) <= set(charts.ARMS)
    if not known or len(set(names)) < len(names):
        raise ConfigError(
            f"report: expected the arms {', '.join(charts.ARMS)} once each, found {names}"
        )
