"""What every test shares: no network, poison in uninitialised buffers, and property tests that try
the same cases each time."""

import gc
import os

import pytest
from hypothesis import settings

from engraphy import _native
from tests.tools.forks import Forks
from tests.tools.poison import poisoned

os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile(
    "engraphy", deadline=None, derandomize=True, database=None, print_blob=False
)
settings.load_profile("engraphy")


def pytest_collection_finish():
    """Ten thousand tests and the packages they import are millions of objects. They stay, so that
    nobody who looks for garbage (Trainer, a compiler) has to visit them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def poison():
    """Code that reads a buffer of engraphy's before it is filled gets NaN, or ids of no table."""
    with poisoned():
        yield


@pytest.fixture
def threads():
    """Sets the number of threads of large native calls for the length of a test."""
    before = _native.threads()
    yield _native.set_threads
    _native.set_threads(before)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Runs code in processes of their own, which never imported engraphy."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()
