"""Whether this machine can hold a lab: root, tools, and what the kernel offers."""

import os
import shutil
import sys

from anabranch.lab.cgroups import find_hierarchy
from anabranch.lab.tools import Tools

# Tool, and the package that brings it.
TOOLS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}
# What the lab makes, tried in a namespace that ends with the attempt; and what its refusal means.
TRIALS = (
    ("true", "this process may not make network namespaces; in a container, run it privileged"),
    ("ip link add type veth", "the kernel has no veth interfaces; load the module veth"),
    ("ip link add type bridge", "the kernel has no bridges; load the module bridge"),
    ("tc qdisc add dev lo root htb", "the kernel has no htb shaping; load the module sch_htb"),
)


def available() -> str | None:
    """None where a lab can run on this machine; else what is missing, and the remedy."""
    if sys.platform != "linux":
        return "the lab is made of Linux namespaces and cgroups; run it on Linux"
    if os.geteuid() != 0:
        return "the lab makes network namespaces and cgroups, which takes root; run it with sudo"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"the command {tool} is missing; install {package}"
    hierarchy = find_hierarchy()
    if hierarchy is None:
        return "no cgroup hierarchy with the cpu controller is mounted; mount one (cgroup v1 or v2)"
    if not os.access(hierarchy.mount, os.W_OK):
        return f"{hierarchy.mount} is read-only; in a container, run it privileged"
    return next((reason for trial, reason in TRIALS if not _holds(trial)), None)


def has_netem() -> bool:
    """Whether the kernel could delay packets. The lab does not offer it; its users are told."""
    return _holds("tc qdisc add dev lo root netem delay 1ms")


def _holds(trial: str) -> bool:
    return Tools().attempt("unshare", "--net", *trial.split()).returncode == 0
