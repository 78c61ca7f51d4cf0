"""The examples run as a user would run them, and print what they promise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.tools.paths import ROOT
from tests.tools.tiny_model import lives, write_model

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples"
PROMISES = {
    "addresses.py": "has the same rows: True",
    "attach.py": "loaded, equal bit for bit: True",
    "decode.py": "largest difference: ",
    "train_and_serve.py": "equal bit for bit: True",
}


def test_every_example_is_run():
    assert {path.name for path in FOLDER.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_the_example_runs(name):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:engraphy", FOLDER / name],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert PROMISES[name] in done.stdout
    if name == "decode.py":
        assert float(done.stdout.split("largest difference: ")[1].split()[0]) < 1e-5


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Somebody in a folder with a model and a text of their own."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "my-model")
    (tmp_path / "notes.txt").write_text("\f".join(lives(200)))


def blocks_of(path):
    blocks = [
        compile(block.split("```")[0], path.name, "exec")
        for block in path.read_text().split("```python\n")[1:]
    ]
    assert blocks
    return blocks


def test_the_code_in_the_readme_runs(reader):
    for block in blocks_of(FOLDER.parent / "README.md"):
        exec(block, {})


def test_the_code_in_the_guide_to_attaching_runs(reader):
    names = {}
    for block in blocks_of(FOLDER.parent / "docs" / "attaching.md"):
        exec(block, names)
