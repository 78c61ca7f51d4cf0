"""The names that modules had before they were put into folders. They still work, with a warning.

Importing `engraphy.layer` gives a module that forwards to `engraphy.fusion.layer`, after a
DeprecationWarning that names it. `moved_names` does the same for single names of a package.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

_ROOT = "engraphy."
_MODULES = {  # before: now, both under engraphy
    "address": "addresses.addresser",
    "analysis.charts": "report.charts",
    "analysis.learned": "report.learned",
    "analysis.markup": "report.markup",
    "analysis.report": "report.page",
    "buffers": "memory.buffers",
    "checkpoint": "released.checkpoint",
    "codecs": "rows.codecs",
    "convert": "released.convert",
    "dialects": "spec.dialects",
    "doctor": "cli.machine",
    "environment": "system.environment",
    "fields": "spec.model_config",
    "grads": "memory.grads",
    "group": "store.group",
    "headers": "table.safetensors",
    "hf.check": "released.check",
    "hf.probe": "hf.joins",
    "hf.released": "hf.qwen4",
    "identity": "memory.identity",
    "inspection": "table.inspection",
    "layer": "fusion.layer",
    "lfs": "system.lfs",
    "lm.data": "data",
    "lm.ngrams": "eval.bands",
    "lm.tokens": "data.tokens",
    "lm.wiki": "data.wiki",
    "lookup": "memory.lookup",
    "manifest": "table.manifest",
    "metrics": "memory.metrics",
    "past": "memory.past",
    "prefetch": "memory.prefetch",
    "quantize": "table.quantize",
    "recipes.adapt": "recipes.studies.adapt",
    "recipes.adapt_arms": "recipes.studies.adapt_arms",
    "recipes.adapt_tables": "recipes.studies.adapt",
    "recipes.arms": "recipes.studies.demo_arms",
    "recipes.choices": "eval.choices",
    "recipes.corpus": "data.corpus",
    "recipes.domains": "data.domains",
    "recipes.dtype": "train.dtype",
    "recipes.jobs": "recipes.studies.queue",
    "recipes.machine": "system.cpu",
    "recipes.measure": "eval.losses",
    "recipes.pretrained": "hf.pretrained",
    "recipes.smollm2": "data.smollm2",
    "recipes.studies.adapt_tables": "recipes.studies.adapt",
    "recipes.studies.demo_tables": "recipes.studies.demo_study",
    "recipes.study": "recipes.studies.demo_study",
    "recipes.tables": "recipes.studies.demo_study",
    "rowinit": "rows.init",
    "saved": "memory.saved",
    "shards": "table.shards",
    "state": "memory.state",
    "switch": "memory.switch",
    "table_cli": "cli.table",
    "terminal": "cli.terminal",
    "token_reader": "memory.token_reader",
    "tracing": "memory.tracing",
    "train.rows": "train",
    "usage": "table.usage",
    "vocab": "addresses.vocab",
}

_ELSEWHERE = {  # single names of these modules that went another way
    "lm.data.SUFFIXES": "data.documents",
    "fields.as_int": "system.checks",
    "fields.as_ints": "system.checks",
    "past.Window": "memory.window",
    "train.rows.check_finite": "train.optimizer",
}


def moved_names(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a package from which names have moved.

    Args:
        package: The package's name.
        names: Each old name, and the module under engraphy that has it now.

    Returns:
        The function to assign to the package's `__getattr__`.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        now = _ROOT + names[name]
        _warn(f"{package}.{name}", f"{now}.{name}")
        return getattr(importlib.import_module(now), name)

    return __getattr__


def install() -> None:
    """Lets the import system find the old names, after all others: no other import gets slower."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Forwarding(ModuleType):
    """An old module: every name is looked up in the new one."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(_now(self.__name__))
        if name == "__all__":  # what `from ... import *` gives
            return [public for public in dir(module) if not public.startswith("_")]
        elsewhere = _ELSEWHERE.get(f"{self.__name__.removeprefix(_ROOT)}.{name}")
        if elsewhere is not None:
            module = importlib.import_module(_ROOT + elsewhere)
        return getattr(module, name)

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(_now(self.__name__)))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """`engraphy.convert` and `engraphy.quantize` are functions.

        Importing the old modules of these names puts the modules in their place, so a module can be
        called as its function.
        """
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **keywords)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_ROOT) or fullname[len(_ROOT) :] not in _MODULES:
            return None
        _warn(fullname, _now(fullname))
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Forwarding(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        importlib.import_module(_now(module.__name__))


def _now(before: str) -> str:
    return _ROOT + _MODULES[before[len(_ROOT) :]]


def _warn(before: str, now: str) -> None:
    warnings.warn(f"{before} is now {now}", DeprecationWarning, stacklevel=3)
