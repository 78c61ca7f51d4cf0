"""The code of the documentation's pages: its blocks, and whether what they name exists.

A block is one of four kinds: `python` and `bash` run; `console` runs what stands after "$ " and
compares what it prints; `text` is output or a formula. A line such as *(needs the network)* right
before a block says why it does not run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from typer.main import get_command

from engraphy.cli import app
from tests.tools.paths import ROOT

KINDS = ("python", "bash", "console", "text")
OUTPUT = 'title="Output"'
_FENCE = re.compile(r"^( *)(```+)(\S*) *(.*)$")
_REASON = re.compile(r"^\*\((.+)\)\*$")
_FILE = re.compile(r'^title="(\w+\.py)"$')
# Programs whose arguments are not looked at.
_FREE = set("cat cd cp curl echo grep ls mkdir printf rm source torchrun".split())


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its fence, from 1. reason: why it does not run, or None."""

    line: int
    kind: str
    info: str
    text: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.kind in ("python", "bash", "console") and self.reason is None

    @property
    def file(self) -> str | None:
        """The file that a python block is to be saved as, if it has one."""
        found = _FILE.match(self.info) if self.kind == "python" else None
        return found[1] if found else None

    @property
    def is_output(self) -> bool:
        """Whether it shows what the blocks before it print."""
        return self.kind == "text" and self.info == OUTPUT


def all_pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in order. Raises ValueError if one is not closed."""
    blocks = []
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        indent, ticks, kind, info = fence.groups()
        end = _closing(lines, number, ticks)
        body = [line.removeprefix(indent) for line in lines[number + 1 : end]]
        reason = _reason_before(lines[:number])
        blocks.append(Block(number + 1, kind, info.strip(), "\n".join(body) + "\n", reason))
        number = end + 1
    return blocks


def _closing(lines: list[str], start: int, ticks: str) -> int:
    for number in range(start + 1, len(lines)):
        if lines[number].strip() == ticks:
            return number
    raise ValueError(f"line {start + 1}: the block is not closed")


def _reason_before(lines: list[str]) -> str | None:
    """What stands in *( )* in the last line that is not empty."""
    written = [line.strip() for line in lines if line.strip()]
    found = _REASON.match(written[-1]) if written else None
    return found[1] if found else None


def without_blocks(text: str) -> str:
    """A page's prose. Lines of blocks are left empty, so that line numbers stay."""
    lines = text.split("\n")
    for block in blocks_of(text):
        for number in range(block.line - 1, block.line + block.text.count("\n") + 1):
            lines[number] = ""
    return "\n".join(lines)


# --- commands -------------------------------------------------------------------------------------


def commands_of(block: Block) -> list[str]:
    """The commands of a bash or console block, one line each."""
    joined = block.text.replace("\\\n", " ")
    lines = [line.strip() for line in joined.split("\n") if line.strip()]
    if block.kind == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if not line.startswith("#")]


def printed_by(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, each with what the page says that it prints."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    pairs = [part.partition("\n") for part in parts[1:]]
    return [(command, printed) for command, _, printed in pairs]


def command_faults(line: str, whole: bool = True) -> Iterator[str]:
    """What a shell line names that does not exist. whole: it has all arguments that it needs."""
    for words in simple_commands(line):
        words = _bare(words)
        if words:
            yield from _faults(words, whole)


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a shell line, without comments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if word in (";", "&&", "||", "|", "&"):
            commands.append([])
            redirected = False
        elif word in (">", "&>"):
            redirected = True
        elif not redirected:
            commands[-1].append(word)
    return commands


def _bare(words: list[str]) -> list[str]:
    """A simple command without what a shell or another program puts before it."""
    if words[:1] in (["for"], ["done"]):
        return []
    if words[:1] == ["do"]:
        words = words[1:]
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    return words[3:] if words[:2] == ["taskset", "-c"] else words


def _faults(words: list[str], whole: bool) -> Iterator[str]:
    program, *arguments = words
    if program == "engraphy":
        yield from _engraphy_faults(arguments, whole)
    elif program == "python":
        yield from _script_faults(arguments)
    elif program == "make":
        yield from _make_faults(arguments)
    elif program == "pip":
        yield from _pip_faults(arguments)
    elif program not in _FREE:
        yield f"{program}: a program that the pages do not use so far"


def _engraphy_faults(arguments: list[str], whole: bool) -> Iterator[str]:
    command: Any = get_command(app)
    words = [word for word in arguments if word != "..."]
    path: tuple[str, ...] = ()
    while words and words[0] in getattr(command, "commands", {}):
        path += (words.pop(0),)
        command = command.commands[path[-1]]
    name = " ".join(("engraphy", *path))
    options = {spelled: part for part in command.params for spelled in part.opts if "-" in spelled}
    positional = 0
    while words:
        word = words.pop(0)
        spelled, _, value = word.partition("=")
        if not word.startswith("--"):
            positional += 1
        elif spelled == "--help":
            return
        elif spelled not in options:
            yield f"{name} has no option {spelled}"
        elif not (value or options[spelled].is_flag) and words:
            words.pop(0)
    arguments_taken = [part for part in command.params if not part.opts[0].startswith("-")]
    if positional > len(arguments_taken):
        yield f"{name} takes {len(arguments_taken)} arguments, found {positional}: {arguments}"
    if whole and positional < sum(part.required for part in arguments_taken):
        yield f"{name} needs {len(arguments_taken)} arguments, found {positional}: {arguments}"


def _script_faults(arguments: list[str]) -> Iterator[str]:
    """A script has to be in the repository, and each option has to stand in it."""
    if not arguments or arguments[0].startswith("-"):
        return
    script = ROOT / arguments[0]
    if "/" not in arguments[0]:
        return
    if not script.is_file():
        yield f"{arguments[0]}: no such script"
        return
    source = script.read_text()
    for word in arguments[1:]:
        spelled = word.partition("=")[0]
        if spelled.startswith("--") and f'"{spelled}"' not in source:
            yield f"{arguments[0]} has no option {spelled}"


def _make_faults(arguments: list[str]) -> Iterator[str]:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in arguments:
        if "=" not in word and word not in targets:
            yield f"make has no target {word}"


def _pip_faults(arguments: list[str]) -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"(?:engraphy|\.)\[(\w+)\]", " ".join(arguments)):
        if extra not in project["optional-dependencies"]:
            yield f"pyproject.toml has no extra {extra}"


# --- imports --------------------------------------------------------------------------------------


def import_faults(code: str) -> Iterator[str]:
    """Names that code imports from engraphy, or reaches as engraphy.NAME, that are not public."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and _ours(node.module):
            yield from _module_faults(node.module or "")
            for alias in node.names:
                yield from _name_faults(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _ours(alias.name):
                    yield from _module_faults(alias.name)
        elif isinstance(node, ast.Attribute) and _ours(_dotted(node)):
            yield from _name_faults(_dotted(node))


def _ours(name: str | None) -> bool:
    return (name or "").partition(".")[0] == "engraphy"


def _dotted(node: ast.expr) -> str:
    """The name that an attribute spells, as engraphy.hf.attach; "" if it is another expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _module_faults(module: str) -> Iterator[str]:
    if module not in public_modules():
        yield f"{module} is not in the reference: only what is public belongs on a page"


def _name_faults(name: str) -> Iterator[str]:
    """Looks a dotted name up, deprecated spellings not counted."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for number, part in enumerate(parts[1:], start=2):
            try:
                found = getattr(found, part)
            except AttributeError:
                try:
                    found = importlib.import_module(".".join(parts[:number]))
                except (ImportError, DeprecationWarning):
                    yield f"{name} does not exist"
                    return


@lru_cache(maxsize=1)
def public_modules() -> set[str]:
    """Every module that the reference describes."""
    packages = generator().PACKAGES
    inner = {f"{package}.{module}" for package, modules in packages.items() for module in modules}
    return {*packages, *inner}


@lru_cache(maxsize=1)
def generator() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- links ----------------------------------------------------------------------------------------


def link_faults(page: Path, text: str) -> Iterator[str]:
    """Relative links and images of a page that lead nowhere."""
    prose = re.sub(r"`[^`\n]*`", "", without_blocks(text))
    for target in re.findall(r"\]\(([^()\s]+)\)", prose):
        if re.match(r"^[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        if path and not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors_of(file.read_text() if path else text):
            yield f"{target}: no such heading"


def anchors_of(text: str) -> set[str]:
    """The anchors of a page: its headings, and the names that the reference describes."""
    headings = re.findall(r"^#+ +(.+)$", without_blocks(text), re.MULTILINE)
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    return {*map(slug, headings), *names}


def slug(heading: str) -> str:
    """A heading's anchor, as the site and code hosts make it."""
    words = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip()
    return re.sub(r"\s", "-", words)
