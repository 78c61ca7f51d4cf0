"""The page of an inspection: self-contained, escaped, and all of its numbers in it."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser

import pytest

from engraphy.errors import ConfigError
from engraphy.report.inspection import render, write
from tests.tools.inspections import TEXTS, inspection


class Page(HTMLParser):
    """Tags, attributes and texts of a page; every tag has to be closed."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.script = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(inspection()))


def test_nothing_is_loaded_and_the_one_script_is_allowed_by_its_digest(page):
    assert not page.open
    for _, attrs in page.tags:
        assert not {"src", "href", "action", "onclick", "onload"} & set(attrs)
    whole = render(inspection())
    assert "//" not in re.sub(r"^\s*// .*$", "", whole, flags=re.MULTILINE)
    assert "url(" not in whole and "@import" not in whole
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert page.script.count("\n") <= 160


def test_every_token_has_a_chip_details_and_a_column_of_the_lens(page):
    assert len(page.of_class("chip")) == len(TEXTS)
    assert sum(tag == "article" for tag, _ in page.tags) == len(TEXTS)
    cells = page.of_class("cell")
    assert len(cells) == len(TEXTS) * 4
    # Row by row: layer 2 at token 5. KL 1 * 1.5 with the memory, 1.5 times as much without.
    titles = (cells[2 * len(TEXTS) + 5]["data-titles"] or "").split("\n")
    assert "after layer 2, at ' W\u00e4les'" in titles[0] and "KL 1.50 nats" in titles[0]
    assert "'off2.5' is likeliest, KL 2.25" in titles[1]
    assert "KL \u22120.75 nats with the memory" in titles[2]
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"].count("before") == 1
    assert "before the memory" in page.text and page.text.count("+ memory") == 2


def test_values_of_each_measure_stand_at_their_token(page):
    values = [(attrs["data-values"] or "").split("|") for attrs in page.of_class("chip")]
    # Gate (mean of two streams) and update of layer 1, the same of layer 2, saved, surprise.
    assert values[0][:2] == ["0.11", "5.0\u00a0%"]
    assert values[0][4:] == ["\u2013", "\u2013"]  # nothing predicts the first token
    # Token 3 was predicted at token 2: 1.5 with, 1.5 without; token 2 at 1: 1.25 and 1.75.
    assert values[2][4:] == ["+0.50", "1.25"] and values[3][4:] == ["0.00", "1.50"]
    shares = [(attrs["data-shares"] or "").split("|") for attrs in page.of_class("chip")]
    gates = [int(share[0]) for share in shares]
    assert gates == sorted(gates) and (gates[0], gates[-1]) == (0, 100)
    saved = [int(share[4]) for share in shares]
    # The last was predicted worst: 0.75 - 2.25 = -1.5. Token 1: 2 - 1 = 1, two thirds of that.
    assert saved[6] == -100 and saved[1] == 67 and saved[3] == 0


def test_rows_sharers_and_pushes_are_named(page):
    for part in ("120", "an other", "12\u00d7", "3 others", "its own", "and 2 more", "<b>", "down"):
        assert part in page.text, part
    assert "14\u00d7 in the text, 1 of 2 rows shared" in page.text


def test_text_is_escaped_and_made_visible():
    texts = ["</script><script>alert(1)</script>", " a\x00\u202eb", "\n", " \u0301", "<"]
    whole = render(inspection(texts))
    assert "alert(1)</script>" not in whole and "\x00" not in whole
    page = Page(whole)
    assert not page.open
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "\u21b5" in page.text and "U+202E" in page.text


def test_one_token_one_stream_and_no_corpus_make_a_page_too():
    report = inspection(["Diana"], streams=1)
    report["corpus"], report["memory"] = None, ""
    for ngram in report["tokens"][0]["ngrams"]:
        ngram["count"] = None
    for view in report["tokens"][0]["memory"]:
        view["towards"] = view["away"] = []
        for row in view["rows"]:
            row |= {"others": None, "reads": 0, "frequent": []}
    page = Page(render(report))
    assert "adds nothing here" in page.text and "in the text" not in page.text
    assert "nothing follows" in page.text and "others" not in page.text


def test_what_is_no_inspection_is_refused_and_leaves_the_old_page(tmp_path):
    path = write(inspection(), tmp_path / "page.html")
    before = path.read_bytes()
    assert before.decode() == render(inspection())
    other = inspection() | {"format": "engraphy-report-1"}
    broken = copy.deepcopy(inspection())
    del broken["tokens"][2]["memory"][1]["gates"]
    infinite = copy.deepcopy(inspection())
    infinite["tokens"][1]["lens_on"][0]["kl"] = float("inf")
    for report, message in (
        (other, "expected format"),
        (broken, "KeyError: 'gates'"),
        (infinite, r"lens_on\[0\].kl: expected a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            write(report, path)
    assert path.read_bytes() == before
