"""The sandbox contains what it should, each time for the reason that it should, and runs what is
harmless."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from engraphy.errors import ConfigError, SandboxUnavailable
from engraphy.eval import jail
from engraphy.eval import sandbox as module
from engraphy.eval.sandbox import Limits, Sandbox, sandbox

MARK = "made_by_a_program_in_the_sandbox"


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return sandbox(Limits(seconds=2.0))
    except SandboxUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def open_folder():
    """A folder in which everybody may do everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def alone(*lines: str) -> str:
    """What a fresh interpreter prints that takes one protection by itself."""
    code = "\n".join(["from jail import *", "import socket", *lines])
    command = [sys.executable, "-c", code]
    folder = os.path.dirname(jail.__file__)
    run = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=30
    )
    return run.stdout + run.stderr


def test_a_harmless_program_passes(box):
    assert box.run("import math, re, hashlib\nassert math.gcd(4, 6) == 2\nprint('x' * 100)").passed
    assert box.run("").reason == "passed"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("x = = 1", "failed: SyntaxError"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("import os; os._exit(0)", "failed: it ended before its last line"),
        ("import os; os.abort()", "failed: SIG"),
        ("def f(): return f()\nf()", "failed: RecursionError"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", "failed: E: its message"),
    ],
)
def test_a_program_that_fails_is_told_with_its_reason(box, program, reason):
    outcome = box.run(program)
    assert not outcome.passed and outcome.reason.startswith(reason)


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "import socket; socket.socketpair()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9', timeout=1)",
    ],
)
def test_a_program_opens_no_socket(box, program):
    outcome = box.run(program)
    assert not outcome.passed and "Operation not permitted" in outcome.reason


def test_a_program_that_takes_8_gb_gets_a_memory_error():
    box = sandbox(Limits(seconds=20.0), module.PROTECTIONS)
    assert box.run("x = bytearray(8 << 30)").reason.startswith("failed: MemoryError")
    slowly = "x = []\nwhile True: x.append(bytearray(1 << 26))"
    assert box.run(slowly).reason.startswith("failed: MemoryError")
    assert box.run("x = bytearray(1 << 28)").passed


def test_a_program_without_an_end_is_ended():
    begin = time.monotonic()
    box = sandbox(Limits(seconds=0.3), module.PROTECTIONS)
    for program in (
        "while True: pass",
        "import time; time.sleep(60)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ):
        assert box.run(program).reason == "timed out"
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
    ],
)
def test_a_program_makes_and_touches_no_other_process(box, program):
    outcome = box.run(program)
    assert outcome.reason.startswith("failed: ") and not outcome.passed


@pytest.mark.parametrize(
    "action",
    [
        "open({path!r}, 'w').write('x')",
        "open({path!r}, 'a').close()",
        "import os; os.mkdir({path!r})",
        "import os; os.unlink({there!r})",
        "import os; os.rename({there!r}, {path!r})",
        "import os; os.symlink({there!r}, {path!r})",
        "import os; os.chmod({there!r}, 0)",
        "import os; os.truncate({there!r}, 0)",
        "import os; os.utime({there!r})",
    ],
)
def test_a_program_changes_no_files_even_where_everybody_may(box, action, open_folder):
    there = open_folder / "there"
    there.write_text("as it was")
    there.chmod(0o666)
    path = open_folder / MARK
    outcome = box.run(action.format(path=str(path), there=str(there)))
    assert "Operation not permitted" in outcome.reason
    assert there.read_text() == "as it was" and os.listdir(open_folder) == ["there"]


def test_a_program_reads_no_file_of_root(box):
    if os.geteuid():
        pytest.skip("not root: the programs run as the same user")
    assert "PermissionError" in box.run("open('/etc/shadow').read()").reason
    assert box.run("import os; assert os.getuid() == os.geteuid() != 0").passed
    assert "PermissionError" in box.run("import os; os.setuid(0)").reason


def test_a_program_imports_what_the_library_has(box):
    modules = "math, re, string, hashlib, random, json.tool, encodings.punycode, heapq, bisect"
    assert box.run(f"import {modules}, dataclasses, decimal, fractions, statistics").passed


def test_a_program_that_writes_to_the_report_claims_nothing(box):
    claim = (
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'"
        '{"nonce": "", "result": "passed"}\\n\')\n  except OSError: pass\nos._exit(0)'
    )
    assert box.run(claim).reason == "failed: it ended before its last line"


def test_the_filter_by_itself_refuses_sockets_and_lets_read():
    told = alone(
        "assert filtered()",
        "open(os.__file__).close()",
        "try: socket.socket()",
        "except PermissionError: print('refused')",
    )
    assert told == "refused\n" or "AssertionError" in told and sys.platform != "linux"


def test_a_namespace_by_itself_has_no_way_out():
    told = alone(
        "print(own_network())",
        "print([name for _, name in socket.if_nameindex()])",
        "try: socket.create_connection(('127.0.0.1', 9), 1)",
        "except OSError as error: print(error)",
    )
    if told.startswith("None"):
        pytest.skip("this machine gives no network namespace")
    assert told.splitlines()[1:] == ["['lo']", "[Errno 101] Network is unreachable"]


def test_a_missing_protection_is_refused_unless_it_is_done_without(monkeypatch):
    def nothing(program, demanded, limits):
        protections = dict.fromkeys(module.PROTECTIONS)
        lines = [{"protections": protections}, {"result": "passed"}]
        return lines[: 1 if demanded else 2], 0

    monkeypatch.setattr(module, "_jailed", nothing)
    with pytest.raises(SandboxUnavailable, match="none of network, files"):
        sandbox()
    with pytest.raises(SandboxUnavailable, match="none of network on"):
        sandbox(without=("files", "processes", "user"))
    assert sandbox(without=module.PROTECTIONS).run("").passed
    with pytest.raises(SandboxUnavailable, match="none of files on"):
        Sandbox(Limits(), frozenset({"network", "processes", "user"}), {}).run("")


def test_the_jail_runs_nothing_if_a_demanded_protection_is_missing(monkeypatch, box):
    """The process decides for itself, whatever was found before."""
    lines, _ = module._jailed("x = 1", ["network"], Limits())
    assert lines[1]["result"] == "passed"
    code = (
        "import jail, os, sys\njail.filtered = jail.own_network = lambda: None\n"
        "jail.main([str(sys.stdout.fileno())])"
    )
    order = '{"nonce": "n", "program": "print(5)", "demanded": ["network"], "seconds": 5, '
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(jail.__file__),
        input=order + '"memory_bytes": 1000000000}',
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.count("\n") == 1 and '"network": null' in run.stdout


def test_limits_that_cannot_be_meant_are_refused():
    with pytest.raises(ConfigError, match="seconds"):
        Limits(seconds=0)
    with pytest.raises(ConfigError, match="memory_bytes"):
        Limits(memory_bytes=1000)
    with pytest.raises(ConfigError, match="found wifi"):
        sandbox(without=("wifi",))
