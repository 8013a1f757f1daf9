"""A lab on this machine: its ranks, links and quotas, its exit status, and its end."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.lab.remains import remains_in_the_end

from anabranch.lab import cluster, network
from anabranch.lab.cgroups import find_hierarchy
from anabranch.lab.check import check
from anabranch.lab.cluster import Lab
from anabranch.lab.kernel import available
from anabranch.lab.ownership import clean
from anabranch.lab.spec import LabSpec

pytestmark = pytest.mark.skipif((reason := available()) is not None, reason=f"no lab here: {reason}")

TELL = """
echo told >&2
{
    env
    echo CGROUP=$(grep -E ':cpu[:,]|^0::' /proc/self/cgroup | head -1)
    echo NET=$(readlink /proc/self/ns/net)
} >"$FOLDER/.$RANK" && mv "$FOLDER/.$RANK" "$FOLDER/$RANK"
if [ $RANK = 2 ]; then while [ $(ls "$FOLDER" | wc -l) -lt 4 ]; do sleep 0.05; done; exit 3; fi
exec sleep 60
"""
LOAD = """
import torch.distributed as dist, torch
dist.init_process_group("gloo")
dist.broadcast(torch.zeros(1 << 20), 0)
dist.barrier()
dist.destroy_process_group()  # else gloo's threads may object to the interpreter's end
"""


@pytest.fixture(scope="module")
def lab():
    with Lab(LabSpec(2, 2, inter_mbit=200.0, intra_mbit=5000.0, cpu=0.4)) as made:
        yield made
    assert not remains_in_the_end(made.name)


def sent_bytes(lab, node, interface):
    command = ["ip", "-n", network.namespace(lab.name, node), "-s", "-j", "link", "show", "dev", interface]
    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return told[0]["stats64"]["tx"]["bytes"]


def test_ranks_know_their_place_and_the_first_failure_is_the_exit_status(lab, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert lab.run(["sh", "-c", TELL], {"FOLDER": str(tmp_path), "MINE": "a b"}, timeout_s=60) == 3
    told = [
        dict(line.split("=", 1) for line in (tmp_path / str(rank)).read_text().splitlines() if "=" in line)
        for rank in range(4)
    ]
    for rank, env in enumerate(told):
        assert env["RANK"] == str(rank)
        assert (env["GROUP_RANK"], env["LOCAL_RANK"]) == (str(rank // 2), str(rank % 2))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert env["ANABRANCH_LAB"] == "2x2 inter=200mbit intra=5gbit cpu=0.4"
        assert env["GLOO_SOCKET_IFNAME"] == "eth0"
        assert (env["OMP_NUM_THREADS"], env["MALLOC_MMAP_MAX_"], env["MINE"]) == ("1", "0", "a b")
        assert env["CGROUP"].endswith(f"/{lab.name}/rank{rank}")
    homes = [env["NET"] for env in told]
    assert homes[0] == homes[1] != homes[2] == homes[3]
    assert os.readlink("/proc/self/ns/net") not in homes
    # The command's own words pass through; torchrun adds no traceback to them.
    assert capfd.readouterr().err.splitlines() == ["told"] * 4


def test_the_kernel_holds_the_quotas(lab):
    hierarchy = find_hierarchy()
    assert hierarchy is not None
    for rank in range(4):
        group = hierarchy.group(lab.name, f"rank{rank}")
        if hierarchy.version == 1:
            assert (group / "cpu.cfs_quota_us").read_text().strip() == "4000"
            assert (group / "cpu.cfs_period_us").read_text().strip() == "10000"
        else:
            assert (group / "cpu.max").read_text().strip() == "4000 10000"


def test_links_deliver_what_was_set(lab):
    # Long beside the pauses of a busy host: half a second once saw 143 of 200 Mbit/s.
    found = list(check(lab, seconds=2.0))
    assert [(one.kind, one.where) for one in found] == [
        ("inter", "0>1"), ("inter", "1>0"), ("both_ways", "0>1"), ("both_ways", "1>0"),
        ("intra", "node 0"), ("intra", "node 1"), *(("cpu", f"rank {rank}") for rank in range(4)),
    ]  # fmt: skip
    for one in found:
        assert one.set is not None and one.percent is not None
        assert one.delivered <= 1.1 * one.set, one
        if one.kind in ("inter", "both_ways"):
            assert one.delivered >= 0.75 * one.set, one
        assert one.percent == pytest.approx(100 * one.delivered / one.set, abs=0.2)


def test_a_second_command_and_one_that_takes_too_long(lab, tmp_path):
    assert lab.run(["sh", "-c", "exit 0"], timeout_s=60) == 0
    assert lab.run(["sleep", "60"], timeout_s=1) == 124
    assert lab.run(["anabranch-no-such-program"], timeout_s=60) == 127
    assert lab.run([str(tmp_path)], timeout_s=60) == 126
    assert lab.run(["sh", "-c", "kill -9 $$"], timeout_s=60) == 128 + 9


def test_a_command_without_time_is_not_even_started(lab, tmp_path):
    """The agents are in no cgroup yet when they are ended."""
    assert lab.run(["touch", str(tmp_path / "ran")], timeout_s=0) == 124
    assert not (tmp_path / "ran").exists()


def test_modules_of_the_current_folder_are_not_the_labs(tmp_path, monkeypatch, capfd):
    (tmp_path / "queue.py").write_text("raise ValueError('not this one')")
    monkeypatch.chdir(tmp_path)
    with Lab(LabSpec(1, 1)) as lab:
        assert lab.run(["true"], timeout_s=60) == 0
    assert capfd.readouterr().err == ""


def test_ranks_of_a_node_talk_over_lo():
    """gloo is told the veth's name; the kernel routes a node's own address over lo all the same."""
    with Lab(LabSpec(1, 2)) as lab:
        assert lab.run([sys.executable, "-c", LOAD], timeout_s=120) == 0
        assert sent_bytes(lab, 0, "lo") > 4 << 20
        assert sent_bytes(lab, 0, "eth0") < 1 << 20


def test_a_failure_while_building_leaves_nothing(monkeypatch):
    def build(lab, spec, tools):
        tools("ip", "netns", "add", network.namespace(lab, 0))
        tools("ip", "-n", network.namespace(lab, 0), "link", "set", "eth0", "up")

    monkeypatch.setattr(cluster.network, "build", build)
    lab = Lab(LabSpec(1, 1))
    with pytest.raises(ValueError, match=r"`ip -n .* link set eth0 up` failed: .*eth0"):
        lab.__enter__()
    assert not remains_in_the_end(lab.name)


def test_a_lost_watchdog_is_replaced_in_the_end():
    with Lab(LabSpec(1, 1)) as lab:
        watchdogs = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and f"watchdog\0{lab.name}".encode() in (entry / "cmdline").read_bytes()
        ]
        os.kill(watchdogs[0], 9)
    assert not remains_in_the_end(lab.name)


def test_a_living_owners_lab_is_left_alone():
    cleaned = []
    with Lab(LabSpec(1, 1)) as lab:
        cleaner = threading.Thread(target=lambda: cleaned.append(clean()))
        cleaner.start()
        cleaner.join()
        assert lab.name in cleaned[0].running and lab.name not in cleaned[0].removed
        assert network.of_lab(lab.name) != []
