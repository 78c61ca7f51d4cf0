"""Python source of the standard library: code that every installation has.

The text depends on the version of the interpreter and on who packed it, so what is made from it
carries the version and a digest.
"""

from __future__ import annotations

import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataUnavailable

LICENCE = "PSF-2.0 (standard library of Python)"
_FOREIGN = {"site-packages", "dist-packages"}
# Tests repeat the same lines, and some are broken on purpose. The others are generated: tables of
# code points, and a manual as strings.
_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
_GENERATED = "_sysconfigdata"  # how this machine's interpreter was built


def version() -> str:
    """The interpreter's version, such as "CPython 3.11.7"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def stdlib_files() -> list[Path]:
    """The modules of the running interpreter's library, in the order of their paths.

    Tests, generated tables and packages that were installed are left out.

    Raises:
        DataUnavailable: The interpreter came without its source.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    kept = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        built = parts[0].startswith("config-") or parts[-1].startswith(_GENERATED)
        if not built and not (_FOREIGN | _LEFT_OUT).intersection(parts[:-1]):
            kept.append(path)
    if not kept:
        raise DataUnavailable(
            f"{folder}: expected the source of the standard library of {version()}, found none"
        )
    return kept


def stdlib_texts() -> Iterator[str]:
    """The text of each module, one at a time, with line feeds as line ends.

    Raises:
        DataUnavailable: As `stdlib_files` raises it.
    """
    for path in stdlib_files():
        with tokenize.open(path) as file:  # knows in which encoding a module is written
            yield file.read().strip("\n")
