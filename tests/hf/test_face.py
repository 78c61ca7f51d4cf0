"""What `engraphy.hf` shows of itself."""

from __future__ import annotations

import engraphy.hf


def test_dir_and_star_import_name_everything_public():
    imported: dict = {}
    exec("from engraphy.hf import *", imported)
    assert set(engraphy.hf.__all__) <= set(imported)
    assert set(engraphy.hf.__all__) <= set(dir(engraphy.hf))


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(engraphy.hf, "nonsense")
