"""Opens the page of an inspection in headless Chromium and clicks it through: make test-browser

    python -m tests.tools.browse [PAGE] [--pictures FOLDER]

Without PAGE it is the page of a small inspection. Exits with 2 and says so if there is no Chromium.
With --pictures it writes the page as PNG at three widths, light and dark.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from engraphy.report.inspection import write
from tests.tools.browser import PROGRAMS, Browser, find_program
from tests.tools.inspections import inspection

WIDTHS = (390, 1000, 1600)
CHOSEN = "document.querySelector('#tokens [aria-selected=true]').id"
SHOWN = (
    "[...document.querySelectorAll('#details article')]"
    ".filter(one => !one.hidden).map(one => one.id)"
)
READOUT = "document.getElementById('readout').textContent"
VALUES = "[...document.querySelectorAll('#tokens small')].map(one => one.textContent)"


def expect(what: str, found: object, expected: object) -> None:
    """Raises AssertionError unless both are equal."""
    if found != expected:
        raise AssertionError(f"{what}: expected {expected!r}, found {found!r}")


def walk_through(browser: Browser, page: Path, width: int, dark: bool) -> None:
    """Opens the page, and uses everything that can be used."""
    browser.open(page, width, dark=dark)
    expect("width", browser.evaluate("document.documentElement.scrollWidth"), width)
    dark_page = "getComputedStyle(document.body).backgroundColor"
    expect("dark", browser.evaluate(dark_page) == "rgb(20, 22, 26)", dark)
    _tokens(browser)
    _measures(browser)
    _lens(browser)
    _rows(browser)
    expect("errors", browser.errors, [])
    loaded = [url for url in browser.requests if not url.startswith(page.resolve().as_uri())]
    expect("loaded from elsewhere", [url for url in loaded if url != "about:blank"], [])


def _tokens(browser: Browser) -> None:
    last = browser.evaluate("document.querySelectorAll('#tokens .chip').length") - 1
    browser.click("#token-1")
    for key, token in (
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("End", last),
        ("ArrowRight", last),
    ):
        browser.press(key)
        expect(f"token after {key}", browser.evaluate(CHOSEN), f"token-{token}")
        expect(f"details after {key}", browser.evaluate(SHOWN), [f"details-{token}"])
        expect(
            f"focus after {key}", browser.evaluate("document.activeElement.id"), f"token-{token}"
        )
        expect("address", browser.evaluate("location.hash"), f"#token-{token}")


def _measures(browser: Browser) -> None:
    count = browser.evaluate("document.querySelectorAll('#measures button').length")
    seen = {str(browser.evaluate(VALUES))}
    for place in range(2, count + 1):
        button = f"#measures button:nth-child({place})"
        browser.click(button)
        checked = f"document.querySelector('{button}').getAttribute('aria-checked')"
        expect("checked", browser.evaluate(checked), "true")
        note = browser.evaluate(f"document.querySelector('{button}').dataset.note")
        expect("note", browser.evaluate("document.getElementById('note').textContent"), note)
        seen.add(str(browser.evaluate(VALUES)))
    if len(seen) < 3:
        raise AssertionError("measures: expected other values for each, found the same")
    browser.press("m")
    first = "document.querySelector('#measures button').getAttribute('aria-checked')"
    expect("first measure after m", browser.evaluate(first), "true")


def _lens(browser: Browser) -> None:
    cell = ".lens tbody tr:nth-child(2) td.cell"
    browser.click("#token-0")
    resting = browser.evaluate(READOUT)
    browser.hover(cell)
    hovered = browser.evaluate(READOUT)
    expect("hovered cell", hovered.startswith("after layer 1, at"), True)
    browser.hover("#lens h2")
    expect("readout after hovering", browser.evaluate(READOUT), resting)
    browser.click(cell)
    expect("clicked cell", browser.evaluate(READOUT), hovered)
    browser.press("ArrowUp")
    expect("layer after ArrowUp", browser.evaluate(READOUT).startswith("after layer 0"), True)
    browser.press("ArrowDown")
    expect("layer after ArrowDown", browser.evaluate(READOUT), hovered)
    browser.press("w")
    expect("without", ", without the memory:" in browser.evaluate(READOUT), True)
    browser.click("#views button:nth-child(3)")
    expect("difference", "nats with the memory (" in browser.evaluate(READOUT), True)
    browser.press("ArrowRight")  # in the group of buttons: around to the first view
    expect("around", browser.evaluate(READOUT), hovered)


def _rows(browser: Browser) -> None:
    summary = "#details article:not([hidden]) summary"
    is_open = f"document.querySelector('{summary}').parentElement.open"
    expect("rows at first", browser.evaluate(is_open), False)
    browser.click(summary)
    expect("rows after a click", browser.evaluate(is_open), True)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", nargs="?", type=Path)
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    if find_program() is None:
        names = ", ".join(PROGRAMS)
        print(
            f"make test-browser: expected one of the programs {names}, found none; on Debian: "
            "apt-get install chromium",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = options.page or write(inspection(), Path(folder) / "page.html")
        for width in WIDTHS:
            for dark in (False, True):
                walk_through(browser, page, width, dark)
                scheme = "dark" if dark else "light"
                print(f"{page.name}, {width} pixels, {scheme}: clicked through")
                if options.pictures is not None:
                    options.pictures.mkdir(parents=True, exist_ok=True)
                    browser.open(page, width, dark=dark)
                    browser.screenshot(options.pictures / f"{page.stem}-{width}-{scheme}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
