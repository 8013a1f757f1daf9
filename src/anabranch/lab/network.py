"""The lab's network: a namespace per node, a bridge in a namespace of its own, and shaped links.

    <lab>-n0: eth0 ---- node0 :<lab>-hub: node1 ---- eth0 :<lab>-n1

Nothing is made in the machine's own namespace, so two labs never meet, nor does the machine see an interface.
What node i sends is shaped where it leaves eth0, what it receives where it leaves the hub's end of the same
link. Ranks of one node talk over its `lo`: the kernel routes a node's own address there.

Shaping is htb with one class. Against tbf (measured: docs/lab.md) it takes the kernel's large segments whole,
so it costs no CPU for cutting them up, delivers what is set from 200 Mbit/s to 5 Gbit/s, and its bucket can be
far smaller than a message.

Connections use cubic, or reno where the kernel lacks it, whatever the machine prefers: bbr stops sending for 200 ms
every ten seconds to probe the link, which a benchmark sees as stalls of single steps.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from anabranch.lab.spec import LabSpec
from anabranch.lab.tools import Tools

NAMESPACES = Path("/var/run/netns")
INTERFACE = "eth0"
MTU = 9000  # the frames of a cluster's network; 1500 would lose 4 % to headers
BURST_BYTES = 9_000
BURST_US = 100  # at fast rates the bucket holds what passes between two timer interrupts
QUANTUM_BYTES = 16_000
CONGESTION_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"  # of the namespace that opens it


def namespace(lab: str, node: int) -> str:
    return f"{lab}-n{node}"


def address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def build(lab: str, spec: LabSpec, tools: Tools) -> None:
    """Make namespaces, bridge and links, and shape them. Raises AnabranchError; then `delete` is due."""
    hub = f"{lab}-hub"
    tools("ip", "netns", "add", hub)
    tools("ip", "-n", hub, "link", "add", "bridge0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
    tools("ip", "-n", hub, "link", "set", "bridge0", "up")
    for node in range(spec.nodes):
        home, port = namespace(lab, node), f"node{node}"
        tools("ip", "netns", "add", home)
        tools("ip", "-n", hub, "link", "add", port, "mtu", str(MTU), "type", "veth",
              "peer", "name", INTERFACE, "mtu", str(MTU), "netns", home)  # fmt: skip
        tools("ip", "-n", hub, "link", "set", port, "master", "bridge0", "up")
        tools("ip", "-n", home, "addr", "add", f"{address(node)}/24", "dev", INTERFACE)
        tools("ip", "-n", home, "link", "set", INTERFACE, "up")
        tools("ip", "-n", home, "link", "set", "lo", "up")
        if spec.inter_mbit is not None:
            _shape(home, INTERFACE, spec.inter_mbit, tools)
            _shape(hub, port, spec.inter_mbit, tools)
        _control_congestion(home, tools)
        if spec.intra_mbit is not None:
            _shape(home, "lo", spec.intra_mbit, tools)


def _control_congestion(home: str, tools: Tools) -> None:
    inside = ("nsenter", f"--net={NAMESPACES / home}", "sh", "-c")
    if tools.attempt(*inside, f"echo cubic >{CONGESTION_CONTROL}").returncode:
        tools(*inside, f"echo reno >{CONGESTION_CONTROL}")


def _shape(home: str, interface: str, rate_mbit: float, tools: Tools) -> None:
    """One htb class of this rate for all that leaves the interface."""
    burst = f"{max(BURST_BYTES, round(rate_mbit * BURST_US / 8))}b"
    rate = f"{round(rate_mbit * 1e6)}bit"
    tools("tc", "-n", home, "qdisc", "add", "dev", interface, "root", "handle", "1:", "htb", "default", "1")
    tools("tc", "-n", home, "class", "add", "dev", interface, "parent", "1:", "classid", "1:1", "htb",
          "rate", rate, "burst", burst, "cburst", burst, "quantum", str(QUANTUM_BYTES))  # fmt: skip


def names() -> list[str]:
    """Every named namespace of the machine."""
    return os.listdir(NAMESPACES) if NAMESPACES.exists() else []


def of_lab(lab: str) -> list[str]:
    """The namespaces of one lab."""
    return [name for name in names() if re.fullmatch(rf"{lab}-(hub|n\d+)", name)]


def processes(lab: str) -> set[int]:
    """The ids of all processes in the lab's namespaces."""
    inodes: set[int] = set()
    for name in of_lab(lab):
        with suppress(FileNotFoundError):
            inodes.add((NAMESPACES / name).stat().st_ino)
    found: set[int] = set()
    for entry in os.listdir("/proc") if inodes else []:
        with suppress(OSError):  # it has ended meanwhile
            if entry.isdigit() and os.stat(f"/proc/{entry}/ns/net").st_ino in inodes:
                found.add(int(entry))
    return found


def delete(lab: str, tools: Tools) -> bool:
    """Whether the lab's namespaces are gone; their interfaces go with them."""
    for name in of_lab(lab):
        tools.attempt("ip", "netns", "delete", name)
    return not of_lab(lab)
