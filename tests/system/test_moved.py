"""The names from before the folders work, and say where their things are now."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest

import engraphy
from engraphy.system.moved import _MODULES


@pytest.fixture
def unimported():
    """Forgets an old module, as if nobody had imported it yet."""
    kept = dict(sys.modules)

    def forget(name: str) -> str:
        sys.modules.pop(name, None)
        return name

    yield forget
    for name in set(sys.modules) - set(kept):
        if name.removeprefix("engraphy.") in _MODULES:
            parent, _, child = name.rpartition(".")
            vars(sys.modules[parent]).pop(child, None)
            del sys.modules[name]


@pytest.mark.parametrize("before", sorted(_MODULES))
def test_an_old_module_forwards_to_the_new_one_and_names_it(before, unimported):
    now = importlib.import_module(f"engraphy.{_MODULES[before]}")
    with pytest.warns(DeprecationWarning, match=f"engraphy.{before} is now {now.__name__}"):
        found = importlib.import_module(unimported(f"engraphy.{before}"))
    public = [name for name in vars(now) if not name.startswith("__")]
    assert public and all(getattr(found, name) is getattr(now, name) for name in public)
    with pytest.raises(AttributeError):
        found.no_such_name  # noqa: B018


def test_old_imports_of_names_give_the_same_objects(unimported):
    for name in ("layer", "address", "state", "hf.released", "lm.data", "recipes.study"):
        unimported(f"engraphy.{name}")
    with pytest.warns(DeprecationWarning):
        from engraphy.address import Addresser  # type: ignore[import-not-found]
        from engraphy.hf.released import serve_table  # type: ignore[import-not-found]
        from engraphy.layer import EngramLayer  # type: ignore[import-not-found]
        from engraphy.lm import load_documents, pack
        from engraphy.lm.data import Batches  # type: ignore[import-not-found]
        from engraphy.rows import check_ids, take
        from engraphy.state import SequenceState  # type: ignore[import-not-found]
    assert (Addresser, EngramLayer) == (engraphy.Addresser, engraphy.EngramLayer)
    assert SequenceState is engraphy.SequenceState
    homes = {
        "engraphy.hf.qwen4": serve_table,
        "engraphy.data.documents": load_documents,
        "engraphy.data.packing": pack,
        "engraphy.rows.read": take,
    }
    assert all(found.__module__ == home for home, found in homes.items())
    assert (Batches.__module__, check_ids.__module__) == (
        "engraphy.data.packing",
        "engraphy.rows.read",
    )


def test_names_that_went_another_way_than_their_module_are_found(unimported):
    with pytest.warns(DeprecationWarning):
        from engraphy.fields import as_int  # type: ignore[import-not-found]
        from engraphy.rows import Readable, addresses
        from engraphy.store import FileOptions, open_layer, parse_size
        from engraphy.table import Verified
        from engraphy.train.rows import RowAdam, check_finite  # type: ignore[import-not-found]
    homes = {
        "engraphy.system.checks": (as_int,),
        "engraphy.rows.read": (Readable, addresses),
        "engraphy.store.options": (FileOptions, parse_size),
        "engraphy.store.file": (open_layer,),
        "engraphy.table.sealing": (Verified,),
        "engraphy.train.adam": (RowAdam,),
        "engraphy.train.optimizer": (check_finite,),
    }
    for home, found in homes.items():
        assert {thing.__module__ for thing in found} == {home}


def test_a_star_import_of_an_old_module_gives_its_public_names(unimported):
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning):
        unimported("engraphy.layer")
        exec("from engraphy.layer import *", names)
    assert names["EngramLayer"] is engraphy.EngramLayer and "_GATE_FLOOR" not in names


def test_the_packages_that_kept_their_names_warn_of_nothing():
    code = (
        "import engraphy, engraphy.spec, engraphy.rows, engraphy.table, engraphy.memory, "
        "engraphy.store, engraphy.train, engraphy.lm\n"
        "from engraphy.memory import EngramMemory, Lookup, RowGrad, Trace\n"
        "from engraphy.rows import RowFormat, read\n"
        "from engraphy.spec import EngramConfig, HashSpec, LayerSpec\n"
        "from engraphy.table import Table\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(code, {})


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="engraphy.no_such_module"):
        importlib.import_module("engraphy.no_such_module")
    with pytest.raises(AttributeError, match="no_such_name"):
        engraphy.lm.no_such_name  # noqa: B018
