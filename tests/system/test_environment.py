"""What is chosen from the machine can be given by the environment, other values are refused, and
every variable is in the list that the reference page is made from."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from engraphy.errors import ConfigError
from engraphy.store import RamStore
from engraphy.system.environment import VARIABLES, switch
from tests.tools.paths import ROOT

SWITCHES = [variable for variable in VARIABLES if isinstance(variable.values, tuple)]
BUILD_TIME = {  # macros of the C++ core; ENGRAPHY_REQUIRE_NATIVE is in the list
    "ENGRAPHY_LEVEL",  # the instruction set of a kernel file, and its namespace
    "ENGRAPHY_LANES",  # 64-bit lanes of its vectors
    "ENGRAPHY_KERNELS",  # declares the kernels of one level
}
SOURCES = ("*.py", "*.pyi", "*.cpp", "*.hpp")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.parametrize("variable", SWITCHES, ids=lambda variable: variable.name)
def test_a_variable_has_one_of_its_values_and_the_first_if_it_is_not_set(monkeypatch, variable):
    name = variable.name
    monkeypatch.delenv(name, raising=False)
    assert switch(variable) == variable.default
    for value in variable.values:
        monkeypatch.setenv(name, value)
        assert switch(variable) == value
    monkeypatch.setenv(name, "")
    assert switch(variable) == variable.default
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(ConfigError, match=f"{name}: expected one of .* found 'perhaps'"):
        switch(variable)


def test_every_variable_that_the_sources_name_is_in_the_list():
    files = [file for kind in SOURCES for file in (ROOT / "src").rglob(kind)]
    files += [ROOT / name for name in ("pyproject.toml", "CMakeLists.txt", "Makefile")]
    names = {name for file in files for name in re.findall(r"ENGRAPHY_[A-Z_]+", file.read_text())}
    assert names == {variable.name for variable in VARIABLES} | BUILD_TIME


def test_only_the_list_reads_variables_of_engraphy():
    environment = ROOT / "src" / "engraphy" / "system" / "environment.py"
    for file in set((ROOT / "src").rglob("*.py")) - {environment}:
        read = re.findall(r"environ\b[^\n]*ENGRAPHY_|getenv\([^\n]*ENGRAPHY_", file.read_text())
        assert not read, f"{file}: {read}: give the variable a record in {environment.name}"


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_a_variable_says_in_one_sentence_what_it_does(variable):
    assert variable.name.startswith("ENGRAPHY_")
    assert variable.meaning[0].isupper() and variable.meaning.endswith(".")
    assert ". " not in variable.meaning
    assert variable.default and variable.values
    if isinstance(variable.values, tuple):
        assert variable.default in variable.values


def flags_at(address: int) -> list[str]:
    """What the kernel says of the mapping that holds an address of this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition("-")
        if not line[:1].isupper() and rest:
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the kernel has no transparent huge pages")
@pytest.mark.parametrize(("value", "flag"), [("on", "hg"), ("off", "nh")])
def test_rows_in_ram_lie_on_huge_pages_unless_that_is_switched_off(monkeypatch, value, flag):
    monkeypatch.setenv("ENGRAPHY_HUGE_PAGES", value)
    store = RamStore(100_000, 64)
    with store.reading() as shards:
        address = shards[0].__array_interface__["data"][0]
        assert set(flags_at(address)) & {"hg", "nh"} == {flag}
    store.scatter(np.arange(3), np.full((3, 64), 7, np.uint8))
    assert (store.gather(np.array([1, 50])) == [[7], [0]]).all()
