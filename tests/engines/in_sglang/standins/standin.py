"""Modules and names that can be imported and not used.

SGLang imports compiled kernels (`sgl_kernel`) and torchvision when it starts. Neither has a wheel
for a CPU with the torch that is installed here, and text models on a CPU call none of it. So the
packages beside this file stand in for them: whatever is imported from them, or from a submodule, is
a class that raises when it is called. A run that reaches one fails; a run that passes needed none.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class _Named(type):
    """The type of the names: an attribute is another name, a call raises."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{cls.__name__}: a stand-in, which nothing may call")


class StandIn(ModuleType):
    """A module of such names."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(f"{self.__name__}.{name}", (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule of the packages that stand in."""

    def __init__(self) -> None:
        self.packages: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name.startswith(f"{package}.") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


_finder = _Finder()
sys.meta_path.append(_finder)


def stand_in(package: str) -> None:
    """Makes an imported package one that stands in for the real one."""
    sys.modules[package].__class__ = StandIn
    _finder.packages.append(package)
