"""What `engraphy` shows of itself: all that is public, each under one name, nothing private."""

from __future__ import annotations

import subprocess
import sys

import pytest

import engraphy


def test_dir_names_everything_public_and_nothing_else():
    assert dir(engraphy) == sorted([*engraphy.__all__, "__version__"])


@pytest.mark.parametrize("name", engraphy.__all__)
def test_each_public_name_is_there_and_says_what_it_is(name):
    thing = getattr(engraphy, name)
    assert callable(thing) and thing.__name__ == name
    assert thing.__doc__ and thing.__module__.startswith("engraphy.")


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Engram'"):
        engraphy.Engram  # noqa: B018


@pytest.mark.parametrize("name", ["convert", "quantize"])
def test_a_function_stays_callable_after_its_old_module_was_imported(name):
    """The modules engraphy.convert and engraphy.quantize had the names that functions have now."""
    code = (
        f"import warnings; warnings.simplefilter('ignore')\n"
        f"import engraphy, engraphy.{name}\n"
        f"from engraphy.{name} import {name}\n"
        f"try:\n    engraphy.{name}('nowhere', 'out', *{['int8'] if name == 'quantize' else []})\n"
        f"except engraphy.EngraphyError as error:\n    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("ConfigError", "TableError"), done.stdout
