"""The report page: self-contained, escaped, and truthful about what came out."""

from __future__ import annotations

import json
import math
import os
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from engraphy.errors import ConfigError
from engraphy.report import charts
from engraphy.report import page as report
from engraphy.report.markup import digits_for, esc, signed, size
from engraphy.report.page import FORMAT, render, write
from engraphy.report.scales import smooth
from engraphy.report.tokens import visible

START = ("context start", None, None, 0.014)
BUCKETS = [
    ("unseen", 0, 0, 0.328),
    ("rare", 1, 3, 0.221),
    ("frequent", 4, 30, 0.241),
    ("very frequent", 31, None, 0.196),
    START,
]
DENSE = {
    "unseen": 6.131,
    "rare": 4.072,
    "frequent": 2.694,
    "very frequent": 1.452,
    "context start": 7.215,
}
MOE_GAIN = {
    "unseen": -0.031,
    "rare": -0.044,
    "frequent": -0.071,
    "very frequent": -0.062,
    "context start": -0.012,
}
MEMORY_GAIN = {
    "unseen": 0.030,
    "rare": -0.052,
    "frequent": -0.371,
    "very frequent": -0.288,
    "context start": 0.004,
}
GATES = (0.214, 0.327, 0.561, 0.618)
SENTENCES = [
    [
        "Alex",
        "ander",
        " the",
        " Great",
        " was",
        " king",
        " of",
        " Mac",
        "ed",
        "on",
        " and",
        " a",
        " p",
        "up",
        "il",
        " of",
        " Ar",
        "ist",
        "ot",
        "le",
        ".",
    ],
    [
        "The",
        " United",
        " States",
        " of",
        " America",
        " is",
        " a",
        " country",
        " in",
        " North",
        " America",
        ";",
        " its",
        " cap",
        "ital",
        " is",
        " W",
        "ash",
        "ing",
        "ton",
        ",",
        " D",
        ".",
        "C",
        ".",
    ],
    [
        "Mar",
        "\ufffd",
        "\ufffd",
        "a",
        " Sk",
        "ł",
        "od",
        "ow",
        "ska",
        "\n",
        "\n",
        "P",
        "ier",
        "re",
        "  ",
        "&",
        " <",
        "sc",
        "ient",
        "ist",
        ">",
        "\t",
        "\u200b",
        ' "',
        "1903",
        '"',
        ".",
    ],
]
TEXTS = {
    "dense": " in the city of the county of the state of the United States. "
    "The station is a town of the district",
    "moe": " on the coast of the island, and the city is the capital of the province. "
    "It is located in the north of",
    "memory": " in the north-east of the United States, and is part of the National Register of "
    "Historic Places.\nIt was built in 1893",
}
SECTIONS = [
    "Comparison",
    "Loss over training",
    "By n-gram frequency",
    "Where the gate opens",
    "Continuations",
    "How this was run",
]


def sample() -> dict[str, Any]:
    """A report with the sizes and effects of a demo run; the same one every time."""
    luck = random.Random(0)
    noise = [luck.gauss(0, 0.07) for _ in range(729)]
    losses = [DENSE, {name: DENSE[name] + MOE_GAIN[name] for name in DENSE}]
    losses.append({name: losses[1][name] + MEMORY_GAIN[name] for name in DENSE})
    totals = [sum(share * loss[name] for name, _, _, share in BUCKETS) for loss in losses]
    arms = [sample_arm(place, totals[place], losses[place], noise, luck) for place in range(3)]
    return {
        "format": FORMAT,
        "created": "2026-11-22T01:30:00Z",
        "command": "engraphy demo --seed 0",
        "seed": 0,
        "versions": {"engraphy": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
        "machine": {"cpu": "AMD EPYC 7B13", "cores": 2, "isa": "avx2", "native": True},
        "settings": {
            "tokens": 1_495_000,
            "batch": 16,
            "length": 128,
            "vocabulary": 2048,
            "learning_rate": 0.006,
            "row_rate_scale": 5,
            "steps": 729,
        },
        "data": {
            "name": "English Wikipedia summaries",
            "licence": "CC BY-SA 4.0",
            "train_documents": 9532,
            "heldout_documents": 501,
            "train_tokens": 1_495_000,
            "heldout_tokens": 79_000,
        },
        "arms": arms,
        "frequency": [
            {
                "bucket": name,
                "low": low,
                "high": high,
                "tokens": round(79_000 * share),
                "share": share,
            }
            for name, low, high, share in BUCKETS
        ],
        "differences": {
            "moe - dense": {"all": totals[1] - totals[0], "all_stderr": 0.0041, **MOE_GAIN},
            "memory - moe": {"all": totals[2] - totals[1], "all_stderr": 0.0058, **MEMORY_GAIN},
        },
        "gates": {
            "layer": 1,
            "sentences": [
                {
                    "text": "".join(tokens),
                    "tokens": tokens,
                    "gates": [0.04 + 0.93 * luck.betavariate(1.6, 1.9) for _ in tokens],
                }
                for tokens in SENTENCES
            ],
            "by_frequency": [
                {"bucket": name, "mean": mean, "tokens": round(79_000 * share)}
                for (name, _, _, share), mean in zip(BUCKETS[:4], GATES, strict=True)
            ],
        },
        "table": {
            "table_id": "5f0c8a52-9d7e-4d0b-8a3e-3a2f6d1b7c90",
            "address_digest": "9b1f4c7e20d35a68",
            "rows": 24_900,
            "bytes": 1_593_600,
            "format": "f32",
        },
        "logits_equal": True,
    }


def sample_arm(
    place: int, total: float, losses: dict[str, float], noise: list[float], luck: random.Random
) -> dict:
    name, label = [("dense", "Dense"), ("moe", "MoE"), ("memory", "MoE + memory")][place]
    parameters = [(884_992, 884_992, 0), (2_573_184, 836_480, 0), (2_578_496, 836_736, 398_400)][
        place
    ]

    def at(step: int) -> float:
        return total + 3.72 * math.exp(-step / 22) + 0.95 * math.exp(-step / 190) - 0.02

    return {
        "name": name,
        "label": label,
        "parameters": dict(
            zip(("total", "activated", "table"), parameters, strict=True), embedding=262_144
        ),
        "table": {"rows": 24_900, "bytes": 1_593_600} if name == "memory" else None,
        "tokens_per_second": (14_310.4, 11_480.2, 10_921.7)[place],
        "seconds": (104.4, 130.2, 136.9)[place],
        "curve": [
            [2048 * (step + 1), round(at(step) + noise[step] + luck.gauss(0, 0.012), 4)]
            for step in range(729)
        ],
        "heldout_curve": [[2048 * step, round(at(step) + 0.02, 4)] for step in range(91, 730, 91)],
        "validation_loss": total,
        "validation_stderr": 0.0212 + 0.0003 * place,
        "loss_by_frequency": losses,
        "max_expert_load": None if name == "dense" else 1.31 + 0.04 * place,
        "continuations": [
            {"prompt": prompt, "text": TEXTS[name]}
            for prompt in ("The town is located", "It was built in 1953 and is")
        ],
    }


class Page(HTMLParser):
    """What a browser would see: tags with their attribute names, text, headings, table rows; no
    loose ends."""

    VOID = {"meta", "br"}

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.chips: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "h2":
            self.titles.append("")
        if ("class", "chip") in attrs or ("class", "chip space") in attrs:
            self.chips.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "th" in self.open or "td" in self.open:
            self.rows[-1][-1] += data
        if "h2" in self.open:
            self.titles[-1] += data
        if "bdi" in self.open:
            self.chips[-1] += data

    def row(self, label: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == label)


def charts_of(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def plain(text: str) -> float:
    """The number at the start of a cell."""
    return float(text.split("±")[0].replace(",", "").replace("\u2212", "-"))


def with_gap(gap: float, stderr: float) -> dict[str, Any]:
    made = sample()
    made["arms"][2]["validation_loss"] = made["arms"][1]["validation_loss"] + gap
    made["differences"]["memory - moe"].update(all=gap, all_stderr=stderr)
    return made


def test_the_page_loads_nothing_and_runs_nothing():
    text = render(sample())
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
        "use",
    }
    assert not {
        name
        for name, _ in page.attributes
        if name.startswith("on") or name in ("src", "href", "srcset")
    }
    assert not re.search(r"https?:|//\w|url\(|@import|@font-face", text)
    assert "default-src 'none'" in text


def test_the_same_dict_gives_the_same_page():
    assert render(sample()) == render(sample())


def test_hostile_text_changes_no_tag_and_no_attribute():
    hostile = """</title></style></svg><script>x()</script><b onclick="x()" title='x'>&lt;&amp;"""
    hostile += "{style}{0}{{ 7 * 7 }}{% endif %}%s\x00"
    kept = {
        "format",
        "name",
        "bucket",
    }  # names that the format fixes; the frequency buckets follow below

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {
                (name + hostile if key in ("settings", "versions", "machine") else name): spoil(
                    inner, name
                )
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [spoil(inner, key) for inner in value]
        return value + hostile if isinstance(value, str) and key not in kept else value

    spoilt = json.loads(json.dumps(spoil(sample())).replace("unseen", "<i>unseen</i> & '"))
    spoilt["gates"]["sentences"] = [
        dict(one, tokens=["a" + hostile[:-1] for _ in one["tokens"]])
        for one in spoilt["gates"]["sentences"]
    ]
    clean = sample()
    clean["gates"]["sentences"] = [
        dict(one, tokens=["a" for _ in one["tokens"]]) for one in clean["gates"]["sentences"]
    ]
    page = Page(render(spoilt))
    assert page.tags == Page(render(clean)).tags
    assert page.text.count("<script>x()</script>") > 50
    assert "<i>unseen</i> & '" in page.text and "{{ 7 * 7 }}{% endif %}" in page.text
    assert "\x00" not in page.text
    assert all(ET.tostring(svg) for svg in charts_of(render(spoilt)))


def test_numbers_of_the_table_are_those_of_the_dict():
    made = sample()
    page, arms = Page(render(made)), made["arms"]
    for label, key in (
        ("Parameters in total", "total"),
        ("… activated per token", "activated"),
        ("… in the table", "table"),
        ("… in the token embedding", "embedding"),
    ):
        assert [plain(cell) for cell in page.row(label)] == [arm["parameters"][key] for arm in arms]
    for label, key, close in (
        ("Validation loss, nats per token", "validation_loss", 5e-4),
        ("Tokens/s, whole steps, while the arms share the machine", "tokens_per_second", 0.5),
        ("Training time, s", "seconds", 0.5),
    ):
        assert [plain(cell) for cell in page.row(label)] == pytest.approx(
            [arm[key] for arm in arms], abs=close
        )
    assert [cell.split("± ")[1] for cell in page.row("Validation loss, nats per token")] == [
        "0.021",
        "0.022",
        "0.022",
    ]
    assert page.row("Minus the arm to its left") == [
        "–",
        "\u22120.049 ± 0.004",
        "\u22120.147 ± 0.006",
    ]
    assert page.row("Table rows") == ["–", "–", "24,900"]
    assert page.row("Table size") == ["–", "–", "1.59\u00a0MB"]
    assert page.row("Highest expert load, × mean") == ["–", "1.35", "1.39"]
    assert page.row("rare, 1–3 times") == ["17,459", "4.072", "4.028", "3.976", "\u22120.011"]
    assert [page.row("745,472")[place] for place in range(3)] == [
        f"{dict(map(tuple, arm['heldout_curve']))[745_472]:.3f}" for arm in arms
    ]
    for word in (
        "1,593,600 bytes",
        "CC BY-SA 4.0",
        "0.006",
        "9b1f4c7e20d35a68",
        "2.13.0",
        "engraphy demo --seed 0",
    ):
        assert word in page.text


def test_bars_show_the_differences_in_sign_size_and_words():
    made = sample()
    text = render(made)
    wide = next(svg for svg in charts_of(text) if "n-gram frequency" in svg.attrib["aria-label"])
    told = [
        plain("".join(text.itertext()))
        for text in wide.iter("text")
        if "value" in text.attrib["class"]
    ]
    gaps = [
        made["differences"][pair][name]
        for name in ("all", *DENSE)
        for pair in ("moe - dense", "memory - moe")
    ]
    assert told == pytest.approx(gaps, abs=5e-4)
    rects = list(wide.iter("rect"))
    zero = float(
        next(line.attrib["x1"] for line in wide.iter("line") if line.attrib["class"] == "zero")
    )
    longest = max(float(rect.attrib["width"]) for rect in rects) / max(map(abs, gaps))
    for rect, gap in zip(rects, gaps, strict=True):
        left, length = float(rect.attrib["x"]), float(rect.attrib["width"])
        assert length == pytest.approx(abs(gap) * longest, abs=0.2)
        assert (left if gap > 0 else left + length) == pytest.approx(zero, abs=0.2)
    assert (
        "the memory lowers the loss on rare (22\u00a0%), frequent (24\u00a0%) and very frequent "
        "(20\u00a0%), raises the loss on unseen (33\u00a0%) and hardly changes the loss on "
        "context start (1\u00a0%)" in text
    )


def test_standard_errors_of_buckets_decide_what_is_said_of_them():
    made = sample()
    made["differences"]["memory - moe"].update(unseen_stderr=0.02, rare_stderr=0.01)
    assert "hardly changes the loss on unseen (33" in render(made)


def test_buckets_without_tokens_are_left_out():
    made = sample()
    made["frequency"][1]["tokens"] = 0
    del made["differences"]["memory - moe"]["rare"]
    assert not any(row[0].startswith("rare") for row in Page(render(made)).rows)


def test_every_gate_is_shown_in_reading_order():
    made = sample()
    made["gates"]["sentences"][0]["gates"][0] = 0.876
    text = render(made)
    gates = [gate for one in made["gates"]["sentences"] for gate in one["gates"]]
    assert [float(value) for value in re.findall(r"<small>(.*?)</small>", text)] == pytest.approx(
        gates, abs=0.0051
    )
    shares = [int(value) for value in re.findall(r"--g:(\d+)%", text)]
    assert [
        gates[i] for i in sorted(range(len(gates)), key=lambda i: (shares[i], gates[i]))
    ] == sorted(gates)
    assert all(0 <= share <= 100 for share in shares)
    assert Page(text).chips[:4] == ["Alex", "ander", "the", "Great"]


@pytest.mark.parametrize(
    ("gap", "stderr", "verdict", "number", "kind"),
    [
        (-0.1474, 0.0058, "The memory lowers validation loss", "\u22120.147", "lower"),
        (0.0213, 0.0058, "The memory raises validation loss", "+0.021", "higher"),
        (
            -0.0040,
            0.0058,
            "The memory makes no clear difference to validation loss",
            "\u22120.004",
            "tie",
        ),
        (
            0.0110,
            0.0058,
            "The memory makes no clear difference to validation loss",
            "+0.011",
            "tie",
        ),
        (0.0, 0.0, "The memory makes no clear difference to validation loss", "0.000", "tie"),
        (-0.0004, 0.00007, "The memory lowers validation loss", "\u22120.00040", "lower"),
    ],
)
def test_the_headline_says_what_came_out(
    gap: float, stderr: float, verdict: str, number: str, kind: str
):
    text = render(with_gap(gap, stderr))
    assert f"<h1>{verdict}</h1>" in text
    assert f'<p class="result {kind}"><span class="gap">{number}</span>' in text
    assert ("within two standard errors" in text) == (kind == "tie")


def test_without_a_standard_error_nothing_is_concluded():
    made = sample()
    for gap in made["differences"].values():
        del gap["all_stderr"]
    text = render(made)
    assert "<h1>No standard error: whether the memory makes a difference is open</h1>" in text
    assert '<p class="result tie"><span class="gap">\u22120.147</span>' in text
    assert "Fewer than two held-out documents" in text and "within two standard errors" not in text
    assert Page(text).row("Minus the arm to its left") == ["–", "\u22120.049", "\u22120.147"]
    assert "± one standard error of the paired" not in text and "error covers" not in text


def test_contributions_of_the_buckets_add_up_to_the_difference():
    page = Page(render(sample()))
    parts = [plain(row[-1]) for row in page.rows if row[0].split(",")[0] in DENSE]
    assert len(parts) == len(BUCKETS) and page.row("context start, no trigram")[0] == "1,106"
    assert sum(parts) == pytest.approx(
        plain(page.row("Minus the arm to its left")[2].split(" ±")[0]), abs=0.003
    )


def test_unequal_parameters_are_said():
    made = sample()
    assert "Equal parameters: total 2,578,496 against 2,573,184 (+0.21\u00a0%)" in render(made)
    made["arms"][2]["parameters"]["activated"] *= 2
    assert "<strong>Unequal</strong> parameters" in render(made)


def test_differing_logits_are_an_alarm_at_the_top():
    made = sample()
    assert "alarm" not in render(made).split("</style>")[1]
    made["logits_equal"] = False
    text = render(made)
    assert 0 < text.index('class="alarm"') < text.index("<h1>")
    assert "NOT equal" in text


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        (["frequency"], ["By n-gram frequency"]),
        (["gates"], ["Where the gate opens"]),
        (["logits_equal"], []),
        (
            [
                "seed",
                "created",
                "command",
                "data",
                "table",
                "machine",
                "versions",
                "settings",
                "logits_equal",
            ],
            ["How this was run"],
        ),
    ],
)
def test_a_missing_part_leaves_out_its_section_alone(missing: list[str], sections: list[str]):
    made = {key: value for key, value in sample().items() if key not in missing}
    assert Page(render(made)).titles == [title for title in SECTIONS if title not in sections]


def test_the_smallest_report_has_headline_and_comparison():
    kept = ("name", "label", "parameters", "validation_loss")
    made = {
        "format": FORMAT,
        "arms": [{key: arm[key] for key in kept} for arm in sample()["arms"][1:]],
        "differences": {"memory - moe": {"all": -0.1, "all_stderr": 0.01}},
    }
    assert Page(render(made)).titles == ["Comparison"]


def broken(*path: Any, value: Any) -> dict[str, Any]:
    made = place = sample()
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            broken("format", value="engraphy-report-2"),
            "expected format 'engraphy-report-1', found 'engraphy-report-2'",
        ),
        ({}, "expected format 'engraphy-report-1', found None"),
        (
            broken("arms", 1, "validation_loss", value=math.nan),
            r"report.arms\[1\].validation_loss: .* found nan",
        ),
        (
            broken("arms", 0, "name", value="dence"),
            "expected the arms dense, moe, memory once each, found .'dence'",
        ),
        (broken("arms", 0, "name", value="moe"), "once each"),
        (broken("arms", value=[]), "once each, found"),
        (broken("differences", value={}), "KeyError: 'memory - moe'"),
        (broken("arms", 2, "validation_loss", value="low"), "TypeError"),
        (broken("gates", "sentences", 0, "gates", value=[0.5]), "zip"),
        (
            broken("differences", "moe - dense", value={"all": 0.1, "all_stderr": 0.1}),
            "KeyError: 'unseen'",
        ),
    ],
)
def test_what_is_not_such_a_report_is_refused(made: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        render(made)


def flat() -> dict[str, Any]:
    made = with_gap(0.0, 0.0)
    for arm in made["arms"]:
        arm.update(validation_loss=3.5, curve=[[2048, 3.5]], heldout_curve=[])
    for gap in made["differences"].values():
        gap.update(dict.fromkeys((*DENSE, "all"), 0.0))
    return made


def losing() -> dict[str, Any]:
    made = with_gap(12.5, 0.5)
    for gap in made["differences"].values():
        gap.update({"unseen": 30.0, "rare": 0.0, "frequent": 1e-9, "very frequent": 7.0})
    return made


def tiny() -> dict[str, Any]:
    return with_gap(-1e-7, 1e-8)


@pytest.mark.parametrize("make", [sample, flat, losing, tiny])
def test_charts_are_labelled_xml_inside_their_boxes(make: Callable[[], dict[str, Any]]):
    drawn = charts_of(render(make()))
    assert len(drawn) == 7  # one ladder; curves, differences and gates for wide and narrow screens
    for svg in drawn:
        assert svg.attrib["role"] == "img" and svg.attrib["aria-label"]
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for element in svg.iter():
            for name, value in element.attrib.items():
                if name in ("x", "x1", "x2", "cx"):
                    assert -0.1 <= float(value) <= width + 0.1, ET.tostring(element)
                if name in ("y", "y1", "y2", "cy"):
                    assert -0.1 <= float(value) <= height + 0.1, ET.tostring(element)
                if name == "points":
                    pairs = [tuple(map(float, point.split(","))) for point in value.split()]
                    assert all(0 <= x <= width and 0 <= y <= height for x, y in pairs)


def test_labels_at_the_end_of_the_curves_never_meet():
    for made in (sample(), flat()):
        svg = ET.fromstring(charts.curves(made["arms"], 340))
        names = [text for text in svg.iter("text") if text.attrib["class"].startswith("strong")]
        places = sorted(float(text.attrib["y"]) for text in names)
        assert len(places) == 3 and all(
            after - before >= 33.9 for before, after in pairwise(places)
        )


def test_smoothing_keeps_a_constant_and_the_last_point_and_does_not_lag():
    assert smooth([]) == []
    assert {loss for _, loss in smooth([[step, 2.5] for step in range(1000)])} == {2.5}
    line = smooth([[step, 3.0 * step] for step in range(1000)])
    assert line[-1][0] == 999 and len(line) <= 500
    assert all(loss == pytest.approx(3.0 * step) for step, loss in line if 15 <= step <= 984)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("the", ("the", False, False)),
        (" the", ("the", True, False)),
        (" ", ("<i>␣</i>", False, False)),
        ("\n", ("<i>↵</i>", False, False)),
        (" \t", ("<i>⇥</i>", True, False)),
        ("a b ", ("a b", False, True)),
        ("\u200b", ("<i>U+200B</i>", False, False)),
        ("\x00", ("<i>U+0000</i>", False, False)),
        ("\u0301", ("◌\u0301", False, False)),
        ("\ud800", ("<i>U+D800</i>", False, False)),
        ("é", ("é", False, False)),
        ("<b>", ("&lt;b&gt;", False, False)),
        ("", ("<i>empty</i>", False, False)),
        ("  x", ("<i>␣</i><i>␣</i>x", False, False)),
    ],
)
def test_every_token_can_be_seen(token: str, shown: tuple[str, bool, bool]):
    made = visible(token)
    text = "".join(f"<i>{one.text}</i>" if one.sign else esc(one.text) for one in made.pieces)
    assert (text, made.before, made.after) == shown


def test_numbers_are_written_with_true_signs_and_enough_digits():
    assert [signed(value) for value in (0.1, -0.1, -0.0004, 0.0)] == [
        "+0.100",
        "\u22120.100",
        "0.000",
        "0.000",
    ]
    assert [digits_for(value) for value in (0.5, 0.004, 0.0004, 0.0)] == [3, 3, 4, 3]
    assert [size(count) for count in (999, 1_593_600, 98_304_000_000)] == [
        "999\u00a0B",
        "1.59\u00a0MB",
        "98.3\u00a0GB",
    ]
    assert esc('<a href="x">\'&\x07') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;\ufffd"


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme: int):
    """At least 4.5:1 (WCAG 2.2, success criterion 1.4.3), on the page and on both ends of the
    gate's scale."""
    block = re.findall(r":root \{(.*?)\}", render(sample()), flags=re.DOTALL)[scheme]
    colour = {
        name: luminance(value) for name, value in re.findall(r"--(\w[\w-]*): (#\w{6});", block)
    }
    texts = [(name, "page") for name in ("ink", "muted", "dense", "moe", "memory")]
    for text, ground in [
        *texts,
        ("ink", "cold"),
        ("ink", "hot"),
        ("ink", "surface"),
        ("alarm", "alarm-page"),
    ]:
        low, high = sorted((colour[text], colour[ground]))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_write_leaves_both_files_and_nothing_else(tmp_path):
    made = sample()
    path = write(made, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert path.read_text(encoding="utf-8") == render(made)
    assert json.loads((path.parent / "report.json").read_text()) == made
    assert sorted(os.listdir(path.parent)) == ["report.html", "report.json"]


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    write(sample(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="JSON can hold"):
        write(broken("settings", "batch", value={1, 2}), tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(with_gap(0.1, 0.01), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
