"""What a machine lacks is named with its remedy."""

import os
import sys

import pytest

from anabranch.errors import AnabranchError
from anabranch.lab import cluster, kernel
from anabranch.lab.cgroups import Hierarchy
from anabranch.lab.cluster import Lab
from anabranch.lab.kernel import available
from anabranch.lab.spec import LabSpec


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """A machine that lacks nothing."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(kernel.shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(kernel, "find_hierarchy", lambda: Hierarchy(tmp_path, 2))
    monkeypatch.setattr(kernel, "_holds", lambda trial: True)
    return monkeypatch


def test_a_whole_machine_lacks_nothing(whole):
    assert available() is None


def test_no_linux_no_root_no_tool_no_controller(whole):
    whole.setattr(kernel, "find_hierarchy", lambda: None)
    assert "cgroup" in (available() or "")
    whole.setattr(kernel.shutil, "which", lambda tool: None if tool == "tc" else tool)
    assert available() == "the command tc is missing; install iproute2"
    whole.setattr(os, "geteuid", lambda: 1000)
    assert "sudo" in (available() or "")
    whole.setattr(sys, "platform", "darwin")
    assert "Linux" in (available() or "")


@pytest.mark.parametrize(
    ("lacking", "word"),
    [("true", "privileged"), ("veth", "veth"), ("bridge", "bridge"), ("htb", "sch_htb")],
)
def test_what_the_kernel_refuses_is_named(whole, lacking, word):
    whole.setattr(kernel, "_holds", lambda trial: lacking not in trial)
    assert word in (available() or "")


def test_a_lab_that_cannot_be_says_why_and_makes_nothing(monkeypatch):
    started = []
    monkeypatch.setattr(cluster, "available", lambda: "no root here")
    monkeypatch.setattr(cluster.subprocess, "Popen", lambda *a, **k: started.append(a))
    with pytest.raises(AnabranchError, match="lab: no root here"), Lab(LabSpec(1, 1)):
        pass
    assert not started
