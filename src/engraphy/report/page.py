"""The page of a demo run: one HTML file with nothing outside it, and the numbers as JSON beside it.

`render` turns the dict of a run (format "engraphy-report-1") into the page, `write` puts both files
into a folder. sections.py and learned.py make the values of the page, templates/ makes its markup.
A section is left out if its part of the dict is missing, except the headline and the comparison.
The page holds no script, and its content security policy forbids loading anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.files import publish_file
from . import charts, learned, sections
from .rendering import asset, check_finite, templates

FORMAT = "engraphy-report-1"

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
    check_finite(report, "report")
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
    return templates().get_template("page.html.jinja").render(style=asset("report.css"), **values)


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


def _check_arms(report: Report) -> None:
    """Raises ConfigError unless each arm has a known name of its own, moe and memory included."""
    names = [arm.get("name") for arm in report.get("arms") or []]
    known = {"moe", "memory"} <= set(names) <= set(charts.ARMS)
    if not known or len(set(names)) < len(names):
        raise ConfigError(
            f"report: expected the arms {', '.join(charts.ARMS)} once each, found {names}"
        )
