"""One error family, each class of which says what happened and what to do about it."""

from __future__ import annotations

import inspect

import pytest

from engraphy import errors

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value)]


def test_every_error_belongs_to_the_family():
    assert len(CLASSES) > 1
    assert all(issubclass(error, errors.EngraphyError) for error in CLASSES)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_an_error_says_what_happened_and_what_to_do(error):
    first, *rest = inspect.cleandoc(error.__doc__).split("\n\n")
    assert first.endswith(".") and "\n" not in first
    assert sum(paragraph.startswith("What to do: ") for paragraph in rest) == 1
