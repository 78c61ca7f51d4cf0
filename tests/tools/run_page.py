"""Runs the blocks of one page, in order: python -m tests.tools.run_page PAGE

Python blocks share one set of names, and all blocks share the current folder. A Python block with a
file name as its title is written to that file. Commands of Engraphy
run in this process, which is faster; other commands run in a shell. What a console block shows has
to be what its commands print, but for "..." and for what differs from run to run. Of a text block
with the title "Output" the words have to be right, not the numbers.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from engraphy.cli import app
from tests.tools.pages import Block, blocks_of, commands_of, printed_by


class Different(Exception):
    """A page shows other output than its code gives."""


def run_page(text: str, name: str) -> None:
    """Runs a page's blocks in the current folder. Raises what a block raises, or Different."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = None
    for block in blocks_of(text):
        if block.is_output:
            if printed is not None:
                compare_words(block, printed)
            continue
        if block.kind == "text":
            continue
        printed = run_block(block, name, names) if block.runs else None


def run_block(block: Block, page: str, names: dict[str, Any]) -> str:
    """Returns what the block printed."""
    try:
        if block.kind == "python":
            return run_python(block, page, names)
        if block.kind == "bash":
            return "".join(run_command(command, must=True) for command in commands_of(block))
        for command, expected in printed_by(block):
            compare_text(expected, run_command(command, must=False))
        return ""
    except BaseException:
        print(f"{page}: the block of line {block.line} failed", file=sys.stderr)
        raise


def run_python(block: Block, page: str, names: dict[str, Any]) -> str:
    if block.file is not None:
        Path(block.file).write_text(block.text)
        return ""
    code = compile("\n" * block.line + block.text, page, "exec")
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        exec(code, names)
    return stream.getvalue()


def run_command(command: str, must: bool) -> str:
    """What a command prints. must: it has to succeed; else it may only not crash."""
    words = shlex.split(command, comments=True)
    if words[:1] == ["engraphy"] and not re.search(r"[|>&;$]", command):
        return run_engraphy(words[1:], must)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode and must:
        raise RuntimeError(f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def run_engraphy(words: list[str], must: bool) -> str:
    result = CliRunner().invoke(app, words)
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    if crashed or (must and result.exit_code):
        raise RuntimeError(f"engraphy {words}: {result.output}") from result.exception
    return result.stdout


def compare_text(expected: str, found: str) -> None:
    """Raises Different unless a console block shows what was printed."""
    if not re.fullmatch(_pattern(masked(expected)), masked(found), re.DOTALL):
        raise Different(f"the page shows\n{masked(expected)}\nfound\n{masked(found)}")


def compare_words(block: Block, printed: str) -> None:
    """Raises Different unless the words of an output block are those that were printed."""
    expected, found = words_of(block.text), words_of(printed)
    if not re.fullmatch(_pattern(expected), found, re.DOTALL):
        raise Different(f"line {block.line}: the page shows\n{expected}\nfound\n{found}")


def _pattern(expected: str) -> str:
    return ".*".join(map(re.escape, re.split(r" *\.\.\.\n?", expected)))


def masked(text: str) -> str:
    """Without what differs from run to run: identities, this folder, sizes on disk, blanks."""
    text = re.sub(r"[0-9a-f]{32}", "ID", text).replace(os.getcwd(), "/home/me")
    text = re.sub(r"^on disk.*$", "on disk", text, flags=re.MULTILINE)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def words_of(text: str) -> str:
    """Without numbers, and with single spaces."""
    text = re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "0", masked(text))
    return re.sub(r"\s+", " ", text).strip() + "\n"


def main() -> int:
    """Returns the exit status."""
    page = Path(sys.argv[1])
    warnings.filterwarnings("error", module="engraphy")
    try:
        run_page(page.read_text(), page.name)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
