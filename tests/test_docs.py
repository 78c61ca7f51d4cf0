"""Every page of the documentation, and README.md: its blocks run, what it names exists, its links
lead somewhere, and the reference says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from engraphy.cli import app
from tests.tools import pages
from tests.tools.pages import Block
from tests.tools.paths import ROOT
from tests.tools.run_page import Different, run_page

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in pages.all_pages()}
# Pages that begin with a model and a text of the reader's own: my-model and notes.txt.
OWN = ("README.md", "docs/guide/attaching.md", "docs/guide/looking-inside.md")
GENERATED = pages.generator().pages()
RUNNING = [
    name
    for name, path in PAGES.items()
    if any(block.runs for block in pages.blocks_of(path.read_text()))
]
RUN = "from tests.tools.run_page import main; raise SystemExit(main())"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A folder with a small model and a text, as a reader may have them."""
    from tests.tools.tiny_model import lives, write_model

    folder = tmp_path_factory.mktemp("own")
    write_model(folder / "my-model")
    (folder / "notes.txt").write_text("\f".join(lives(200)))
    return folder


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_the_blocks_of_a_page_run(name, forks, tmp_path, request):
    if name in OWN:
        for thing in request.getfixturevalue("own").iterdir():
            (tmp_path / thing.name).symlink_to(thing)
    done = forks.run(RUN, PAGES[name], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_of_a_known_kind(name):
    for block in pages.blocks_of(PAGES[name].read_text()):
        where = f"{name}, line {block.line}"
        assert block.kind in pages.KINDS, f"{where}: expected one of {pages.KINDS}"
        known = not block.info or block.is_output or block.file
        assert known, f"{where}: expected no title but Output or a file, found {block.info!r}"
        if block.kind == "console":
            assert block.text.startswith("$ "), f"{where}: expected a command after '$ '"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_begins_with_what_its_reader_can_do_then(name):
    if name in ("README.md", "docs/index.md") or name.startswith("docs/reference/api/"):
        return  # the first two show commands at once; names speak for themselves
    text = PAGES[name].read_text().replace(pages.generator().NOTICE, "")
    assert re.match(r"# .+\n\nAfter this page you\b", text), name


@pytest.mark.parametrize("name", PAGES)
def test_code_stands_in_fences(name):
    """A block that is only indented would be visited by no test."""
    lines = pages.without_blocks(PAGES[name].read_text()).split("\n")
    for number, line in enumerate(lines):
        after_empty = number == 0 or not lines[number - 1].strip()
        option = name.startswith("docs/reference/api/")  # of mkdocstrings
        assert option or not (after_empty and line.startswith("    ")), f"{name}: {line!r}"


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name):
    text = PAGES[name].read_text()
    faults = []
    for block in pages.blocks_of(text):
        if block.kind == "python":
            faults += pages.import_faults(block.text)
        elif block.kind in ("bash", "console"):
            for command in pages.commands_of(block):
                faults += pages.command_faults(command)
    for span in re.findall(r"`(engraphy [^`]+)`", pages.without_blocks(text)):
        faults += pages.command_faults(" ".join(span.split()), whole=False)
    assert not faults, f"{name}: {faults}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    faults = list(pages.link_faults(PAGES[name], PAGES[name].read_text()))
    assert not faults, f"{name}: {faults}"


# --- the reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GENERATED)
def test_the_reference_says_what_the_code_says(path):
    assert (DOCS / path).read_text() == GENERATED[path], f"run: python docs/generate.py ({path})"


def test_every_verb_and_option_is_explained():
    for words, command in pages.generator().walk(get_command(app), ("engraphy",)):
        assert command.help, f"{words}: expected a docstring"
        for parameter in command.params:
            assert parameter.hidden or parameter.help, f"{words}, {parameter.name}: expected help"


def test_every_environment_variable_is_documented():
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    page = (DOCS / "reference" / "environment.md").read_text()
    named = {*re.findall(r"\bENGRAPHY_[A-Z_]+", source)}
    assert named == {*re.findall(r"\bENGRAPHY_[A-Z_]+", page)}


def test_every_page_has_its_place_in_the_site():
    listed = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_first_page_shows_what_the_readme_shows():
    shown = [pages.blocks_of(PAGES[name].read_text()) for name in ("README.md", "docs/index.md")]
    readme, index = ([block.text for block in blocks if block.kind == "text"] for blocks in shown)
    assert readme == index and len(index) == 1


@pytest.mark.parametrize("folder", ["src", "tests", "bench", "examples"])
def test_pages_that_code_points_to_are_there(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text()):
            assert (ROOT / page).exists(), f"{path} points to {page}"


def test_the_site_loads_nothing_from_elsewhere():
    for path in (ROOT / "mkdocs.yml", *DOCS.glob("*.css")):
        assert "//" not in path.read_text(), path


# --- the tests of pages themselves ----------------------------------------------------------------

FENCE = "```"


def page(*parts: str) -> str:
    return "\n".join(parts) + "\n"


def test_blocks_are_read_with_their_kind_line_and_reason():
    text = page("a", "", "*(takes an hour)*", "", f"{FENCE}bash", "make demo", FENCE, "")
    text += page(f'{FENCE}text title="Output"', "done", FENCE)
    assert pages.blocks_of(text) == [
        Block(5, "bash", "", "make demo\n", "takes an hour"),
        Block(9, "text", pages.OUTPUT, "done\n", None),
    ]
    with pytest.raises(ValueError, match="line 1: the block is not closed"):
        pages.blocks_of(page(f"{FENCE}python", "x = 1"))


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("engraphy demo --speed 3", "no option --speed"),
        ("engraphy train my-model", "takes 0 arguments"),
        ("engraphy generate my-model", "needs 3 arguments"),
        ("engraphy table verify a b", "takes 1 arguments"),
        ("python bench/none.py", "no such script"),
        ("python bench/rows.py --none 1", "no option --none"),
        ("make nothing", "no target nothing"),
        ('pip install ".[none]"', "no extra none"),
        ("wget example", "do not use so far"),
        ("cd x && make nothing", "no target nothing"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, fault):
    assert fault in " ".join(pages.command_faults(command))


@pytest.mark.parametrize(
    "command",
    [
        "engraphy demo --data my.txt --tokens=5 --resume",
        "for n in 1 2; do python bench/store.py --out run-$n.json; done",
        "taskset -c 1 python bench/attach.py --rounds 3",
        'engraphy generate my-model my-memory "Ada was" --show-gates > out.txt',
        "make test-transformers VERSION=5.20.0",
    ],
)
def test_a_command_that_exists_has_no_faults(command):
    assert not list(pages.command_faults(command))


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("from engraphy import Nothing", "engraphy.Nothing does not exist"),
        ("from engraphy.system.files import publish_file", "not in the reference"),
        ("import engraphy.layer", "not in the reference"),
        ("import engraphy\nengraphy.hf.nothing()", "engraphy.hf.nothing does not exist"),
    ],
)
def test_an_import_that_does_not_work_is_found(code, fault):
    assert fault in " ".join(pages.import_faults(code))


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("none.md", "no such file"),
        ("guide/stores.md#none", "no such heading"),
        ("#none", "no such"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(target, fault):
    text = f"# Title\n\n[a]({target}) [b](#title) [c](guide/stores.md)\n"
    assert [fault in found for found in pages.link_faults(DOCS / "index.md", text)] == [True]


def test_a_page_that_shows_other_words_than_its_code_prints_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = page(f"{FENCE}python", 'print("loss", 3)', FENCE, "", f'{FENCE}text title="Output"')
    run_page(code + page("loss 4.5", FENCE), "p")  # numbers may differ
    with pytest.raises(Different):
        run_page(code + page("gain 3", FENCE), "p")
    with pytest.raises(ZeroDivisionError):
        run_page(page(f"{FENCE}python", "1 / 0", FENCE), "p")


def test_a_console_block_has_to_show_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = page(f"{FENCE}console", "$ echo one; echo two", "{}", FENCE)
    run_page(shown.format("one\ntwo"), "p")
    run_page(shown.format("one\n..."), "p")
    with pytest.raises(Different):
        run_page(shown.format("one\n2"), "p")
