"""Imports point one way, and what is optional is imported only where it is needed.

Every file under src/engraphy is looked at, imports inside functions too. A new top-level module has to be given its
place in LAYERS, or its test fails.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "engraphy"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# A module imports from its own row and from those above it; the parts of a row named in APART do not import each other.
# "engraphy" is the package itself, engraphy/__init__.py.
LAYERS = (
    ("errors", "environment", "lfs", "system"),
    ("spec", "dialects", "fields", "_native"),
    ("vocab", "address", "rows", "codecs", "rowinit", "table", "manifest", "shards", "headers",
     "checkpoint", "convert", "quantize", "inspection", "usage"),
    ("store",),
    ("buffers", "prefetch", "metrics", "layer", "past", "state"),
    ("memory", "saved", "token_reader", "lookup", "grads", "group", "identity", "switch", "tracing"),
    ("train",),
    ("lm", "hf", "analysis", "vision"),
    ("engraphy",),
    ("recipes", "doctor"),
    ("cli", "table_cli", "terminal"),
)
APART = {"lm", "hf", "analysis", "vision"}
WITHOUT_TORCH = {name for layer in LAYERS[:4] for name in layer}
EVERYWHERE = {"numpy", "torch", "safetensors", "tokenizers", "typer", "rich"}
OPTIONAL = {
    "transformers": {"hf", "recipes"},
    "huggingface_hub": {"hf"},
    "peft": {"recipes"},
    "diffusers": {"vision"},
    "lm_eval": {"hf", "recipes"},
    "matplotlib": {"analysis", "recipes"},
    "triton": {"layer"},
}


def unit(file: Path) -> str:
    """The top-level module a file belongs to."""
    if len(file.parts) > 1:
        return file.parts[0]
    return "engraphy" if file.stem == "__init__" else file.stem


def imported(file: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports; of `from . import name`, the package's name with it."""
    package = ("engraphy", *file.parts[:-1])
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *(node.module or "").split("."))).strip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "engraphy" else (module,)


def own_units(file: Path) -> set[str]:
    """A name that `engraphy` has and that is no module counts as the package itself."""
    parts = (name.split(".") for name in imported(file))
    modules = {part[1] for part in parts if part[0] == "engraphy" and len(part) > 1}
    known = {name for layer in LAYERS for name in layer} | {unit(file) for file in FILES}
    return {name if name in known else "engraphy" for name in modules} - {unit(file)}


def depth(name: str) -> int:
    for index, layer in enumerate(LAYERS):
        if name in layer:
            return index
    pytest.fail(f"{name} has no place in LAYERS of {Path(__file__).name}; give it one")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    here = unit(file)
    for there in own_units(file):
        assert depth(there) <= depth(here), f"{file} imports {there}, which lies above it"
        assert not {here, there} <= APART, f"{file} imports {there}; {sorted(APART)} do not import each other"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_foreign_packages_are_imported_only_where_they_may_be(file):
    here = unit(file)
    depth(here)
    for name in {name.split(".")[0] for name in imported(file)} - {"engraphy", "__future__"} - sys.stdlib_module_names:
        assert name in EVERYWHERE or here in OPTIONAL.get(name, ()), f"{file} imports {name}"
        assert name != "torch" or here not in WITHOUT_TORCH, f"{file} imports torch; up to store there is numpy only"


def test_importing_engraphy_needs_no_torch_and_nothing_optional():
    code = "import sys, engraphy; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"torch", *OPTIONAL}
