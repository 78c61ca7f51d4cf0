"""SIGTERM is taken as Ctrl-C is: the step ends, what has been done is saved and said, a second
signal stops at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import engraphy
from engraphy import cli
from engraphy.cli.terminal import errors
from engraphy.system.signals import Terminated, exit_code, stopping, terminable
from tests.tools.tiny_model import lives, write_model

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize(
    "number, error, code",
    [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, Terminated, 143)],
    ids=["int", "term"],
)


@pytest.fixture(autouse=True)
def taken():
    """SIGINT as a terminal leaves it: shells start what runs in the background with it ignored,
    and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@BOTH
def test_the_first_signal_waits_for_the_end_of_the_step_and_the_second_does_not(
    number, error, code
):
    with stopping() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        with pytest.raises(error):
            os.kill(os.getpid(), number)
    raised = stop.error("all is saved")
    assert type(raised) is error and exit_code(raised) == code and str(raised) == "all is saved"


def test_handlers_are_as_before_afterwards_and_other_threads_set_none():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found: list[object] = []

    def inside():
        with stopping() as stop, terminable():
            found.extend(
                [
                    bool(stop),
                    *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)),
                ]
            )

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    with pytest.raises(ZeroDivisionError), stopping(), terminable():
        raise ZeroDivisionError
    assert found == [False, *before]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@BOTH
def test_a_command_says_by_which_signal_it_ended_and_exits_with_its_number(
    monkeypatch, tmp_path, number, error, code
):
    for command in (
        ["table", "verify", str(tmp_path)],
        ["table", "convert", str(tmp_path), str(tmp_path / "t")],
        ["table", "quantize", str(tmp_path), str(tmp_path / "t"), "--kind", "int8"],
    ):

        def end(*_, **__):
            os.kill(os.getpid(), number)

        for name in ("inspection.verify", "convert_checkpoint", "quantize_table"):
            monkeypatch.setattr(f"engraphy.cli.table.{name}", end)
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == code
        assert ("ended by SIGTERM;" if code == 143 else "interrupted;") in result.output


def test_what_was_said_with_the_interrupt_is_shown(capsys):
    with pytest.raises(typer.Exit), errors("go on with [it]"):
        raise Terminated("stopped at step 3 of 9")
    assert "ended by SIGTERM (stopped at step 3 of 9); go on with [it]" in capsys.readouterr().err


# Real processes.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lives.txt"
    path.write_text("\f".join(lives(400)))
    return path


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(code), *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(process: subprocess.Popen[str], said: str) -> str:
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if said in line:
            return "".join(lines)
    pytest.fail("".join(lines))


FINETUNE = """
    import sys
    from engraphy import cli
    from engraphy.recipes.progress import ArmProgress
    step = ArmProgress.step
    def said(self, name, told):
        step(self, name, told)
        print("step", told.step, flush=True)
    ArmProgress.step = said
    model, data, out = sys.argv[1:4]
    cli.app(["finetune", model, "--data", data, "--out", out, "--tokens", "100000000",
              "--batch", "2", "--length", "64",
             "--rows-per-head", "101"])
"""


@BOTH
def test_finetune_saves_what_it_has_learned_and_says_so(base, text, tmp_path, number, error, code):
    process = started(FINETUNE, base, text, tmp_path / "memory")
    wait_for(process, "step 2")
    process.send_signal(number)
    rest = process.communicate(timeout=120)[0]
    last = re.findall(r"step (\d+)$", rest, re.MULTILINE)
    stopped = re.search(
        r"\(stopped at step (\d+) of \d+\); a training that had begun is saved", rest
    )
    assert process.returncode == code and stopped and f"saved: {tmp_path}" in rest, rest
    assert not last or last[-1] == stopped[1]  # the step was finished
    memory = engraphy.EngramMemory.load(tmp_path / "memory")
    assert memory.blocks[str(memory.layers[0])].value.weight.abs().max() > 0
    assert (
        sorted(os.listdir(tmp_path)) == ["memory"] and (tmp_path / "memory" / "README.md").exists()
    )


DEMO = """
    import sys
    from engraphy import cli
    if __name__ == "__main__":
        from engraphy.recipes.progress import ArmProgress
        step = ArmProgress.step
        seen = set()
        def said(self, name, told):
            step(self, name, told)
            seen.add(name)
            if len(seen) == 3:
                print("all arms train", flush=True)
        ArmProgress.step = said
        cli.app(["demo", "--data", sys.argv[1], "--out", sys.argv[2], "--vocab", "300",
                  "--tokens", "100000000"])
"""


def test_the_demo_tells_its_arms_and_each_leaves_a_checkpoint(text, tmp_path):
    """SIGTERM reaches the parent alone."""
    (tmp_path / "demo.py").write_text(textwrap.dedent(DEMO))
    command = [sys.executable, "-u", tmp_path / "demo.py", text, tmp_path / "run"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(process, "all arms train")
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=240)[0]
    assert process.returncode == 143 and "; continue with --resume" in rest, rest
    for arm in ("dense", "moe", "memory"):
        assert len(list((tmp_path / "run" / arm).glob("checkpoint-*"))) == 1, arm


QUEUE = """
    import os, sys, time
    from dataclasses import dataclass
    from functools import partial
    from pathlib import Path
    from engraphy.recipes.studies.queue import run_missing
    from engraphy.system.signals import exit_code, stopping, terminable

    @dataclass(frozen=True)
    class Job:
        name: str

    def work(job, out):
        with stopping() as stop:
            (out / f"{job.name}.began").touch()
            while not stop:
                time.sleep(0.01)
            time.sleep(float(os.environ["SAVING"]))
            (out / f"{job.name}.saved").touch()
            raise stop.error("saved")

    if __name__ == "__main__":
        out = Path(sys.argv[1])
        jobs = [Job("a"), Job("b"), Job("c")]
        try:
            with terminable():
                run_missing(lambda: jobs, out, 2, partial(work, out=out), print)
        except KeyboardInterrupt as error:
            sys.exit(exit_code(error))
"""


@pytest.mark.parametrize(
    "number, code, whole_group",
    [
        (signal.SIGTERM, 143, False),
        (signal.SIGTERM, 143, True),
        (signal.SIGINT, 130, True),
    ],
    ids=["kill", "service manager", "Ctrl-C"],
)
def test_the_runs_of_a_study_save_and_no_other_begins(tmp_path, number, code, whole_group):
    """Whether the signal reaches the study alone, or its workers too."""
    process, out = queue_of(tmp_path, saving=0.5)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == code, said
    assert sorted(os.listdir(out)) == ["a.began", "a.saved", "b.began", "b.saved"]


def test_a_second_signal_stops_a_study_at_once(tmp_path):
    process, out = queue_of(tmp_path, saving=10_000)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0 and sorted(os.listdir(out)) == ["a.began", "b.began"]


def queue_of(tmp_path: Path, saving: float) -> tuple[subprocess.Popen[str], Path]:
    (tmp_path / "some_queue.py").write_text(textwrap.dedent(QUEUE))
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, tmp_path / "some_queue.py", out],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"SAVING": str(saving)},
        start_new_session=True,
    )
    while not ((out / "a.began").exists() and (out / "b.began").exists()):
        assert process.poll() is None, process.communicate()[0]
    return process, out
