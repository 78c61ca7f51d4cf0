"""The page of a small report is the one that is kept in tests/data/report: same elements, same
attributes, same text.

After a wanted change of the page, write it anew with
`write(json.loads((KEPT / "report.json").read_text()), KEPT)` and look at it in a browser.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from engraphy.report.page import render
from tests.tools.paths import DATA

KEPT = DATA / "report"
INLINE = {"span", "strong", "i", "small", "bdi", "code", "text", "tspan"}
VOID = {"meta"}
AS_WRITTEN = re.compile("pre|text|bdi")  # tags and classes whose white space is shown


class Parts(HTMLParser):
    """A page as a list of start tags with sorted attributes, end tags and texts.

    White space counts as a browser counts it: a run is one space, and none stands at the edge of a
    block.
    """

    def __init__(self, page: str):
        super().__init__()
        self.parts: list[tuple] = []
        self.open: list[str] = []  # "tag class" of the elements around
        self.text = ""
        self.after_block = True
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.end_text(tag)
        kept = sorted((name, value) for name, value in attrs if (name, value) != ("class", ""))
        self.parts.append((tag, *kept))
        if tag not in VOID:
            self.open.append(f"{tag} {dict(attrs).get('class', '')}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        self.end_text(tag)
        self.parts.append((f"/{tag}",))
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def end_text(self, tag: str) -> None:
        text = self.text
        before_block = tag not in INLINE
        words = {word for names in self.open for word in names.split()}
        if not any(AS_WRITTEN.fullmatch(word) for word in words):
            text = re.sub("[ \n\t]+", " ", text)
            text = text.lstrip(" ") if self.after_block else text
            text = text.rstrip(" ") if before_block else text
        if text:
            self.parts.append(("text", text))
        self.text = ""
        self.after_block = before_block


def test_the_page_is_the_kept_one():
    page = render(json.loads((KEPT / "report.json").read_text()))
    assert Parts(page).parts == Parts((KEPT / "report.html").read_text(encoding="utf-8")).parts


def test_what_is_shown_is_compared():
    page = '<p class="">a <i>c</i></p>'
    assert Parts(page).parts == Parts("<p>\na\n <i>c</i>\n</p>\n").parts
    for other in (
        '<p class="x">a <i>c</i></p>',
        "<p>a<i>c</i></p>",
        "<p>a <i>d</i></p>",
        "<p>a</p> <i>c</i>",
        "<p>a <b>c</b></p>",
    ):
        assert Parts(page).parts != Parts(other).parts
    assert Parts("<pre>a\n</pre>").parts != Parts("<pre>a </pre>").parts
    assert Parts("<i>a</i> <i>b</i>").parts != Parts("<i>a</i><i>b</i>").parts
