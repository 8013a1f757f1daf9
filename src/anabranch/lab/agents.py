"""One command on all ranks of a lab: torchrun's agents, one a node, and how the ranks end.

`nsenter` and not `ip netns exec` enters a namespace: the latter hides /sys/fs/cgroup.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGKILL, SIGTERM

from anabranch.lab import cgroups, network, seat
from anabranch.lab.cgroups import AGENTS, Hierarchy
from anabranch.lab.spec import LabSpec

FIRST_PORT = 29_500
POLL_S = 0.05
GRACE_S = 5.0  # from SIGTERM to SIGKILL, for ranks that have something to put in order
TIMED_OUT = 124  # as of timeout(1)
DEFAULTS = {
    # Ranks share the cores, and their quotas: more threads would only burn a quota sooner.
    "OMP_NUM_THREADS": "1",
    # glibc gives freed tensors back to the system and faults them in again: docs/log.md.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
    # torch's store warns of every peer whose address has no name; a node's has none.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def inside(hierarchy: Hierarchy, lab: str, node: int, group: str, command: list[str]) -> list[str]:
    """The command line that joins a group of the lab, enters a node's namespace and runs `command`."""
    procs = hierarchy.group(lab, group) / "cgroup.procs"
    home = network.NAMESPACES / network.namespace(lab, node)
    return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(procs), "nsenter", f"--net={home}", *command]


class Job:
    """A command on all ranks: `start`, `wait`, and in any case `end`."""

    def __init__(self, hierarchy: Hierarchy, lab: str, spec: LabSpec, folder: Path, number: int) -> None:
        self._hierarchy, self._lab, self._spec = hierarchy, lab, spec
        self._port = FIRST_PORT + number
        self._records = folder / f"run{number}"
        self._agents: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], env: Mapping[str, str]) -> None:
        """Start the agents, all at once: each takes seconds of CPU to import torch."""
        self._records.mkdir()
        (self._records / seat.COMMAND).write_text(json.dumps(command))
        ours = {"ANABRANCH_LAB": str(self._spec), "GLOO_SOCKET_IFNAME": network.INTERFACE}
        environment = DEFAULTS | dict(os.environ) | dict(env) | ours
        for node in range(self._spec.nodes):
            line = inside(self._hierarchy, self._lab, node, AGENTS, self._torchrun(node))
            # A session of its own: a terminal's Ctrl-C is for the lab, which ends the ranks in order.
            self._agents.append(
                subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            )

    def _torchrun(self, node: int) -> list[str]:
        python = [sys.executable, "-P"]  # -P: neither the current folder nor the script's among the modules
        sit = [*python, seat.__file__, str(self._hierarchy.group(self._lab)), str(self._records)]
        return [
            *python, "-m", "torch.distributed.run",
            f"--nnodes={self._spec.nodes}", f"--nproc-per-node={self._spec.ranks_per_node}",
            f"--node-rank={node}", f"--master-addr={network.address(0)}", f"--master-port={self._port}",
            f"--local-addr={network.address(node)}", "--max-restarts=0", "--monitor-interval=0.5",
            f"--log-dir={self._records / f'.node{node}'}", "--no-python", *sit,
        ]  # fmt: skip

    def wait(self, timeout_s: float | None, meanwhile: Callable[[], None]) -> int:
        """The exit status of the rank that failed first; 0 when all ranks have ended well, TIMED_OUT else.

        meanwhile: called every POLL_S.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            # Agents first: a rank's record is there before its agent can end.
            ended = [agent.poll() for agent in self._agents]
            if failure := self._first_failure():
                return failure
            if failed := next((status for status in ended if status), None):
                return failed if failed > 0 else seat.SIGNALLED - failed
            if None not in ended:
                return 0
            if deadline_s is not None and time.monotonic() > deadline_s:
                return TIMED_OUT
            meanwhile()
            time.sleep(POLL_S)

    def _first_failure(self) -> int | None:
        told = [tuple(map(int, file.read_text().split())) for file in self._records.glob("rank*")]
        failures = sorted((when_ns, status) for when_ns, status in told if status)
        return failures[0][1] if failures else None

    def end(self) -> None:
        """End what still runs: the ranks' commands in order if they heed SIGTERM, then everything."""
        ranks = cgroups.processes(self._hierarchy, self._lab, "rank")
        cgroups.send(ranks, SIGTERM)
        deadline_s = time.monotonic() + GRACE_S
        while ranks and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            ranks = cgroups.processes(self._hierarchy, self._lab, "rank")
        while alive := cgroups.processes(self._hierarchy, self._lab) | self._running_agents():
            cgroups.send(alive, SIGKILL)
            time.sleep(0.01)

    def _running_agents(self) -> set[int]:
        """One that has only just started is in no group yet."""
        return {agent.pid for agent in self._agents if agent.poll() is None}
