"""Imports point one way, in five wings, and what is optional is imported only where it is needed.

Every file under src/engraphy is looked at, imports inside functions too. A new folder has to be
given its place in WINGS, or its test fails.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools.paths import ROOT

PACKAGE = ROOT / "src" / "engraphy"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# A folder imports from itself, from folders before it in its wing, and from earlier wings.
# "engraphy" is the package itself, engraphy/__init__.py.
WINGS = {
    "core": (
        "errors",
        "system",
        "_native",
        "spec",
        "addresses",
        "rows",
        "table",
        "released",
        "store",
    ),
    "model": ("fusion", "memory", "train"),
    "hosts": ("hf", "engines", "vision", "edit"),
    "research": ("data", "eval", "lm", "analysis", "report"),
    "commands": ("engraphy", "plan", "recipes", "cli"),
}
ORDER = [folder for wing in WINGS.values() for folder in wing]
# Folders that know nothing of these: addresses, rows and fusion of each other, nor fusion of any
# store; hosts of other hosts; research of hosts.
APART = {
    "rows": {"addresses"},
    "fusion": {"addresses", "rows", "table", "released", "store"},
    **{host: set(WINGS["hosts"]) - {host} for host in WINGS["hosts"]},
    **{folder: set(WINGS["hosts"]) for folder in WINGS["research"]},
}
EVERYWHERE = {"numpy", "torch", "safetensors", "tokenizers"}
OPTIONAL = {  # package: the folders, or modules, that may import it
    "transformers": {"hf", "recipes", "data", "engines/config"},
    "vllm": {"engines/vllm"},
    "huggingface_hub": {"hf"},
    "peft": {"hf", "recipes"},
    "sglang": {"engines/sglang"},
    "diffusers": {"vision"},
    "lm_eval": {"eval"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "markupsafe": {"report"},  # the markup type of jinja2, which installs it
    "triton": {"fusion"},
    "typer": {"cli"},
    "rich": {"cli", "memory", "recipes"},
    "pyarrow": {"store/remote_arrow"},  # what speaks Flight takes it from there
    "pytest": {"store/testing", "train/testing"},
}


def folder_of(file: Path) -> str:
    """The folder or module under engraphy that a file belongs to."""
    if len(file.parts) > 1:
        return file.parts[0]
    return "engraphy" if file.stem == "__init__" else file.stem


def imported(file: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports.

    Of `from . import name`, the name of the package with it.
    """
    package = ("engraphy", *file.parts[:-1])
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *(node.module or "").split("."))).strip(".")
            if module == "engraphy":
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def own_folders(file: Path) -> set[str]:
    """Folders that a file imports. A name of `engraphy` that is no folder counts as the package."""
    parts = [name.split(".") for name in imported(file)]
    names = {part[1] for part in parts if part[0] == "engraphy" and len(part) > 1}
    known = {*ORDER, *(folder_of(file) for file in FILES)}
    return {name if name in known else "engraphy" for name in names} - {folder_of(file)}


def place(folder: str) -> int:
    if folder not in ORDER:
        pytest.fail(f"{folder} has no place in WINGS of {Path(__file__).name}; give it one")
    return ORDER.index(folder)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    here = folder_of(file)
    for there in own_folders(file):
        assert place(there) < place(here), f"{file} imports {there}, which comes after {here}"
        assert there not in APART.get(here, ()), f"{file} imports {there}; {here} must not know it"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_foreign_packages_are_imported_only_where_they_may_be(file):
    here = folder_of(file)
    names = {name.split(".")[0] for name in imported(file)}
    for name in names - {"engraphy", "__future__"} - sys.stdlib_module_names:
        places = {here, file.parent.as_posix(), file.with_suffix("").as_posix()}
        assert name in EVERYWHERE or places & OPTIONAL.get(name, set()), f"{file} imports {name}"
        assert name != "torch" or here not in WINGS["core"], f"{file} imports torch; core is numpy"


def test_the_top_holds_folders_and_nothing_else():
    files = {file.name for file in FILES if len(file.parts) == 1}
    assert files == {"__init__.py", "errors.py"}
    assert {folder_of(file) for file in FILES} <= set(ORDER)


def test_importing_engraphy_needs_no_torch_and_nothing_optional():
    code = "import sys, engraphy; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"torch", *OPTIONAL}
