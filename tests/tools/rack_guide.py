"""Part of `make test-rack`: docs/guide/other-hosts.md followed on two machines, and on three.

    python -m tests.tools.rack_guide

Its commands are taken from the page. A machine is a network namespace (rack_pool.py) with a folder
of its own, in which a.example and b.example are two of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.tools import rack_pool
from tests.tools.pages import blocks_of
from tests.tools.paths import ROOT
from tests.tools.rack_pool import Place, namespaces
from tests.tools.store_builders import LAYER, sealed

PAGE = ROOT / "docs" / "guide" / "other-hosts.md"
NAMES = ("a", "b", "c")  # two with rows, one with a model
ROWS = 5000
_WAIT = 60.0  # seconds until a server listens, or has ended
# Reads in the place of a model until a file is there, and counts what was wrong.
READER = """
import json, pathlib, sys
import numpy as np
from engraphy import open_store
url, layer, rows, end = sys.argv[1:]
expected = np.load(rows)
store = open_store(url, layer=int(layer))
rng = np.random.default_rng(0)
requests = wrong = 0
store.gather(np.arange(9))
print("begun", flush=True)
while not requests or not pathlib.Path(end).exists():
    ids = rng.integers(0, len(expected), 48)
    wrong += not np.array_equal(store.gather(ids), expected[ids])
    requests += 1
print(json.dumps({"requests": requests, "wrong": wrong, "reads": store.info.reads}))
"""


class Machine:
    """A namespace with a folder; the page's commands run in both."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.folder = folder
        self._place = place
        folder.mkdir()

    def start(self, command: str, **options: Any) -> subprocess.Popen[str]:
        """Starts what a shell would."""
        words = self._place.command("bash", "-c", f"exec {command}")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(words, cwd=self.folder, env=environment, text=True, **options)

    def output(self, command: str) -> str:
        """What a command prints. Raises AssertionError if it fails."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        printed = process.communicate()[0]
        assert process.returncode == 0, f"{command}: {printed}"
        return printed

    @contextmanager
    def serving(self, command: str) -> Iterator[subprocess.Popen[str]]:
        """A server that listens; killed at the end, if it has not drained before."""
        server = self.start(command, stdout=subprocess.PIPE)
        assert server.stdout is not None
        try:
            line = next((line for line in server.stdout if line.startswith("listening")), "")
            assert "listening on grpc+tls://0.0.0.0:8815" in line, f"{command}: {line}"
            yield server
        finally:
            server.kill()
            server.wait()


def missing() -> list[str]:
    """What this part needs and does not find."""
    gaps = rack_pool.missing()
    return gaps if shutil.which("openssl") else [*gaps, "the program openssl"]


def run() -> dict[str, Any]:
    """Returns what was counted. Raises AssertionError if a command fails, or a row is wrong."""
    keys, certificate, serve, ask, store, fleet = commands()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = stack.enter_context(namespaces(len(NAMES)))
        stack.enter_context(hosts(places))
        a, b, c = (Machine(place, root / name) for place, name in zip(places, NAMES, strict=True))
        rows = sealed(a.folder / "table", rows=ROWS)
        shutil.copytree(a.folder / "table", b.folder / "table")
        np.save(c.folder / "rows.npy", rows)
        (c.folder / "reader.py").write_text(READER)
        authority = root / "authority"
        authority.mkdir()
        _shell(keys, authority)
        for machine, name in ((a, "a"), (b, "b")):
            _shell(certificate.replace("NAME=a", f"NAME={name}"), authority)
            for file in (f"{name}.key", f"{name}.pem", "token"):
                shutil.copy(authority / file, machine.folder)
        for file in ("ca.pem", "token"):
            shutil.copy(authority / file, c.folder)
        url = ask.split('"')[1]
        assert url in store, f"expected {url} in both blocks"

        with a.serving(serve) as server:
            health = json.loads(c.output(ask).partition(" ")[2])
            assert health["state"] == "serving"
            reader = _begin(c, url, "one")
            _drain(c, ask, server)
            with a.serving(serve):  # calls have waited for it
                one = _end(c, reader, "one")
        first, second = fleet
        with a.serving(first), b.serving(second) as server:
            reader = _begin(c, url, "two")
            _drain(c, ask.replace("a.example", "b.example"), server)
            with b.serving(second):
                two = _end(c, reader, "two")
        assert two["reads"] == "Flight with TLS, 2 servers", two
    return {
        "requests on two machines, wrong, while the server was restarted": _figures(one),
        "requests on three machines, wrong, while one of them was restarted": _figures(two),
    }


def commands() -> tuple[str, str, str, str, str, tuple[str, str]]:
    """The page's blocks: two that make keys, the server's, the client's two, and the fleet's."""
    text = PAGE.read_text()
    two, shards = (
        [block.text for block in blocks_of(text.partition(title)[2].partition("\n## ")[0])]
        for title in ("## Two machines", "## Shards and replicas")
    )
    keys, certificate, serve, ask, store = two
    first, second = shards[0].replace("\\\n", " ").splitlines()
    return keys, certificate, serve, ask, store, (first, second)


@contextmanager
def hosts(places: list[Place]) -> Iterator[None]:
    """Every namespace knows the names of all."""
    lines = [f"{place.address} {name}.example" for place, name in zip(places, NAMES, strict=True)]
    folders = [Path("/etc/netns") / place.name for place in places]
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _begin(client: Machine, url: str, end: str) -> subprocess.Popen[str]:
    """A client that reads until a file of the name `end` is there."""
    command = f'python reader.py "{url}" {LAYER} rows.npy {end}'
    reader = client.start(command, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "begun\n"
    return reader


def _drain(client: Machine, ask: str, server: subprocess.Popen[str]) -> None:
    """Drains a server from the client's machine."""
    client.output(ask.replace("health", "drain"))
    assert server.wait(_WAIT) == 0


def _end(client: Machine, reader: subprocess.Popen[str], name: str) -> dict[str, Any]:
    time.sleep(1)
    (client.folder / name).touch()
    printed = reader.communicate(timeout=_WAIT)[0]
    assert reader.returncode == 0, "expected a client without an error"
    counted = json.loads(printed)
    assert counted["requests"] > 100 and not counted["wrong"], counted
    return counted


def _figures(counted: dict[str, Any]) -> tuple[int, int]:
    return counted["requests"], counted["wrong"]


def _shell(text: str, folder: Path) -> None:
    subprocess.run(["bash", "-ec", text], cwd=folder, check=True, capture_output=True)


def main() -> int:
    """Returns the exit status."""
    gaps = missing()
    if gaps:
        print("rack_guide: expected " + "; ".join(gaps) + "; found none", file=sys.stderr)
        return 2
    for what, value in run().items():
        print(f"{what}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
