"""A chart of estimates is well-formed, and dots and whiskers stand where the numbers say."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from engraphy.report.estimates import Estimate, estimates

NAME = "{http://www.w3.org/2000/svg}"
GROUPS = {
    "one & two": [Estimate("a < b", 1.0, 0.5), Estimate("c", -2.0, 0.0)],
    "three": [Estimate("d", 3.0, 1.0)],
}


def drawn() -> ElementTree.Element:
    return ElementTree.fromstring(estimates("Losses & gains", GROUPS, "% lost"))


def test_dots_lie_on_one_scale_and_whiskers_are_one_error_long():
    chart = drawn()
    dots = [float(dot.attrib["cx"]) for dot in chart.iter(f"{NAME}circle")]
    unit = (dots[2] - dots[1]) / 5
    assert dots[0] - dots[1] == pytest.approx(3 * unit, abs=0.2)
    whiskers = [line for line in chart.iter(f"{NAME}line") if "line" in line.attrib["class"]]
    spans = [(float(line.attrib["x1"]), float(line.attrib["x2"])) for line in whiskers]
    for dot, (low, high), error in zip(dots, spans, (0.5, 0.0, 1.0), strict=True):
        assert (dot - low, high - dot) == pytest.approx((error * unit,) * 2, abs=0.2)


def test_groups_have_headings_and_rows_follow_each_other():
    chart = drawn()
    labels = [text.text for text in chart.iter(f"{NAME}text")]
    assert [label for label in labels if label in ("one & two", "a < b", "c", "three", "d")] == [
        "one & two",
        "a < b",
        "c",
        "three",
        "d",
    ]
    heights = [float(dot.attrib["cy"]) for dot in chart.iter(f"{NAME}circle")]
    assert heights == sorted(heights)
    assert float(chart.attrib["viewBox"].split()[3]) > heights[-1]


def test_the_axis_holds_zero():
    groups = {"one": [Estimate("a", 5.0, 0.1)]}
    chart = ElementTree.fromstring(estimates("t", groups, "u"))
    assert "0" in [text.text for text in chart.iter(f"{NAME}text")]
