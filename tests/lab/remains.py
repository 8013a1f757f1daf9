"""What labs have left on this machine."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

from anabranch.lab import network
from anabranch.lab.cgroups import find_hierarchy
from anabranch.lab.ownership import FOLDERS


def remains(*marks: str) -> list[str]:
    """Namespaces, cgroups, folders, interfaces and processes: those whose name bears a mark."""
    hierarchy = find_hierarchy()
    assert hierarchy is not None
    places = {
        "namespace": network.names(),
        "cgroup": os.listdir(hierarchy.mount),
        "folder": os.listdir(FOLDERS),
    }
    bears = re.compile("|".join(marks))
    found = [f"{kind} {name}" for kind, names in places.items() for name in names if bears.search(name)]
    found += [f"process {line}" for line in command_lines() if bears.search(line)]
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    found += [f"interface {link['ifname']}" for link in links if re.match(r"node\d|bridge0", link["ifname"])]
    return found


def command_lines() -> list[str]:
    """Of every living process but this one, with its id in front."""
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            lines.append(f"{entry.name} {words}")
    return lines


def remains_in_the_end(*marks: str) -> list[str]:
    """The same, once the watchdog has had its time."""
    for _ in range(300):
        if not (found := remains(*marks)):
            break
        time.sleep(0.05)
    return found
