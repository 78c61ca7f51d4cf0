"""`_core.pyi`, which type checkers read, describes the compiled module: same names, same
arguments."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engraphy import _native

pytestmark = pytest.mark.skipif(_native.core is None, reason=_native.reason)
STUB = Path(_native.__file__).with_name("_core.pyi")
SPECIAL = {"__deepcopy__", "__new__"}  # of the compiled classes alone

Signature = list[tuple[str, bool]]  # argument, and whether it has a default


def in_stub(function: ast.FunctionDef) -> Signature:
    arguments = [*function.args.posonlyargs, *function.args.args]
    required = len(arguments) - len(function.args.defaults)
    assert not (function.args.vararg or function.args.kwonlyargs)
    return [(argument.arg, i >= required) for i, argument in enumerate(arguments)]


def in_module(function: Any) -> Signature:
    """Read from the signature that nanobind writes, whose defaults may be `\\0`."""
    (signature, _, _), *overloads = function.__nb_signature__
    assert not overloads, f"{signature}: expected one signature"
    text = re.sub(r"= *\\\d+", "= None", signature)
    (definition,) = ast.parse(f"{text}: ...").body
    assert isinstance(definition, ast.FunctionDef)
    return in_stub(definition)


def members(owner: ModuleType | type) -> dict[str, Any]:
    own = {name: value for name, value in vars(owner).items() if name not in SPECIAL}
    return {name: value for name, value in own.items() if hasattr(value, "__nb_signature__")}


def test_the_stub_has_the_functions_and_classes_of_the_module():
    body = ast.parse(STUB.read_text()).body
    described = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    compiled = _native.core
    classes = {name for name, value in vars(compiled).items() if inspect.isclass(value)}
    assert described == {*members(compiled), *classes}


def test_the_stub_has_the_arguments_of_each_function():
    functions = [node for node in ast.parse(STUB.read_text()).body if hasattr(node, "args")]
    described = {node.name: in_stub(node) for node in functions}
    assert described == {name: in_module(f) for name, f in members(_native.core).items()}


@pytest.mark.parametrize("name", ["FusePlan", "HashPlan", "RowReader", "TokenReader"])
def test_the_stub_has_the_methods_of_each_class(name):
    body = ast.parse(STUB.read_text()).body
    (described,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    stub = {node.name: in_stub(node) for node in described.body if hasattr(node, "args")}
    compiled = {key: in_module(f) for key, f in members(getattr(_native.core, name)).items()}
    assert stub == compiled
