"""A grid is well-formed, says each share, and is darker where more is lost."""

from __future__ import annotations

from xml.etree import ElementTree

from engraphy.report.grid import grid

NAME = "{http://www.w3.org/2000/svg}"


def test_shares_are_said_and_larger_ones_are_darker():
    groups = {"a & b": {"pool": [0.0, 0.012], "drive": [0.123, 0.9]}}
    chart = ElementTree.fromstring(grid("Losses", ["0", "1"], groups, "% lost"))
    texts = [text.text for text in chart.iter(f"{NAME}text")]
    assert texts == ["% lost", "0", "1", "a & b", "pool", "0", "1.2", "drive", "12", "90"]
    cells = [cell for cell in chart.iter(f"{NAME}rect")]
    assert [cell.attrib["class"] for cell in cells] == ["free", "cell", "cell", "cell"]
    shades = [float(cell.attrib["fill-opacity"]) for cell in cells[1:]]
    assert shades == sorted(set(shades))
