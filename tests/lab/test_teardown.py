"""However a lab's owner ends, nothing stays: no namespace, interface, cgroup, process or folder."""

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from tests.lab.remains import command_lines, remains, remains_in_the_end

from anabranch.lab.kernel import available
from anabranch.lab.ownership import FOLDERS, clean

pytestmark = pytest.mark.skipif((reason := available()) is not None, reason=f"no lab here: {reason}")

SOURCES = Path(__file__).resolve().parents[2] / "src"
# A rank that heeds no request to end, with a child that has left its session.
STUBBORN = "trap '' TERM INT; setsid sleep {marker} & sleep {marker}"
OWNER = """
import sys
from anabranch.lab.cluster import Lab
from anabranch.lab.spec import LabSpec
with Lab(LabSpec(2, 2, inter_mbit=200.0, intra_mbit=5000.0, cpu=0.4)) as lab:
    print(lab.name, flush=True)
    lab.run(["sh", "-c", sys.argv[1]])
"""
COMMAND_LINE = ["anabranch", "lab", "run", "--inter", "200mbit", "--intra", "5gbit", "--cpu", "0.4", "--"]


def start(*python, marker):
    """An owner whose ranks bear the marker; it is up to the caller to end it."""
    return subprocess.Popen(
        [
            sys.executable,
            *python,
            *(["sh", "-c"] if python[0] == "-m" else []),
            STUBBORN.format(marker=marker),
        ],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def new_marker():
    """A time to sleep that no other process sleeps for."""
    return f"9{random.SystemRandom().randrange(10**8, 10**9)}"


def wait_for_folder(owner):
    """Until the lab begins to be: its watchdog is there and nothing else."""
    while not (
        FOLDERS.exists() and any(name.startswith(f"anab{owner.pid}-") for name in os.listdir(FOLDERS))
    ):
        assert owner.poll() is None, "the owner ended by itself"
        time.sleep(0.005)


def wait_for_ranks(marker, ranks):
    while len([line for line in command_lines() if re.match(rf"\d+ sleep {marker}", line)]) < 2 * ranks:
        time.sleep(0.05)


@pytest.mark.parametrize(("signal", "delay_s"), [(SIGINT, 0.02), (SIGTERM, 0.06), (SIGKILL, 0.8)])
def test_an_owner_without_handlers_is_ended_while_its_lab_comes_up(signal, delay_s):
    marker = new_marker()
    with start("-c", OWNER, marker=marker) as owner:
        wait_for_folder(owner)
        time.sleep(delay_s)
        owner.send_signal(signal)
    assert owner.returncode != 0
    assert not remains_in_the_end(f"anab{owner.pid}-", marker)


@pytest.mark.parametrize(("signal", "status"), [(SIGINT, 130), (SIGTERM, 128 + SIGTERM)])
def test_the_command_ends_only_when_everything_is_gone(signal, status):
    marker = new_marker()
    with start("-m", *COMMAND_LINE, marker=marker) as owner:
        wait_for_ranks(marker, 4)
        owner.send_signal(signal)
    assert not remains(f"anab{owner.pid}-", marker)
    assert owner.returncode == status


def test_what_a_dead_owner_without_a_watchdog_left_is_cleaned():
    marker = new_marker()
    with start("-c", OWNER, marker=marker) as owner:
        assert owner.stdout is not None
        lab = owner.stdout.readline().strip()
        wait_for_ranks(marker, 4)
        watchdogs = [int(line.split()[0]) for line in command_lines() if f"watchdog {lab}" in line]
        assert len(watchdogs) == 1
        os.kill(watchdogs[0], SIGKILL)
        owner.kill()
        owner.wait()
        left = " ".join(remains(f"anab{owner.pid}-", marker))
        assert all(kind in left for kind in ("namespace", "cgroup", "process", "folder"))
        assert lab in clean().removed
    assert not remains(f"anab{owner.pid}-", marker)
    assert lab not in clean().removed


@pytest.mark.full
@pytest.mark.parametrize("kill", range(20))
def test_a_run_killed_at_random_leaves_nothing(kill):
    # Coming up takes a tenth of a second: half of the kills fall there, the others while agents and ranks start.
    chance = random.SystemRandom()
    signal = chance.choice([SIGINT, SIGTERM, SIGKILL])
    delay_s = chance.uniform(0, 0.2) if kill % 2 else chance.uniform(0, 4)
    marker = new_marker()
    with start("-m", *COMMAND_LINE, marker=marker) as owner:
        wait_for_folder(owner)
        time.sleep(delay_s)
        owner.send_signal(signal)
    found = remains_in_the_end(f"anab{owner.pid}-", marker)
    assert not found, f"{signal.name} after {delay_s:.3f} s"
