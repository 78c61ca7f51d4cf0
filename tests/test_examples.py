"""The examples run as a user would run them, and print what they promise."""

from __future__ import annotations

import pytest

from tests.tools.paths import ROOT

pytestmark = pytest.mark.slow

FOLDER = ROOT / "examples"
PROMISES = {
    "addresses.py": "has the same rows: True",
    "attach.py": "loaded, equal bit for bit: True",
    "decode.py": "largest difference: ",
    "train_and_serve.py": "equal bit for bit: True",
}
RUN = """
import runpy, sys, warnings
warnings.filterwarnings("error", category=UserWarning, module="engraphy")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_example_is_run():
    assert {path.name for path in FOLDER.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_the_example_runs(name, forks, tmp_path):
    done = forks.run(RUN, FOLDER / name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert PROMISES[name] in done.stdout
    if name == "decode.py":
        assert float(done.stdout.split("largest difference: ")[1].split()[0]) < 1e-5
