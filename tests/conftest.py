"""What every test shares: no network, and property tests that try the same cases each time."""

import os

import pytest
from hypothesis import settings

from engraphy import _native

os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile(
    "engraphy", deadline=None, derandomize=True, database=None, print_blob=False
)
settings.load_profile("engraphy")


@pytest.fixture
def threads():
    """Sets the number of threads of large native calls for the length of a test."""
    before = _native.threads()
    yield _native.set_threads
    _native.set_threads(before)
