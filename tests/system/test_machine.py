"""Free memory is what the machine and every control group on the way up leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from engraphy.errors import ConfigError
from engraphy.system.machine import VARIABLE, free_memory, total_memory

MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:    5000 kB\n"}
FREE, TOTAL = 5000 * 1024, 9000 * 1024
V1_MOUNT = "35 31 0:32 {top} {place} rw,relatime - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {top} {place} rw,relatime - cgroup2 cgroup2 rw"


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def machine(root: Path, *parts: dict[str, str]) -> Path:
    for name, text in (item for part in parts for item in part.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def groups(text: str, *mounts: str) -> dict[str, str]:
    return {"proc/self/cgroup": text, "proc/self/mountinfo": "\n".join(mounts) + "\n"}


def v2(folder: str, limit: object = "max", used: int = 0, stat: str = "") -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def v1(folder: str, limit: object = 2**63 - 4096, used: int = 0, stat: str = "") -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": stat,
    }


def test_without_control_groups_it_is_what_the_machine_has_available(tmp_path):
    assert free_memory(machine(tmp_path, MEMINFO)) == FREE and total_memory(tmp_path) == TOTAL


def test_a_system_that_says_nothing_is_not_known(tmp_path):
    assert free_memory(tmp_path) is None and total_memory(tmp_path) is None


def test_this_machine_says_something():
    free, total = free_memory(), total_memory()
    assert free is not None and total is not None and 0 < free < total


@pytest.mark.parametrize(
    "limit, free", [("max", FREE), (3_000_000, 2_000_000), (900_000, 0), (2**62, FREE)]
)
def test_version_2_leaves_its_limit_less_what_is_used(tmp_path, limit, free):
    root = machine(
        tmp_path,
        MEMINFO,
        groups("0::/box\n", V2_MOUNT.format(top="/", place="/sys/fs/cgroup")),
        v2("sys/fs/cgroup/box", limit, 1_000_000),
    )
    assert free_memory(root) == free


def test_page_cache_that_can_be_given_back_counts_as_free(tmp_path):
    stat = (
        "anon 100000\nfile 700000\ninactive_file 400000\nactive_file 200000\n"
        "slab_reclaimable 50000\n"
    )
    root = machine(
        tmp_path,
        MEMINFO,
        groups("0::/box\n", V2_MOUNT.format(top="/", place="/sys/fs/cgroup")),
        v2("sys/fs/cgroup/box", 3_000_000, 1_000_000, stat),
    )
    assert free_memory(root) == 3_000_000 - 350_000
    old = machine(
        tmp_path / "old",
        MEMINFO,
        groups("4:memory:/box\n", V1_MOUNT.format(top="/", place="/cg")),
        v1(
            "cg/box",
            3_000_000,
            1_000_000,
            "inactive_file 1\ntotal_inactive_file 400000\ntotal_active_file 200000\n",
        ),
    )
    assert free_memory(old) == 3_000_000 - 400_000


@pytest.mark.parametrize("tight", ["a/b/c", "a/b", "a", "."])
@pytest.mark.parametrize(
    "make, line, mount",
    [
        (v1, "9:cpuset:/x\n4:cpu,memory:/a/b/c\n0::/other\n", V1_MOUNT),
        (v2, "1:name=systemd:/x\n0::/a/b/c\n", V2_MOUNT),
    ],
    ids=["v1", "v2"],
)
def test_the_least_of_all_groups_on_the_way_up_counts(tmp_path, make, line, mount, tight):
    levels = {f"cg/{name}": 4_000_000 for name in ("a/b/c", "a/b", "a", ".")} | {
        f"cg/{tight}": 1_500_000
    }
    root = machine(
        tmp_path,
        MEMINFO,
        groups(line, mount.format(top="/", place="/cg")),
        *(make(name, limit, 500_000) for name, limit in levels.items()),
    )
    assert free_memory(root) == 1_000_000 and total_memory(root) == 1_500_000


def test_a_group_beside_the_own_one_does_not_count(tmp_path):
    root = machine(
        tmp_path,
        MEMINFO,
        groups("0::/a/b\n", V2_MOUNT.format(top="/", place="/cg")),
        v2("cg/a/b", 4_000_000),
        v2("cg/a/other", 1000),
        v2("cg/box", 1000),
    )
    assert free_memory(root) == 4_000_000


@pytest.mark.parametrize(
    "path, top",
    [
        ("/docker/f00", "/docker/f00"),
        ("/", "/"),
        ("/../elsewhere", "/"),
        ("/docker/f00/inner", "/docker/f00"),
        ("/seen/elsewhere", "/docker/f00"),
    ],
)
@pytest.mark.parametrize(
    "make, line, mount",
    [(v1, "4:memory:{}\n", V1_MOUNT), (v2, "0::{}\n", V2_MOUNT)],
    ids=["v1", "v2"],
)
def test_in_a_container_the_top_of_the_mount_is_the_container(
    tmp_path, make, line, mount, path, top
):
    root = machine(
        tmp_path,
        MEMINFO,
        groups(line.format(path), mount.format(top=top, place="/sys/fs/cgroup/m")),
        make("sys/fs/cgroup/m", 2_000_000, 500_000),
    )
    assert free_memory(root) == 1_500_000


def test_both_versions_side_by_side_are_asked(tmp_path):
    mounts = (
        V1_MOUNT.format(top="/", place="/sys/fs/cgroup/memory"),
        V2_MOUNT.format(top="/", place="/sys/fs/cgroup/unified"),
    )
    root = machine(
        tmp_path,
        MEMINFO,
        groups("4:memory:/a\n0::/b\n", *mounts),
        v1("sys/fs/cgroup/memory/a", 3_000_000),
        v2("sys/fs/cgroup/unified/b", 2_000_000),
    )
    assert free_memory(root) == 2_000_000


def test_a_mount_point_with_a_space_is_found(tmp_path):
    root = machine(
        tmp_path,
        MEMINFO,
        groups("0::/\n", V2_MOUNT.format(top="/", place="/c\\040g")),
        v2("c g", 2_000_000),
    )
    assert free_memory(root) == 2_000_000


@pytest.mark.parametrize(
    "folder, make", [("sys/fs/cgroup", v2), ("sys/fs/cgroup/memory", v1)], ids=["v2", "v1"]
)
def test_the_usual_places_are_asked_where_mounts_and_groups_are_not_said(tmp_path, folder, make):
    assert free_memory(machine(tmp_path, MEMINFO, make(folder, 2_000_000))) == 2_000_000


@pytest.mark.parametrize("damage", ["", "gibberish\n", "\0\xff\n", "1 2 3\n4:memory\n0\n:::\n"])
def test_files_that_make_no_sense_are_as_if_they_were_not_there(tmp_path, damage):
    names = (
        "proc/self/cgroup",
        "proc/self/mountinfo",
        "sys/fs/cgroup/memory.max",
        "sys/fs/cgroup/memory.stat",
    )
    assert free_memory(machine(tmp_path, MEMINFO, dict.fromkeys(names, damage))) == FREE


def test_what_is_given_counts_whatever_the_machine_says(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "123456")
    assert free_memory() == free_memory(machine(tmp_path, MEMINFO)) == 123456
    for wrong in ("-1", "2GiB", "1e9", " 5"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(
            ConfigError, match=f"{VARIABLE}: expected a number of bytes, found '{wrong}'"
        ):
            free_memory()
