"""What is chosen from the machine can be given by the environment, and other values are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engraphy.errors import ConfigError
from engraphy.store import RamStore
from engraphy.system import environment

VARIABLES = [environment.HUGE_PAGES, environment.RESIDENCY, environment.DTYPE]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable[0])
def test_a_variable_has_one_of_its_values_and_the_first_if_it_is_not_set(monkeypatch, variable):
    name, values = variable
    monkeypatch.delenv(name, raising=False)
    assert environment.switch(variable) == values[0]
    for value in values:
        monkeypatch.setenv(name, value)
        assert environment.switch(variable) == value
    monkeypatch.setenv(name, "")
    assert environment.switch(variable) == values[0]
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(ConfigError, match=f"{name}: expected one of .* found 'perhaps'"):
        environment.switch(variable)


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
