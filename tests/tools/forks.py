"""Python code in a process of its own, without the seconds that imports of large packages take.

One process imports them, and runs each piece of code in a fork of itself, as `python -c` would.
Engraphy is not among them, so the code still has to import what it uses.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from tests.tools.paths import ROOT

IMPORTED = (
    "numpy",
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "typer",
)
SECONDS = 300  # within which a piece of code has to end


class Forks:
    """A process that has imported the large packages.

    Args:
        folder: For what the code prints. Caches of transformers are in it, too.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        own = {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.tools.forks"],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | own,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
        """Runs code in a fork, with sys.argv[1:] as given. Returns when it has ended."""
        written = [self.folder / name for name in ("stdout", "stderr")]
        request = [code, [*map(str, arguments)], str(cwd), [*map(str, written)]]
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        answer = self.process.stdout.readline() if ready else ""
        stdout, stderr = (path.read_text() for path in written)
        if not answer:
            self.close()
            raise TimeoutError(f"{SECONDS} s, or the process is gone\n{stdout}{stderr}")
        return subprocess.CompletedProcess(arguments, int(answer), stdout, stderr)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def main() -> None:
    """Answers requests until its input ends. Returns in forks, when their code has ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert "engraphy" not in sys.modules
    gc.collect()
    gc.freeze()  # else looking for garbage would copy this process's memory into each fork
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            run(*request)
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(code: str, arguments: list[str], cwd: str, written: list[str]) -> None:
    """Runs code in this process as `python -c` would."""
    for number, path in enumerate((os.devnull, *written)):
        with open(path, "w" if number else "r") as file:
            os.dup2(file.fileno(), number)
    sys.stdin = open(os.devnull)
    os.chdir(cwd)
    sys.path[0] = ""
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main_module = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main_module.__dict__)


if __name__ == "__main__":
    main()
