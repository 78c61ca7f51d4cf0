"""A line chart is well-formed, and its lines go through the points that were given."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from engraphy.report.lines import Line, binary_size, share_by_number, share_by_size

NAME = "{http://www.w3.org/2000/svg}"
SIZES = (1, 16, 1024)


def drawn(*lines: Line) -> ElementTree.Element:
    return ElementTree.fromstring(share_by_size("Hits & misses", lines, "cache", "hit rate"))


def points(chart: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = []
    for line in chart.iter(f"{NAME}polyline"):
        pairs = line.attrib["points"].split()
        lines.append([tuple(map(float, pair.split(","))) for pair in pairs])
    return lines


def test_equal_factors_of_size_are_equal_steps_and_higher_shares_lie_higher():
    chart = drawn(Line("rises", SIZES, (0.0, 0.5, 1.0)), Line("stays", SIZES, (0.2, 0.2, 0.2)))
    rising, level = points(chart)
    (left, bottom), (middle, half), (right, top) = rising
    assert (middle - left) / (right - left) == pytest.approx(0.4, abs=0.01)
    assert half == pytest.approx((bottom + top) / 2) and top < bottom
    assert len({height for _, height in level}) == 1
    assert level[0][1] == pytest.approx(bottom + 0.2 * (top - bottom), abs=0.1)


def test_labels_are_escaped_and_stand_apart():
    chart = drawn(Line("a < b", SIZES, (0, 0, 0.5)), Line("c", SIZES, (0, 0, 0.5)))
    ends = [text for text in chart.iter(f"{NAME}text") if text.attrib["class"] in ("c0", "c1")]
    assert [text.text for text in ends] == ["a < b", "c"]
    first, second = (float(text.attrib["y"]) for text in ends)
    assert abs(first - second) >= 17
    assert chart.find(f"{NAME}title").text == "Hits & misses"


def test_the_axis_names_sizes_in_the_unit_that_suits_them():
    texts = {text.text for text in drawn(Line("a", SIZES, (0, 0, 0))).iter(f"{NAME}text")}
    assert {"1 MiB", "16 MiB", "256 MiB", "0 %", "100 %"} <= texts
    assert binary_size(2048) == "2 GiB"


def test_numbers_are_drawn_up_to_the_largest_share():
    lines = [Line("one", (8, 64, 1024), (0.0, 0.01, 0.2)), Line("two", (8, 1024), (0.0, 0.1))]
    chart = ElementTree.fromstring(share_by_number("Losses", lines, "servers", "% lost"))
    one, two = points(chart)
    assert one[0][1] == two[0][1] and one[2][1] < two[1][1] < one[1][1] and one[2][1] == 28.0
    labels = [text.text for text in chart.iter(f"{NAME}text")]
    assert "20 %" in labels and "1024" in labels and "100 %" not in labels
