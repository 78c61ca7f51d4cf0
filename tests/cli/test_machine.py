"""`engraphy doctor` says what is there, what is not, and why."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from engraphy import __version__, _native
from engraphy.cli import machine
from engraphy.cli.app import app
from engraphy.system import cpu


def shown(facts) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(machine.render(facts))
    return capture.get()


def test_json_and_table_tell_the_same():
    printed = CliRunner().invoke(app, ["doctor", "--json"])
    assert printed.exit_code == 0
    facts = json.loads(printed.output)
    text = shown(facts)
    for value in (
        facts["engraphy"],
        facts["packages"]["torch"],
        facts["native"]["reason"],
        facts["native"]["level"],
    ):
        assert value in text
    assert facts["memory"].keys() == {"total", "available", "huge_pages"}


def test_a_native_part_that_is_switched_off_is_said():
    with _native.forced("off"):
        facts = machine.report()
    expected = {
        "active": False,
        "usable": True,
        "level": "off",
        "reason": "switched off: forced to 'off'",
    }
    assert facts["native"] == expected
    assert "not active: switched off" in shown(facts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "demand, expected",
    [
        ("avx1024", "ENGRAPHY_NATIVE='avx1024': expected one of auto, off, scalar, avx2, avx512"),
        ("avx512", "ENGRAPHY_NATIVE='avx512'"),
    ],
)
def test_a_demand_is_met_or_refused_with_its_reason(demand, expected):
    code = "from engraphy.cli import app; print('imported'); app()"
    run = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        env=os.environ | {"ENGRAPHY_NATIVE": demand},
        capture_output=True,
        text=True,
    )
    imported, _, printed = run.stdout.partition("\n")
    assert imported == "imported"  # importing is never refused
    native = json.loads(printed)["native"]
    assert expected in native["reason"]
    met = demand in (_native._compiled.levels() if _native._compiled else ())
    assert (run.returncode, native["usable"], native["active"]) == (
        (0, True, True) if met else (1, False, False)
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            "avx2 avx512f avx512bw avx512dq avx512vl amx_tile amx_bf16 avx512_bf16",
            (True, True, True, True),
        ),
        ("avx2 avx512f avx512bw avx512dq avx512vl", (True, True, False, False)),
        ("avx2 avx512f", (True, False, False, False)),
        ("sse2 avx", (False, False, False, False)),
    ],
)
def test_cpu_flags_are_read_as_what_they_mean(flags, expected):
    facts = cpu.facts({"model name": "Xeon", "flags": flags})
    assert facts == dict(zip(("avx2", "avx512", "amx", "bf16"), expected, strict=True)) | {
        "model": "Xeon"
    }


def test_an_arm_processor_is_known_by_its_features():
    assert cpu.facts({"Features": "asimd bf16"})["bf16"] is True


def test_the_report_says_bf16_is_fast_where_its_instructions_have_a_name():
    assert (cpu.bf16_instructions() is not None) == bool(machine.report()["cpu"]["bf16"])


def test_an_unknown_cpu_is_unknown_and_not_slow():
    facts = machine.report() | {"cpu": cpu.facts({})}
    assert facts["cpu"]["bf16"] is None
    assert "bf16 matmul" in shown(facts) and "slow" not in shown(facts)


def test_a_package_that_is_missing_is_said():
    facts = machine.report()
    facts["packages"]["transformers"] = None
    assert "not installed" in shown(facts)


def test_version_is_one_line():
    run = CliRunner().invoke(app, ["--version"])
    assert run.exit_code == 0 and run.output == f"engraphy {__version__}\n"
