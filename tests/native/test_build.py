"""An installation whose C++ does not compile works in plain Python and says so, unless the native
part was demanded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from engraphy import _native
from engraphy.errors import ConfigError, NativeUnavailable
from tests.tools.paths import ROOT

pytestmark = pytest.mark.slow


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds with the tools of this environment and a compiler that fails."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ENGRAPHY_", "CMAKE_"))
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--wheel-dir",
        str(folder),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
    ]
    return subprocess.run(
        command, env=inherited | {"CXX": "false"} | environment, capture_output=True, text=True
    )


def run_in(package: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code on an unpacked wheel: without `site`, so that an editable installation cannot take
    its place."""
    paths = [str(package), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "ENGRAPHY_NATIVE")
    }
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        env=inherited | environment,
        capture_output=True,
        text=True,
        cwd=package,
    )


@pytest.fixture(scope="module")
def pure(tmp_path_factory) -> Path:
    """An unpacked wheel from a build whose compiler failed."""
    folder = tmp_path_factory.mktemp("wheel")
    built = build_wheel(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_a_failed_native_build_gives_a_working_package_that_says_why(pure):
    run = run_in(pure, "from engraphy.cli import app; app(['doctor', '--json'])")
    assert run.returncode == 0, run.stderr
    native = json.loads(run.stdout)["native"]
    assert (native["active"], native["usable"], native["level"]) == (False, True, "off")
    assert (
        "no compiled extension" in native["reason"]
        and "ENGRAPHY_REQUIRE_NATIVE=true" in native["reason"]
    )


def test_a_pure_wheel_has_the_types_and_neither_sources_nor_stale_extensions(pure):
    files = {path.relative_to(pure).as_posix() for path in pure.rglob("*") if path.is_file()}
    assert {
        "engraphy/py.typed",
        "engraphy/_native/_core.pyi",
        "engraphy/_native/__init__.py",
    } <= files
    assert not [name for name in files if name.endswith((".cpp", ".hpp", ".so"))]


def test_a_level_demanded_of_a_pure_package_fails_at_first_use_and_not_at_import(pure):
    code = """
from engraphy import _native
from engraphy.errors import NativeUnavailable
print("imported", _native.core is not None)
try:
    _native.core.HashPlan
except NativeUnavailable as error:
    print(error)
"""
    run = run_in(pure, code, ENGRAPHY_NATIVE="avx2")
    assert run.stdout.startswith("imported True\nENGRAPHY_NATIVE='avx2': no compiled extension"), (
        run.stderr
    )


def test_a_demanded_native_build_that_fails_fails_the_installation(tmp_path):
    built = build_wheel(tmp_path, ENGRAPHY_REQUIRE_NATIVE="true")
    assert built.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_forcing_lasts_for_its_block_only_and_nests():
    before = _native.core, _native.reason, _native.level()
    with _native.forced("off"):
        assert _native.core is None and _native.level() == "off"
        with _native.forced("auto"):
            assert _native.core is _native._compiled
        assert _native.core is None and _native.reason == "switched off: forced to 'off'"
    assert (_native.core, _native.reason, _native.level()) == before


def test_forcing_what_cannot_be_had_is_an_error_and_changes_nothing():
    before = _native.core, _native.reason
    with pytest.raises(ConfigError, match="expected one of auto"), _native.forced("sse9"):
        pass
    for level in {"scalar", "avx2", "avx512"} - set(
        _native._compiled.levels() if _native._compiled else ()
    ):
        with pytest.raises(NativeUnavailable, match=f"forced to '{level}'"), _native.forced(level):
            pass
    assert (_native.core, _native.reason) == before


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_target_that_needs_more_than_pip_says_what_is_missing_and_exits_with_2(tmp_path):
    make = [
        shutil.which("make"),
        "--directory",
        str(ROOT),
        "--old-file=.venv/installed-dev",
        "valgrind",
    ]
    run = subprocess.run(make, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 2
    assert "expected the program valgrind, found none; on Debian: apt-get install" in run.stderr
