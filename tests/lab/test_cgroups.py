"""Quotas in either interface of the kernel, and finding one's processes again."""

import os
import subprocess
import time
from pathlib import Path
from signal import SIGKILL

import pytest

from anabranch.errors import AnabranchError
from anabranch.lab import cgroups
from anabranch.lab.cgroups import Hierarchy, find_hierarchy
from anabranch.lab.ownership import new_name


@pytest.fixture
def kernel_files(monkeypatch):
    """A plain folder behaves like a hierarchy of version 2: new groups have a control file."""
    made = Path.mkdir

    def mkdir(self, *arguments, **options):
        made(self, *arguments, **options)
        (self / "cgroup.subtree_control").write_text("")

    monkeypatch.setattr(Path, "mkdir", mkdir)


def write_mounts(tmp_path, *lines):
    path = tmp_path / "mounts"
    path.write_text("\n".join(("tmpfs /sys/fs/cgroup tmpfs rw 0 0", *lines)))
    return path


def test_the_hierarchy_is_the_one_that_has_the_cpu_controller(tmp_path):
    unified = tmp_path / "unified"
    unified.mkdir()
    second = f"cgroup2 {unified} cgroup2 rw,relatime 0 0"
    (unified / "cgroup.controllers").write_text("memory pids\n")
    assert find_hierarchy(write_mounts(tmp_path, second)) is None
    first = f"cgroup {tmp_path}/cpu cgroup rw,cpuacct,cpu 0 0"
    others = f"cgroup {tmp_path}/cpuset cgroup rw,cpuset 0 0"
    assert find_hierarchy(write_mounts(tmp_path, others, second, first)) == (tmp_path / "cpu", 1)
    (unified / "cgroup.controllers").write_text("cpuset cpu memory pids\n")
    assert find_hierarchy(write_mounts(tmp_path, others, second)) == (unified, 2)


def test_version_2_hands_the_controller_down_and_limits_ranks_only(tmp_path, kernel_files):
    (tmp_path / "cgroup.subtree_control").write_text("memory")
    cgroups.create(Hierarchy(tmp_path, 2), "lab", ranks=2, cpu=0.25)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu"
    assert (tmp_path / "lab" / "cgroup.subtree_control").read_text() == "+cpu"
    assert (tmp_path / "lab" / "cpu.weight").read_text() == "2000"
    quotas = {file.parent.name: file.read_text() for file in tmp_path.glob("lab/*/cpu.max")}
    assert quotas == {"rank0": "2500 10000", "rank1": "2500 10000"}


def test_version_1_limits_ranks_only(tmp_path):
    cgroups.create(Hierarchy(tmp_path, 1), "lab", ranks=2, cpu=1.5)
    quotas = {file.parent.name: file.read_text() for file in tmp_path.glob("lab/*/cpu.cfs_quota_us")}
    assert quotas == {"rank0": "15000", "rank1": "15000"}
    assert {file.read_text() for file in tmp_path.glob("lab/*/cpu.cfs_period_us")} == {"10000"}
    assert (tmp_path / "lab" / "cpu.shares").read_text() == str(20 * 1024)


def test_no_quota_leaves_the_kernels_values(tmp_path, kernel_files):
    (tmp_path / "cgroup.subtree_control").write_text("cpu")
    cgroups.create(Hierarchy(tmp_path, 2), "lab", ranks=1, cpu=None)
    assert not list(tmp_path.rglob("cpu.*"))


def test_a_refusing_kernel_is_the_users_error(tmp_path):
    with pytest.raises(AnabranchError, match=r"cannot be made .*; in a container, run it privileged"):
        cgroups.create(Hierarchy(tmp_path / "missing", 1), "lab", ranks=1, cpu=None)


def real_hierarchies():
    """Those of this machine in which groups can be made; version 2 needs no controller for that."""
    mounted = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
    second = [Hierarchy(path, 2) for path in mounted if (path / "cgroup.controllers").exists()]
    first = [found for found in [find_hierarchy()] if found and found.version == 1]
    return [one for one in first + second if os.geteuid() == 0 and os.access(one.mount, os.W_OK)]


@pytest.mark.parametrize("version", [1, 2])
def test_processes_are_found_by_their_group_and_the_group_goes_after_them(version):
    hierarchy = next((one for one in real_hierarchies() if one.version == version), None)
    if hierarchy is None:
        pytest.skip(f"no writable cgroup hierarchy of version {version} (needs root)")
    lab = new_name()
    for name in ("", "agents", "rank0"):
        hierarchy.group(lab, name).mkdir()
    procs = hierarchy.group(lab, "rank0") / "cgroup.procs"
    with subprocess.Popen(
        ["sh", "-c", f"echo $$ >{procs}; echo in; sleep 60"], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"in\n"
        assert child.pid in cgroups.processes(hierarchy, lab, "rank")
        assert cgroups.processes(hierarchy, lab, "agents") == set()
        assert not cgroups.remove(hierarchy, lab)
        cgroups.send(cgroups.processes(hierarchy, lab) | {2**22 + 1}, SIGKILL)
    for _ in range(300):  # the child's own child is init's to bury
        if gone := cgroups.remove(hierarchy, lab):
            break
        time.sleep(0.01)
    assert gone
    assert cgroups.processes(hierarchy, lab) == set()
