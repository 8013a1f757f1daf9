"""CPU quotas by control group, of either version of the kernel's interface.

A lab has one group at the top of the hierarchy, `<lab>`, and in it `agents` (no quota) and `rank0`, `rank1`...
Every process of the lab is in one of them, so they are also how a lab finds all it has started.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from anabranch.errors import AnabranchError

MOUNTS = Path("/proc/self/mounts")
# Short, so that a rank out of quota stalls for milliseconds and never for a good part of a step.
PERIOD_US = 10_000
AGENTS = "agents"
# In the kernel's eyes a whole lab weighs as much as one other process. A rank under a quota weighs as ten, so
# that it gets what was set while others use the machine too; they keep the rest and are never starved.
WEIGHT = 10


class Hierarchy(NamedTuple):
    """Where the kernel's cpu controller is mounted, and which interface (1 or 2) it speaks."""

    mount: Path
    version: int

    def group(self, lab: str, name: str = "") -> Path:
        """The folder of one group of a lab; of its top without a name."""
        return self.mount / lab / name


def find_hierarchy(mounts: Path = MOUNTS) -> Hierarchy | None:
    """The mounted hierarchy that has the cpu controller."""
    for line in mounts.read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Hierarchy(Path(folder), 1)
        if kind == "cgroup2" and "cpu" in (Path(folder) / "cgroup.controllers").read_text().split():
            return Hierarchy(Path(folder), 2)
    return None


def create(hierarchy: Hierarchy, lab: str, ranks: int, cpu: float | None) -> None:
    """Make the groups of a lab. Raises AnabranchError where the kernel refuses."""
    names = [AGENTS, *(f"rank{rank}" for rank in range(ranks))]
    try:
        if hierarchy.version == 2:
            _hand_down(hierarchy.mount)
        hierarchy.group(lab).mkdir()
        if cpu is not None:
            _weigh(hierarchy, hierarchy.group(lab), WEIGHT * ranks)
        if hierarchy.version == 2:
            _hand_down(hierarchy.group(lab))
        for name in names:
            hierarchy.group(lab, name).mkdir()
            if cpu is not None and name != AGENTS:
                _limit(hierarchy, hierarchy.group(lab, name), round(cpu * PERIOD_US))
    except OSError as error:
        raise AnabranchError(
            f"the cgroups under {hierarchy.mount} cannot be made ({error.strerror}); in a container, run it "
            "privileged and with the host's cgroup namespace",
            setting="lab",
        ) from None


def _hand_down(group: Path) -> None:
    """Version 2 gives children the controllers that their parent names."""
    control = group / "cgroup.subtree_control"
    if "cpu" not in control.read_text().split():
        control.write_text("+cpu")


def _weigh(hierarchy: Hierarchy, group: Path, processes: int) -> None:
    """Let the group compete like so many processes."""
    if hierarchy.version == 2:
        (group / "cpu.weight").write_text(str(min(100 * processes, 10_000)))
    else:
        (group / "cpu.shares").write_text(str(min(1024 * processes, 1 << 18)))


def _limit(hierarchy: Hierarchy, group: Path, quota_us: int) -> None:
    if hierarchy.version == 2:
        (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))


def processes(hierarchy: Hierarchy, lab: str, kind: str = "") -> set[int]:
    """The ids of a lab's processes, in groups whose name starts with `kind`."""
    return {pid for group in _groups(hierarchy, lab) if group.name.startswith(kind) for pid in _inside(group)}


def send(pids: set[int], number: signal.Signals) -> None:
    """Signal processes, those that have ended meanwhile excepted."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def remove(hierarchy: Hierarchy, lab: str) -> bool:
    """Whether the lab's groups are gone: the kernel keeps a group until its last process is."""
    top = hierarchy.group(lab)
    for group in (*_groups(hierarchy, lab), top):
        try:
            group.rmdir()
        except OSError:
            continue
    return not top.exists()


def _groups(hierarchy: Hierarchy, lab: str) -> Iterator[Path]:
    top = hierarchy.group(lab)
    try:
        yield from [Path(entry.path) for entry in os.scandir(top) if entry.is_dir()]
    except FileNotFoundError:
        return


def _inside(group: Path) -> list[int]:
    try:
        # 0 stands for a process of a foreign pid namespace, and for kill() it is the caller's own group.
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split() if pid != "0"]
    except (FileNotFoundError, OSError):
        return []
